"""Tiny models trained in one process or, sharded, in two: losses, weights and biases, to be compared.

Run by `accelerate launch` it writes what each case in argv[2:] finds to the folder argv[1].
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from hf_moe.training.host import sharding
from hf_moe.training.stages.loading import expert_parallel
from hf_moe.training.stages.run import save_average
from hf_moe.training.trainers.sharded import policy_of
from hf_moe.training.weights.adapters import AdapterArguments, add_adapter
from hf_moe.training.weights.average import AVERAGE_FILE
from hf_moe.training.weights.esft import split_experts
from hf_moe.training.weights.fp8 import compute_in_fp8
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from hf_moe.kernels import experts
from hf_moe.reading import whole_model
from hf_moe.routers import find_routers
from tests.processes import leave
from tests.training.balance_worker import COEFFICIENTS, forwards_of, train_one_step
from tests.training.models import LATENT, hf_moe, hf_moe_biased

RUN = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
}
BIASED = {**COEFFICIENTS, "router_bias_update_speed": 1e-2}
DECAY = 0.7
HELD = {"gradient_checkpointing": True, "accumulation": 4, "save_strategy": "no"}


def adapted():
    parts = ["attention", "routed_experts", "shared_experts"]
    return add_adapter(hf_moe_biased(n_shared_experts=1), AdapterArguments(lora_parts=parts, lora_r=4))[0]


def some_experts():
    model = hf_moe_biased()
    split_experts(model, {name: torch.tensor([1, 3, 4]) for name in find_routers(model)})
    return model


def wide():
    return hf_moe_biased(n_shared_experts=1, hidden_size=128, moe_intermediate_size=128, intermediate_size=128)


def in_fp8():
    model = wide()
    compute_in_fp8(model, least=0)
    return model


def idle():
    """More experts than a micro-batch of one row has tokens: some are idle, others on each process."""
    model = hf_moe(num_experts=12, num_experts_per_tok=1, num_mtp_layers=1, tie_word_embeddings=True)
    model.set_experts_implementation("eager")  # which touches the others alone
    return model


def latent():
    return hf_moe_biased(attention_type="mla", num_key_value_heads=4, n_shared_experts=1, **LATENT)


def eager():
    model = hf_moe_biased()
    model.set_experts_implementation("eager")  # which autocasts, as the kernels do
    return model


def in_bfloat16():
    """For torchao's Adam, which compiles a step for each shape: here none is."""
    torch.compiler.set_stance("force_eager")
    return hf_moe_biased(num_experts=12).to(torch.bfloat16)


def with_kernels():
    """Only for a process of its own, in which nothing falls back any more."""
    model = hf_moe_biased()
    model.set_experts_implementation("hf_moe")
    experts.warn = no_fallback
    return model


def no_fallback(reason: str, other: str) -> None:
    raise AssertionError(f"{other} computes: the kernels {reason}")


# Name -> model, arguments of the run, the file that it saves.
CASES = {
    "biased": (hf_moe_biased, BIASED, "model.safetensors"),
    "adapter": (adapted, BIASED, "adapter_model.safetensors"),
    "esft": (some_experts, BIASED, "expert_rows.safetensors"),
    "bf16": (
        eager,
        BIASED | {"bf16": True, "save_strategy": "no", "gradient_checkpointing": True},
        "model.safetensors",
    ),
    "kernels": (with_kernels, BIASED | {"save_strategy": "no"}, "model.safetensors"),
    "held": (hf_moe_biased, BIASED | HELD, "model.safetensors"),
    "selective": (latent, BIASED | HELD | {"gradient_checkpointing": "selective"}, "model.safetensors"),
    "average": (hf_moe_biased, BIASED | {"ema_decay": DECAY}, AVERAGE_FILE),
    "muon": (hf_moe_biased, BIASED | {"optim": "muon"}, "model.safetensors"),
    "fp8": (in_fp8, BIASED | {"gradient_checkpointing": True}, "model.safetensors"),
    "8 bits": (in_bfloat16, BIASED | {"optim": "adamw_torch_8bit"}, "model.safetensors"),
    "idle": (idle, {"router_aux_loss_coef": 0.0, "accumulation": 16, "save_strategy": "no"}, "model.safetensors"),
}
RESUMED = ("biased", "fp8", "average", "adapter", "8 bits", "muon")


