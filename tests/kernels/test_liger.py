"""Liger's kernels in the place of our modules' methods, forward and backward, and as the Trainer's switch."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

from transformers.integrations.liger import apply_liger_kernel

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.kernels import liger
from hf_moe.model.attention import HfMoeAttention
from tests.kernels.conftest import DEVICE

SIZES = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 5, "num_experts_per_tok": 2}
MODELS = {
    "norms of heads, soft-cap": {"num_key_value_heads": 2, "qk_norm": "projection", "final_logit_softcapping": 5.0},
    "Gemma's norms, scaled logits": {"rms_norm_unit_offset": True, "logits_scaling": 3.0, "qk_norm": "head"},
}


def gradients(model, ids, labels):
    loss = model.train()(input_ids=ids, labels=labels, use_cache=False).loss
    parameters = dict(model.named_parameters())
    return loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.gpu  # Liger's kernels are none for Triton's interpreter
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_the_modules(fields):
    torch.manual_seed(0)
    model = HfMoeForCausalLM(HfMoeConfig(**SIZES, initializer_range=0.2, **fields)).to(DEVICE)
    ids = torch.randint(0, 37, (2, 9), device=DEVICE)
    labels = ids.masked_fill(torch.rand(2, 9, device=DEVICE) < 0.3, -100)
    loss, expected = gradients(model, ids, labels)
    liger.register()
    apply_liger_kernel(model, None)
    fused_loss, actual = gradients(model, ids, labels)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
    assert model(input_ids=ids, labels=labels, use_cache=False).logits is None
    assert model.eval()(input_ids=ids, labels=labels).logits.shape == (2, 9, 37)


def test_what_liger_cannot_compute_stays():
    config = HfMoeConfig(**SIZES, rope_interleave=True, router_type="reinforce")
    model = HfMoeForCausalLM(config)
    liger.apply_liger_kernel_to_hf_moe(model, rms_norm=False)
    assert "predict" not in vars(model)
    attention = [module for module in model.modules() if type(module) is HfMoeAttention]
    assert attention and not any("rotated" in vars(module) for module in attention)
