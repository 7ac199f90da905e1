"""The claims, an experiment a file: name -> experiment. A new one is a file and a line here."""

from ..board import BOARD
from ..experiment import Experiment
from . import aux_loss_free, expert_choice, fine_grained, hashing, more_experts, no_balancing, shared_expert, z_loss

EXPERIMENTS: dict[str, Experiment] = {
    "board": BOARD,
    "more-experts": more_experts.EXPERIMENT,
    "fine-grained": fine_grained.EXPERIMENT,
    "shared-expert": shared_expert.EXPERIMENT,
    "no-balancing": no_balancing.EXPERIMENT,
    "aux-loss-free": aux_loss_free.EXPERIMENT,
    "z-loss": z_loss.EXPERIMENT,
    "expert-choice": expert_choice.EXPERIMENT,
    "hash": hashing.EXPERIMENT,
}
