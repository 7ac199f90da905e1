"""Routed experts that work in fewer dimensions than the model: the formula, all ways to compute them, decoding."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_moe import HfMoeForCausalLM
from tests.conftest import tiny_config, tiny_model, tokens
from tests.model.test_experts import block, loop

LATENT = {"moe_latent_size": 20}
VARIANTS = {
    "alone": {},
    "shared": {"n_shared_experts": 1, "router_type": "sigmoid_topk", "router_args": {"selection_bias": True}},
    "input scaling": {"expert_input_scaling": True},
    "multi-token": {"num_mtp_layers": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
}


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_stand_between_two_projections(shared, dtype):
    moe = block("gated-bias", dtype, n_shared_experts=shared, **LATENT)
    x = torch.randn(2, 5, 48, dtype=dtype)
    rows = x.view(10, 48)
    _, weights, index, *_ = moe.gate(rows)  # of what the model has, not of what the experts read
    latent = rows.double() @ moe.fc1_latent_proj.weight.double().T
    expected = loop(moe, latent, index, weights) @ moe.fc2_latent_proj.weight.double().T
    if shared:
        expected += moe.shared_experts(rows).double()
    assert moe.experts.down_proj.shape == (7, 20, moe.experts.intermediate_dim)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    scale = expected.abs().max()
    torch.testing.assert_close(moe(x).view(10, 48).double() / scale, expected / scale, **tolerance)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "hf_moe"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_implementation_computes_the_same(variant, experts):
    if experts == "hf_moe" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before torch")
    model, ids, found = tiny_model(**LATENT | VARIANTS[variant]).train(), tokens(2, 7), {}
    for name in ("eager", experts):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"logits": out.logits.detach()} | gradients
    assert any("fc1_latent_proj" in name for name in found["eager"])
    assert found[experts].keys() == found["eager"].keys()
    for name, expected in found["eager"].items():
        torch.testing.assert_close(found[experts][name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decodes_with_a_cache_as_without_and_loads_as_it_was_saved(variant, tmp_path):
    model, ids = tiny_model(**LATENT | VARIANTS[variant]), tokens(2, 8)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = [model.generate(ids, use_cache=used, **options) for used in (True, False)]
    assert torch.equal(*texts)
    model.save_pretrained(tmp_path)
    again = HfMoeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_padding_changes_nothing():
    model, ids = tiny_model(**LATENT, n_shared_experts=1), tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    beside = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    torch.testing.assert_close(beside, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match=r"moe_latent_size \(0\) must be above 0, or None"):
        tiny_config(moe_latent_size=0)
    with pytest.raises(ValueError, match=r"moe_latent_size \(21\) in torch.float32 is no multiple of 16 bytes"):
        tiny_model(moe_latent_size=21).set_experts_implementation("grouped_mm")
