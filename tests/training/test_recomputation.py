"""Selective recomputation changes no bit of a gradient, and computes again what it says alone."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hf_moe.training.trainers import holding
from hf_moe.training.trainers.refusals import check_rope
from hf_moe.training.weights.adapters import AdapterArguments, add_adapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_moe import HfMoeConfig
from hf_moe.kernels.recomputation import SELECTIVE, Selective, about_to_write
from hf_moe.sizes.activations import activation_bytes
from hf_moe.sizes.plan import Run, meta_model, plan

from .balance_worker import COEFFICIENTS, forwards_of, train_one_step
from .models import LATENT, collate, deepseek_v3, hf_moe, olmoe, qwen3_moe, rows
from .test_balance import EXPLORATION

MLA = {"attention_type": "mla", "num_key_value_heads": 4, **LATENT}
GROUPS = {"n_group": 3, "topk_group": 2}


def drawn(model, names: str):
    """Of such weights, which begin with 0."""
    for name, weight in model.named_parameters():
        if names in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def adapted():
    arguments = AdapterArguments(lora_parts=["attention", "shared_experts"], lora_r=4)
    return drawn(add_adapter(hf_moe(n_shared_experts=1, **MLA), arguments)[0], "lora_B")


MODELS = {
    "gqa": hf_moe,
    "dense, sandwich": lambda: hf_moe(mlp_layer_types=["dense", "sparse"], layer_norm_placement="sandwich"),
    "mla, shared, mtp": lambda: hf_moe(n_shared_experts=1, num_mtp_layers=1, **MLA),
    "biases": lambda: drawn(hf_moe(mlp_bias=True), "bias"),  # which grouped_mm adds in place
    "random": lambda: hf_moe(**EXPLORATION),
    "adapter": adapted,
    "olmoe": lambda: olmoe(**GROUPS),
    "qwen3_moe": lambda: qwen3_moe(**GROUPS),
    "deepseek_v3": deepseek_v3,
}


@pytest.fixture(autouse=True)
def much_memory(monkeypatch):
    """Whatever else this machine does."""
    monkeypatch.setitem(holding.FREE, "cpu", lambda device: 2**40)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_step_is_that_without_checkpointing_bit_for_bit(model, experts):
    """With all balance losses, over four micro-batches that are held."""

    def step(**arguments):
        torch.manual_seed(1)
        built = MODELS[model]()
        built.set_experts_implementation(experts)
        return forwards_of(train_one_step, built, 4, **COEFFICIENTS, **arguments)

    (expected, plain), _ = step()
    (gradient, trainer), forwards = step(activation_checkpointing=SELECTIVE)
    assert forwards == 4 and trainer.args.gradient_checkpointing == SELECTIVE
    assert gradient.keys() == expected.keys()
    assert all(torch.equal(gradient[name], value) for name, value in expected.items())
    assert trainer.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def backward(model, checkpointing) -> tuple[dict[str, torch.Tensor], Counter]:
    """Gradients, and the operators of the backward pass."""
    model.train().zero_grad()
    selective = Selective()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if checkpointing == SELECTIVE:
        selective.begin(model)
    batch = collate(rows(3))
    loss = model(**{name: batch[name][:, :3] for name in ("input_ids", "labels")}).loss  # 3 tokens, so without a mask
    with Counting() as counting:
        loss.backward()
    selective.end()
    model.gradient_checkpointing_disable()
    return {name: x.grad.clone() for name, x in model.named_parameters()}, counting.calls


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("build", "again"),
    [
        (lambda: hf_moe(n_shared_experts=1), 0),
        (lambda: hf_moe(n_shared_experts=1, **MLA), 2 * 2),  # q_b_proj and kv_b_proj of two layers
        (olmoe, 0),
        (deepseek_v3, 2 * 2),
    ],
    ids=["gqa", "mla", "olmoe", "deepseek_v3"],
)
def test_products_and_attention_are_computed_once(build, again):
    model = build()
    model.set_experts_implementation("grouped_mm")
    expected, plain = backward(model, False)
    gradients, calls = backward(model, SELECTIVE)
    _, full = backward(model, True)
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
    attention, grouped = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_grouped_mm"
    names = [name for name in ("aten::mm", attention, grouped, "transformers::grouped_mm_fallback") if name in full]
    assert len(names) > 1
    repeated = [calls[name] - plain[name] for name in names]
    assert repeated == [again] + [0] * (len(names) - 1)
    assert all(full[name] - plain[name] > count for name, count in zip(names, repeated, strict=True))
    assert calls["aten::rsqrt"] - plain["aten::rsqrt"] == full["aten::rsqrt"] > 0  # norms
    assert calls["aten::silu"] - plain["aten::silu"] == full["aten::silu"] > 0


class Doubled(torch.autograd.Function):
    """In place, unseen by torch."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        about_to_write(x)
        x.detach().numpy()[:] *= 2
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def test_what_a_kernel_writes_over_is_kept_as_it_was():
    """As Liger's RoPE, of what a projection gives."""
    layer, x = torch.nn.Linear(5, 3), torch.randn(7, 5)

    def forward(x):
        return Doubled.apply(layer(x)).sin()

    (expected,) = torch.autograd.grad(forward(x).sum(), layer.weight)
    output = checkpoint(forward, x, use_reentrant=False, context_fn=Selective().contexts)
    assert torch.equal(torch.autograd.grad(output.sum(), layer.weight)[0], expected)


