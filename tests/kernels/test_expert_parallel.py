"""Ranks agree once a step how far they fill up their tokens; tests/training/test_parallel.py trains so."""

import pytest
import torch

pytest.importorskip("transformers.distributed.expert_parallel", reason="since Transformers 5.23")
from hf_moe.kernels import expert_parallel


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
