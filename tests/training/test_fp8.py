"""FP8 in recipes: what computes in it, what is refused, and runs on a CPU by the kernels' definition."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from hf_moe.training.main import main
from hf_moe.training.weights.adapters import AdapterArguments, adapted_weights, add_adapter
from hf_moe.training.weights.fp8 import check_fp8, check_sizes, compute_in_fp8, weights_in_fp8
from hf_moe.training.weights.merging import merge_adapter
from safetensors.torch import load_file
from torch import nn

from hf_moe import HfMoeConfig, HfMoeForCausalLM, MoeTrainer, MoeTrainingArguments
from hf_moe.kernels.copies import HOLDERS
from hf_moe.kernels.fp8 import copies, eager
from hf_moe.kernels.fp8.linear import Fp8Linear

from .conftest import SIZES, tiny_tokenizer, write_rows
from .models import deepseek_v3, hf_moe, olmoe, qwen3_moe

WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
MODELS = {
    "hf_moe": lambda: hf_moe(n_shared_experts=1, **WIDE),
    "olmoe": lambda: olmoe(**WIDE),
    "deepseek_v3": lambda: deepseek_v3(**WIDE),
    "qwen3_moe": lambda: qwen3_moe(**WIDE),
}
IDS = torch.arange(3, 33).view(2, 15)


@pytest.mark.parametrize("name", MODELS)
def test_what_computes_in_fp8_is_near_and_all_of_it_is_said(name, monkeypatch):
    model, plain = MODELS[name](), MODELS[name]()
    said = compute_in_fp8(model, least=0)
    assert "\n" not in said and "embeddings, norms, routers, head, attention's own products" in said
    assert model.state_dict().keys() == plain.state_dict().keys()
    held = {id(x) for x in weights_in_fp8(model)}
    named = {key: id(x) in held for key, x in model.named_parameters()}
    assert f"{sum(x.numel() for x in model.parameters() if id(x) in held):,} of " in said
    for key, in_fp8 in named.items():
        kind = type(model.get_submodule(key.rpartition(".")[0]))
        assert in_fp8 == (kind is Fp8Linear or (".experts." in key and kind is not nn.Linear)), key
        assert not in_fp8 or not any(part in key for part in ("lm_head", "embed", "norm", ".gate."))
    seen = []
    quantised = copies.quantised
    monkeypatch.setattr(copies, "quantised", lambda weight: seen.append(id(weight)) or quantised(weight))
    losses = [x(IDS, labels=IDS).loss for x in (model, plain)]
    assert set(seen) == held
    assert losses[0].item() != losses[1].item() and losses[0].item() == pytest.approx(losses[1].item(), rel=0.1)
    for loss in losses:
        loss.backward()
    for (key, x), y in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert x.grad.dtype == x.dtype and (x.grad is None) == (y.grad is None), key


def test_biases_stay_and_are_said():
    said = compute_in_fp8(hf_moe(mlp_bias=True, **WIDE), least=0)
    assert "fp8 products with 8 matrices of attention: " in said
    assert said.endswith("4 matrices of routed_experts (the kernels have no biases)")


def test_small_linear_layers_stay_and_are_said():
    model = olmoe(**WIDE)
    said = compute_in_fp8(model)
    assert {x.dim() for x in weights_in_fp8(model)} == {3}
    assert said.endswith(
        " matrices of attention (a linear layer of fewer than 16,777,216 numbers takes longer in FP8 than in bf16)"
    )
    large = model.model.layers[0].self_attn.q_proj.weight.numel()
    compute_in_fp8(model, least=large)
    assert {x.dim() for x in weights_in_fp8(model)} == {2, 3}


def test_a_dense_model_of_small_layers_is_refused():
    with pytest.raises(ValueError, match="needs 16,777,216 numbers or more to gain from it: leave fp8 out"):
        compute_in_fp8(hf_moe(mlp_layer_types=["dense", "dense"], **WIDE))


def test_an_adapter_is_not_quantised():
    """Beside a linear layer, as a module's and as a parameter's, and beside experts."""
    model = hf_moe(n_shared_experts=1, mlp_layer_types=["dense", "sparse"], **WIDE)
    compute_in_fp8(model, least=0)
    parts = ["attention", "dense_mlp", "shared_experts", "routed_experts"]
    adapted, _ = add_adapter(model, AdapterArguments(lora_parts=parts, lora_r=3))
    assert len(weights_in_fp8(adapted)) == 8 + 3 + 3 + 2
    before = adapted(IDS).logits
    for name, x in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(x, std=1e-3)
    factors = {}
    for name, layer in adapted_weights(adapted).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors[name] = a.detach(), b.detach().clone(), layer.scaling["default"]

    x = torch.randn(7, 128)
    a, b, scaling = factors["model.layers.0.mlp.down_proj.weight"]
    layer = model.model.layers[0].mlp.down_proj
    change = scaling * (x @ a.T @ b.T)  # which is less than a step of what it changes
    torch.testing.assert_close(layer(x), eager.Linear.apply(x, layer.get_base_layer().weight) + change)

    a, b, scaling = factors["model.layers.1.mlp.experts.down_proj"]
    index, weights, experts = torch.tensor([[0, 4]] * 7), torch.rand(7, 2), model.model.layers[1].mlp.experts
    with torch.no_grad():
        whole = experts(x, index, weights)
        layer = adapted_weights(adapted)["model.layers.1.mlp.experts.down_proj"]
        layer.lora_B["default"].weight.zero_()
        without = experts(x, index, weights)
        layer.lora_B["default"].weight.copy_(b)
    assert 0 < (whole - without).abs().max() < 0.01 * whole.abs().max()

    logits = adapted(IDS).logits
    assert not torch.equal(logits, before)
    logits.square().mean().backward()
    assert all((x.grad is not None) == ("lora_" in name) for name, x in adapted.named_parameters())
    assert all(x.grad.any() for name, x in adapted.named_parameters() if "lora_" in name)
    merged, _ = merge_adapter(adapted, torch.float32, [{"input_ids": IDS}])
    assert (merged(IDS).logits - logits).norm() < 0.2 * logits.norm()


def train(folder, fp8=True, **changes):
    torch.manual_seed(0)
    sizes = {**SIZES, **WIDE, "num_attention_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    model = HfMoeForCausalLM(HfMoeConfig(**sizes))
    if fp8:
        compute_in_fp8(model, least=0)
    ids = torch.randint(3, 40, (24, 12), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "bf16": True, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    args = MoeTrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        **options | changes,
    )
    trainer = MoeTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(one, other) -> None:
    for (name, x), y in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(x, y[1]), name


def test_learns_as_bf16_does(tmp_path):
    options = {"max_steps": 30, "learning_rate": 3e-4}
    (_, in_fp8), (_, in_bf16) = (train(tmp_path / str(x), x, **options) for x in (True, False))
    assert in_bf16[-1] < 0.9 * in_bf16[0]
    assert in_fp8 != in_bf16
    for one, other in zip(in_fp8, in_bf16, strict=True):
        assert one == pytest.approx(other, rel=3e-3)


def test_weights_are_not_held_for_one_forward_and_backward(tmp_path, monkeypatch):
    monkeypatch.setattr(copies.BlockCopies, "of", lambda *args: pytest.fail("held a weight"))
    train(tmp_path, gradient_accumulation_steps=1, max_steps=1)


def test_weights_are_quantised_once_a_step(tmp_path, monkeypatch):
    """Whatever the micro-batches, and layers that are computed again; that changes no bit of the run."""
    made = []
    quantised = copies.quantised
    monkeypatch.setattr(copies, "quantised", lambda weight: made.append(weight.shape) or quantised(weight))
    once, losses = train(tmp_path / "once", gradient_checkpointing=True)
    assert len(made) == 3 * len(weights_in_fp8(once.model)) and not HOLDERS and not copies.HELD
    made.clear()
    monkeypatch.setattr("hf_moe.training.trainers.trainer.block_copies_of", lambda trainer: None)
    often, others = train(tmp_path / "often", gradient_checkpointing=True)
    assert len(made) >= 2 * 2 * 3 * len(weights_in_fp8(once.model)) and losses == others
    same_weights(once, often)


@pytest.fixture(params=[False, True], ids=["definition", "kernels"])
def by_kernels(request, monkeypatch):
    """On a CPU kernels run in Triton's interpreter, which can multiply codes, not bfloat16."""
    if request.param:
        pytest.importorskip("triton")
        from tests.kernels.fp8.conftest import convert_by_torch

        monkeypatch.setattr("hf_moe.kernels.fp8.operators.computes", lambda x: True)
        monkeypatch.setattr("triton.runtime.interpreter._convert_float", convert_by_torch)
        return {"max_steps": 1, "bf16": False, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
    return {}


@pytest.mark.parametrize("kind", [True, "selective"], ids=["full", "selective"])
def test_layers_computed_again_train_bitwise_the_same(tmp_path, kind, by_kernels):
    plain, losses = train(tmp_path / "plain", **by_kernels)
    again, others = train(tmp_path / "again", gradient_checkpointing=kind, **by_kernels)
    assert losses == others
    same_weights(plain, again)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    sizes = {**SIZES, **WIDE, "num_attention_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    torch.manual_seed(0)
    HfMoeForCausalLM(HfMoeConfig(**sizes)).save_pretrained(folder / "model")
    HfMoeForCausalLM(HfMoeConfig(**sizes | {"hidden_size": 136})).save_pretrained(folder / "ragged")
    HfMoeForCausalLM(HfMoeConfig(**sizes | {"moe_intermediate_size": 80})).save_pretrained(folder / "narrow")
    for name in ("model", "ragged", "narrow"):
        tiny_tokenizer().save_pretrained(folder / name)
    texts = [{"text": f"{word} " * 9} for word in ("red", "green", "blue", "white")]
    write_rows(folder / "train.jsonl", texts)
    return folder


RUN = ["--eval_data=null", "--train_tokens=1024", "--batch_tokens=256", "--per_device_train_batch_size=2"]
RUN += ["--save_steps=2", "--learning_rate=1e-3", "--ema_decay=null"]


def command(places, output, *extra, model="model"):
    if "--lora_base=fp8" in extra:
        given = {"model_name_or_path": places / model, "train_data": places / "train.jsonl", "eval_data": "null"}
        return ["tiny/sft", f"--output_dir={output}", *(f"--{x}={y}" for x, y in given.items()), *extra]
    return [
        "tiny/continue",
        *RUN,
        *(f"--model_name_or_path={places / model}", f"--train_data={places / 'train.jsonl'}"),
        *(f"--output_dir={output}", *extra),
    ]


@pytest.fixture
def on_a_card(monkeypatch):
    """The check of the card alone is left out, and linear layers need not be large."""
    monkeypatch.setattr("hf_moe.training.stages.loading.check_fp8", lambda device: None)
    monkeypatch.setattr("hf_moe.training.stages.loading.compute_in_fp8", partial(compute_in_fp8, least=0))


def test_a_resumed_run_ends_bitwise_and_one_in_another_precision_is_refused(places, tmp_path, on_a_card, capsys):
    main(command(places, tmp_path / "whole", "--fp8=true"))
    assert (
        "fp8 products with 12 matrices of attention, 3 matrices of dense_mlp, 4 matrices of" in capsys.readouterr().err
    )
    resume = f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-2'}"
    main(command(places, tmp_path / "again", "--fp8=true", resume))
    whole, again = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "again"))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    assert "quantization_config" not in (tmp_path / "whole" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"checkpoint-2 is of a run with fp8 True \(now False\)"):
        main(command(places, tmp_path / "other", resume))