def test_liger_in_other_models_is_refused():
    args = SimpleNamespace(gradient_checkpointing=SELECTIVE, use_liger_kernel=True)
    check_rope(SimpleNamespace(args=args, moe=hf_moe()))
    with pytest.raises(ValueError, match="Liger's RoPE writes over products of OlmoeForCausalLM unseen"):
        check_rope(SimpleNamespace(args=args, moe=olmoe()))


def test_attention_that_draws_random_numbers_is_computed_again():
    keeps, operator = Selective().keeps, torch.ops.aten._scaled_dot_product_flash_attention.default
    x = torch.zeros(1)
    assert keeps(operator, (x, x, x, 0.0), {}) and keeps(operator, (x, x, x), {"is_causal": True})
    assert not keeps(operator, (x, x, x, 0.1), {}) and not keeps(operator, (x, x, x), {"dropout_p": 0.1})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_enabled_anew_it_is_selective_and_in_the_end_it_is_not():
    """As TRL does around each generation."""
    model, selective, made = hf_moe().train(), Selective(), []
    contexts = selective.contexts
    selective.contexts = lambda: made.append(1) or contexts()
    ids = collate(rows(2))["input_ids"]
    model.activation_checkpointing_enable({"use_reentrant": False})
    selective.begin(model)
    model(ids)
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids)
    assert len(made) == 2 * 2
    selective.end()
    model(ids)
    assert len(made) == 2 * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_goes_back_once():
    model, selective = hf_moe().train(), Selective()
    model.activation_checkpointing_enable({"use_reentrant": False})
    selective.begin(model)
    loss = model(**collate(rows(2))).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can go back once, not twice"):
        loss.backward()
    selective.end()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_compile": True}, "selective, .* of which torch_compile makes others"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            "selective, which re-entrant checkpointing can",
        ),
        ({"activation_checkpointing": "some"}, "is 'some'; it can be true, false, selective"),
    ],
    ids=["compile", "reentrant", "unknown"],
)
def test_what_it_does_not_go_with(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        train_one_step(hf_moe(router_aux_loss_coef=0.0), 4, **{"activation_checkpointing": SELECTIVE} | arguments)
    assert "\n" not in str(error.value)


# ---- memory ----


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("changes", [{"n_shared_experts": 1}, {"qk_norm": "head"}], ids=["shared", "norms"])
def test_plan_counts_what_a_forward_keeps(changes):
    """Of each layer its input and what is kept."""

    def kept(layers: int) -> tuple[int, int]:
        model, selective, modes = hf_moe(num_hidden_layers=layers, **changes).train(), Selective(), []
        model.set_experts_implementation("grouped_mm")
        contexts = selective.contexts
        selective.contexts = lambda: (modes.append(found := contexts()), found)[1]
        model.activation_checkpointing_enable({"use_reentrant": False})
        selective.begin(model)
        states = model.model(torch.randint(1, 61, (3, 8)), use_cache=False).last_hidden_state
        batch = {"per_device_train_batch_size": 3, "max_length": 8}
        run = Run(bf16=False, gradient_checkpointing=SELECTIVE, experts_implementation="grouped_mm", **batch)
        planned = plan(model.config, run)["memory_per_gpu"]["activations"]
        storages = {id(x): x.nbytes() for mode, _ in modes for x in mode.storages().values()}
        return planned, sum(storages.values()) + layers * states.nbytes

    one, two = kept(1), kept(2)
    assert two[0] - one[0] == pytest.approx(two[1] - one[1], rel=0.02)


def layer_bytes(checkpointing, dtype: str, bf16: bool) -> int:
    """Bytes of one more of DeepSeek-V2-Lite's layers."""

    def decoder(layers: int) -> int:
        config = HfMoeConfig.from_preset("deepseek-v2-lite")
        few = {"num_hidden_layers": layers, "mlp_layer_types": ["sparse"] * layers, "vocab_size": 64}
        few |= {"layer_types": config.layer_types[:layers], "pad_token_id": None}
        model = meta_model(HfMoeConfig(**config.to_dict() | few), dtype)
        return activation_bytes(model, 1, 2048, bf16, checkpointing, "hf_moe", copies=True).kept

    return decoder(2) - decoder(1)


@pytest.mark.parametrize(("dtype", "bf16"), [("float32", True), ("bfloat16", False)])
def test_it_has_40_percent_of_what_full_checkpointing_saves(dtype, bf16):
    none, selective, full = (layer_bytes(kind, dtype, bf16) for kind in (False, SELECTIVE, True))
    assert none - selective > 0.4 * (none - full)
