"""LoRA on fused experts as two products of its rank, against dense algebra and against PEFT's own sum of weights."""

from functools import partial

import pytest
import torch

from hf_moe.kernels import experts as implementation
from hf_moe.kernels.formula import Formula
from hf_moe.kernels.low_rank import Factors, lowered, widened
from hf_moe.kernels.operators import experts as operator

from . import reference

FORMULAS = {
    "gated": Formula("silu"),
    "plain": Formula("gelu", gated=False),
    "transposed": Formula("silu", transposed=True),
    "interleaved": Formula("quick_gelu", True, True, True, 0.5, 1.0),
}


def ours(x, index, weights, up, down, a1, b1, a2, b2, formula):
    of_up, of_down = Factors(a1, b1), Factors(a2, b2)
    low = None if a1 is None else lowered(x, of_up)
    beside = None if a2 is None else partial(widened, index=index, factors=of_down)
    return operator(x, index, weights, up, down, None, None, low, b1, a2, *formula, True, beside=beside)


def dense(x, index, weights, up, down, a1, b1, a2, b2, formula):
    """With the weights that the factors stand for."""
    added = [None if a is None else (b @ a).mT if formula.transposed else b @ a for a, b in ((a1, b1), (a2, b2))]
    up, down = (w if add is None else w + add for w, add in zip((up, down), added, strict=True))
    return reference.experts(x, index, weights, up, down, *[None] * 5, *formula)


def problem(device, formula, T=9, K=2, D=20, inner=12, E=4, rank=3, elsewhere=False, dtype=torch.float32):
    torch.manual_seed(0)
    U = 2 * inner if formula.gated else inner
    shapes = {"x": (T, D), "weights": (T, K), "up": (E, U, D), "down": (E, D, inner)}
    if formula.transposed:
        shapes |= {"up": (E, D, U), "down": (E, inner, D)}
    shapes |= {"a1": (E, rank, D), "b1": (E, U, rank), "a2": (E, rank, inner), "b2": (E, D, rank)}
    index = torch.rand(T, E).argsort(-1)[:, :K]
    if elsewhere:
        index[::2, 0] = E
    tensors = {name: (torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype) for name, shape in shapes.items()}
    return tensors, index.to(device)


def run(function, tensors, index, formula, trained, dtype=None):
    leaves = {name: x.detach().clone().to(dtype or x.dtype) for name, x in tensors.items()}
    for name in trained:
        leaves[name].requires_grad_()
    names = ("up", "down", "a1", "b1", "a2", "b2")
    output = function(leaves["x"], index, leaves["weights"], *(leaves.get(name) for name in names), formula)
    direction = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    gradients = torch.autograd.grad((output.float() * direction).sum(), [leaves[name] for name in trained])
    return {"output": output} | dict(zip(trained, gradients, strict=True))


def compare(tensors, index, formula, trained, tolerance=1e-5):
    actual = run(ours, tensors, index, formula, trained)
    for name, expected in run(dense, tensors, index, formula, trained, torch.float32).items():
        error = (actual[name].float() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: {error:.2e}"


ADAPTER = ("x", "weights", "a1", "b1", "a2", "b2")


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("rank", [1, 3, 16, 21])
def test_output_and_gradients(device, name, rank):
    tensors, index = problem(device, FORMULAS[name], rank=rank)
    compare(tensors, index, FORMULAS[name], ADAPTER)


def test_experts_elsewhere_and_trained_weights(device):
    tensors, index = problem(device, FORMULAS["gated"], elsewhere=True)
    compare(tensors, index, FORMULAS["gated"], (*ADAPTER, "up", "down"))


@pytest.mark.parametrize("left", ["a1 b1", "a2 b2"])
def test_one_of_the_weights_alone(device, left):
    tensors, index = problem(device, FORMULAS["gated"])
    tensors = {name: x for name, x in tensors.items() if name not in left.split()}
    compare(tensors, index, FORMULAS["gated"], [name for name in ADAPTER if name in tensors])


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_large_tiles(device, rank, dtype):
    tensors, index = problem(device, FORMULAS["gated"], 3000, 2, 320, 256, 5, rank, dtype=dtype)
    compare(tensors, index, FORMULAS["gated"], ADAPTER, 3e-2 if dtype == torch.bfloat16 else 1e-5)


def adapted(make, device):
    """A model with an adapter on its experts that is not at its beginning, where B is 0."""
    peft, host_trl = pytest.importorskip("peft"), pytest.importorskip("hf_moe.training.host_trl")
    torch.manual_seed(0)
    model = make().to(device)
    targets = sorted({n.split("layers.")[1].split(".", 1)[1] for n, x in model.named_parameters() if x.dim() == 3})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(model, config)
    host_trl.add_beside(model)
    for name, x in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, std=0.1)
    return model


def hf_moe_model():
    from tests.training.models import hf_moe

    return hf_moe()


def olmoe_model():
    from tests.training.models import olmoe

    return olmoe()


def gpt_oss_model():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, layer_types=["full_attention"] * 2))


@pytest.mark.parametrize("make", [hf_moe_model, olmoe_model, gpt_oss_model])
def test_pefts_adapter_is_never_as_large_as_the_weights(make, device, monkeypatch):
    from peft.tuners.lora import layer

    model = adapted(make, device)
    ids = torch.arange(1, 23, device=device).view(2, 11)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    def results(name):
        model.get_base_model().set_experts_implementation(name)
        logits = model(input_ids=ids).logits
        return logits, torch.autograd.grad(logits.square().sum(), list(trained.values()))

    expected, expected_gradients = results("eager")
    monkeypatch.setattr(layer.ParamWrapper, "_activate_lora", lambda *args: pytest.fail("makes sums of all experts"))
    monkeypatch.setattr(implementation, "warn", lambda *args: pytest.fail(str(args)))
    for name in ("hf_moe", "auto"):
        logits, gradients = results(name)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for path, actual, wanted in zip(trained, gradients, expected_gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, path=path: path + text)


def test_two_adapters_are_summed_as_peft_does(device):
    model = adapted(olmoe_model, device)
    model.add_adapter("second", model.peft_config["default"])
    for name, x in model.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(x, std=0.1)
    model.base_model.set_adapter(["default", "second"])
    ids = torch.arange(1, 12, device=device)[None]
    found = []
    for name in ("eager", "hf_moe"):
        model.get_base_model().set_experts_implementation(name)
        found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
