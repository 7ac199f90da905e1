"""Routers of a user's own on a GPU: the recorded step, and the kernels with empty slots, beside the plain ones."""

import pytest
import torch

from tests.conftest import tokens
from tests.plugins.test_model import own_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 3])
def test_a_recorded_text_is_the_plain_one(router_type, rows):
    model = own_model(router_type).to("cuda")
    model.set_experts_implementation("grouped_mm")
    ids = tokens(rows, 6).to("cuda")
    options = {"max_new_tokens": 20, "do_sample": False}
    recorded = model.generate(ids, **options)
    plain = model.generate(ids, disable_compile=True, **options)
    assert torch.equal(recorded, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_pass_over_empty_slots(router_type, dtype):
    model, ids, found = own_model(router_type).to("cuda", dtype).train(), tokens(2, 90).to("cuda"), {}
    for name in ("eager", "hf_moe"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found[name] = {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}
    for name, expected in found["eager"].items():
        close = 1e-3 if dtype == torch.float32 else 0.05
        assert (found["hf_moe"][name] - expected).norm() <= close * expected.norm() + 1e-6, name