def run(name: str, folder: Path, processes: int, resume: str | None = None):
    build, arguments, _ = CASES[name]
    arguments = RUN | arguments | {"keep_folder": folder, "resume_from_checkpoint": resume}
    accumulation = arguments.pop("accumulation", 2)
    (_, trainer), forwards = forwards_of(train_one_step, build(), accumulation, processes, **arguments)
    held = name in ("held", "selective") and not trainer.is_deepspeed_enabled
    assert not held or forwards == RUN["max_steps"] * accumulation, f"{forwards} forwards"
    trainer.save_model(str(folder / "final"))
    if trainer.average is not None:
        save_average(trainer)
    return trainer


def found(trainer) -> dict:
    """What all processes must agree on, and one process must find too."""
    keys = ("loss", "grad_norm", "aux_loss", "z_loss", "router_load_max", "router_bias_range")
    history = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history[:-1]]
    return {"history": history, "biases": {name: x.tolist() for name, x in trainer.selection_bias.biases.items()}}


def on_cpu() -> None:
    """Let Accelerate shard over CPU processes, which it does for accelerators alone."""
    begin = PartialState.__init__

    def begin_as_gpu(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpu


def train_expert_parallel(folder: Path, case: str) -> None:
    """The experts split over the processes as Transformers loads the model, everything else sharded by FSDP2."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if PartialState().is_main_process:
        (wide() if case == "fp8" else hf_moe_biased()).save_pretrained(folder / "start")
    PartialState().wait_for_everyone()
    from hf_moe.kernels import expert_parallel as expert_parallel_kernels

    with sharding(partial(policy_of, device="cpu")) if case == "bf16" else nullcontext():
        model = whole_model(str(folder / "start"), **expert_parallel(2), experts_implementation="eager")
    if case == "fp8":
        compute_in_fp8(model, least=0)
    arguments = RUN | CASES[case][1] | {"keep_folder": folder, "save_strategy": "no"}
    asked, ask = [], expert_parallel_kernels.longest
    expert_parallel_kernels.longest = lambda *given: asked.append(ask(*given)) or asked[-1]
    _, trainer = train_one_step(model, arguments.pop("accumulation", 2), 2, **arguments)
    expert_parallel_kernels.longest = ask
    experts = model.model.layers[0].mlp.experts
    assert experts.num_experts == 3 and experts.down_proj.dtype == torch.float32
    trainer.save_model(str(folder / "final"))
    of_experts = _fsdp_param_group.FSDPParamGroup
    seen = [x for x in gc.get_objects() if isinstance(x, of_experts) and experts in x.modules]
    sent = [str(x.mp_policy.param_dtype) for x in seen]
    write(folder, found(trainer) | {"sent": sent, "asked": len(asked)})


def write(folder: Path, *results: dict) -> None:
    """What each process found, and more that only one is asked for."""
    every = [None, None]
    torch.distributed.all_gather_object(every, results[0])
    if torch.distributed.get_rank() == 0:
        folder.with_suffix(".json").write_text(json.dumps([*every, *results[1:]]))


@contextmanager
def counted_gathers() -> Iterator[Counter]:
    """How often weights are gathered, by the type that they travel in."""
    found, gather = Counter(), _fsdp_param_group.foreach_all_gather

    def counting(params, *args, **kwargs):
        found[str(params[0].param_dtype or params[0].orig_dtype)] += 1
        return gather(params, *args, **kwargs)

    _fsdp_param_group.foreach_all_gather = counting
    try:
        yield found
    finally:
        _fsdp_param_group.foreach_all_gather = gather


def main(folder: str, *names: str):
    on_cpu()
    folder = Path(folder)
    for name in names:
        with counted_gathers() as gathers:
            trainer = run(name, folder / name, processes=2)
        assert trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        results = [found(trainer) | {"gathers": gathers}]
        if name in RESUMED:
            resumed = run(name, folder / f"{name}-resumed", 2, resume=str(folder / name / "checkpoint-1"))
            results.append(found(resumed))
        write(folder / name, *results)
    if trainer.is_fsdp_enabled:
        for case in ("biased", "bf16", "held", "fp8"):
            train_expert_parallel(folder / f"expert_parallel_{case}", case)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