def test_random_weights_are_trained_in_fp8_too(places, tmp_path, on_a_card, capsys):
    extra = ["--from_scratch=true", "--fp8=true", "--train_tokens=256"]
    main(command(places, tmp_path / "out", *extra))
    assert "fp8 products with 12 matrices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "model", "named"),
    [
        ([], "ragged", "hidden_size is 136"),
        ([], "narrow", r"model.layers.1.mlp.experts have sizes that are multiples of 128, not inner size 80"),
        (["--float8=true"], "model", "fp8 and float8 are both true"),
        (["--lora_parts=attention", "--lora_base=fp8"], "model", "fp8 is true and lora_base fp8"),
        (["--experts_implementation=grouped_mm"], "model", "experts_implementation grouped_mm, which has no FP8"),
    ],
    ids=["hidden", "inner", "float8", "lora_base", "experts"],
)
def test_what_cannot_be_is_refused_before_loading(places, tmp_path, on_a_card, monkeypatch, extra, model, named):
    monkeypatch.setattr("hf_moe.training.stages.loading.check_float8", lambda device: None)
    monkeypatch.setattr("hf_moe.training.stages.loading.whole_model", None)  # would fail
    with pytest.raises(ValueError, match=named) as error:
        main(command(places, tmp_path / "out", "--fp8=true", *extra, model=model))
    assert "\n" not in str(error.value)


def test_a_card_is_needed(places, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.training.stages.loading.whole_model", None)
    with pytest.raises(ValueError, match=r"compute capability 9\.0 \(Hopper\) or more; this is a CPU"):
        main(command(places, tmp_path / "out", "--fp8=true"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    with pytest.raises(ValueError, match=r"9\.0 \(Hopper\) or more; this is compute capability 8\.9"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr("hf_moe.training.weights.fp8.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton: pip install"):
        check_fp8(torch.device("cuda"))


def test_sizes_are_seen_without_weights():
    with torch.device("meta"):
        check_sizes(olmoe(**WIDE))
        with pytest.raises(ValueError, match="hidden_size is 32"):
            check_sizes(olmoe())
