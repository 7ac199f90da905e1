"""Experts spread over two CPU processes, their tokens gathered: logits, losses and gradients of one process."""

import pytest
import torch
from transformers import OlmoeConfig, Qwen3MoeConfig

from tests.conftest import since, tiny_model
from tests.processes import on_two_processes
from tests.training.models import SIZES, OlmoeForCausalLM, Qwen3MoeForCausalLM, build

from .expert_parallel_worker import CASES

EVEN = {"vocab_size": 98, "num_experts": 6, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}
TWO = SIZES | {"num_experts": 6}


def idle():
    """Experts of which the second process has none that a token chooses."""
    biased = {"router_type": "sigmoid_topk", "router_args": {"selection_bias": True}, "num_experts_per_tok": 2}
    model = tiny_model(**EVEN, **biased)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0]))
    return model


MODELS = {
    "hf_moe": lambda: tiny_model(**EVEN, n_shared_experts=1, mlp_bias=True),
    "top-1": lambda: tiny_model(**EVEN, num_experts_per_tok=1),
    "idle": idle,
    "olmoe": lambda: build(OlmoeForCausalLM, OlmoeConfig(**TWO)),
    "qwen3_moe": lambda: build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**TWO, head_dim=8)),
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    return on_two_processes("kernels/expert_parallel_worker.py", str(folder))


@since(23, "no such dispatch can be registered")
@pytest.mark.parametrize("case", [f"{name}-{how}" for name, cases in CASES.items() for how, _ in cases])
def test_equals_one_process(differences, case):
    found = differences[case]
    assert found == pytest.approx(dict.fromkeys(found, 0), abs=1e-5)


@since(23, "no such dispatch can be registered")
@pytest.mark.parametrize(
    ("own", "most", "least", "agreed"),
    [
        ([100, 95], 98, 92, 100),
        ([90], 100, 90, 100),
        ([89], 100, 95, None),  # a tenth of what it computes would be filling
        ([100], 100, 50, None),
        ([], 100, 100, None),
    ],
)
def test_ranks_agree_on_a_length_that_none_is_far_from(monkeypatch, own, most, least, agreed):
    from hf_moe.kernels import expert_parallel

    def with_another(ends: torch.Tensor, op, group) -> None:
        ends.copy_(torch.maximum(ends, torch.tensor([most, -least])))

    monkeypatch.setattr(expert_parallel.dist, "all_reduce", with_another)
    monkeypatch.setattr(expert_parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(expert_parallel, "on_hosts", lambda *ranks: None)
    lengths = expert_parallel.Lengths()
    lengths.agree(own)
    assert lengths.agreed == agreed
    lengths.forget()
    assert lengths.agreed is None
