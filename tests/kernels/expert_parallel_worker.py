"""Run by torchrun on two processes: models whose experts are spread over both against the whole ones.

The processes have rows of different lengths.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_moe  # noqa: F401
from hf_moe.kernels import experts
from tests.processes import leave

LENGTHS = (7, 3)
# Model -> implementations of its experts, with activation checkpointing or without.
CASES = {
    "hf_moe": [("eager", False), ("hf_moe", True)],
    "top-1": [("eager", False)],
    "idle": [("eager", True), ("hf_moe", False)],
    "olmoe": [("eager", True), ("hf_moe", False)],
    "qwen3_moe": [("grouped_mm", False)],
}


def refused(*args):
    raise AssertionError("Transformers' all-to-all, or another kernel, computes")


def run(model, rows: list[torch.Tensor], checkpointing: bool) -> dict[str, torch.Tensor]:
    """Logits, the mean of the rows' losses and its gradients, as one process computes them or two a row each."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = []
    for ids in rows:
        out = model(ids, labels=ids)
        (out.loss / len(rows)).backward()
        losses.append(out.loss.detach())
    found = {"loss": losses[0]} | {name: whole(x.grad) for name, x in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        return found | {"logits": model(rows[0]).logits}


def whole(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def difference(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Relative to the largest; no gradient is one of zero."""
    if expected is None or not expected.any():
        return 0.0 if actual is None else actual.abs().max().item()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def main(folder: str):
    from transformers.distributed.expert_parallel import AllToAllEP  # since 5.23

    AllToAllEP.__call__ = refused
    experts.warn = refused
    folder, rank = Path(folder), int(os.environ["RANK"])
    rows = [torch.arange(1 + i, 1 + i + length)[None] for i, length in enumerate(LENGTHS)]
    own_first = [rows[rank], rows[1 - rank]]
    differences = {}
    for name, cases in CASES.items():
        for implementation, checkpointing in cases:
            given = {"experts_implementation": implementation}
            expected = run(AutoModelForCausalLM.from_pretrained(folder / name, **given), own_first, checkpointing)
            spread = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="hf_moe")
            model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=spread, **given)
            actual = run(model, own_first[:1], checkpointing)
            worst = {key: difference(actual[key], x) for key, x in expected.items()}
            every = [None, None]
            torch.distributed.all_gather_object(every, worst)
            differences[f"{name}-{implementation}"] = {key: max(each[key] for each in every) for key in worst}
    leave(differences)


if __name__ == "__main__":
    main(*sys.argv[1:])
