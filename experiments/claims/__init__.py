"""The claims, an experiment a file: name -> experiment. A new one is a file and a line here."""

from ..board import BOARD
from ..experiment import Experiment
from . import (
    against_dense,
    aux_loss_free,
    capacity,
    dense_only,
    device_limit,
    expert_choice,
    fine_grained,
    hashing,
    learning_rate,
    mla_cache,
    more_experts,
    mtp,
    no_balancing,
    reinforce_base,
    shared_expert,
    upcycling,
    z_loss,
)

EXPERIMENTS: dict[str, Experiment] = {
    "board": BOARD,
    "learning-rate": learning_rate.EXPERIMENT,
    "more-experts": more_experts.EXPERIMENT,
    "moe-against-dense": against_dense.EXPERIMENT,
    "fine-grained": fine_grained.EXPERIMENT,
    "shared-expert": shared_expert.EXPERIMENT,
    "no-balancing": no_balancing.EXPERIMENT,
    "aux-loss-free": aux_loss_free.EXPERIMENT,
    "z-loss": z_loss.EXPERIMENT,
    "expert-choice": expert_choice.EXPERIMENT,
    "hash": hashing.EXPERIMENT,
    "capacity": capacity.EXPERIMENT,
    "upcycling": upcycling.EXPERIMENT,
    "dense-only-tuning": dense_only.EXPERIMENT,
    "mtp": mtp.EXPERIMENT,
    "mla-cache": mla_cache.EXPERIMENT,
    "device-limit": device_limit.EXPERIMENT,
    "reinforce-base": reinforce_base.EXPERIMENT,
}
