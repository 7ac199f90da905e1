"""LoRA: what it reaches, what PEFT would have missed, and a run from recipe to merged model."""

import json

import pytest
import torch
from hf_moe.training.balance.selection_bias import BIAS_FILE, load_router_bias
from hf_moe.training.main import main
from hf_moe.training.weights.adapters import (
    LORA_PARTS,
    AdapterArguments,
    adapted_weights,
    add_adapter,
    check_adapter_arguments,
    check_coverage,
)
from hf_moe.training.weights.groups import part_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from hf_moe import HfMoeConfig, HfMoeForCausalLM

from .balance_worker import train_one_step
from .conftest import SIZES as TINY
from .conftest import tiny_tokenizer
from .models import BIASED, SIZES, build, deepseek_v3, hf_moe, mixtral, olmoe

ALL_PARTS = {"mlp_layer_types": ["dense", "sparse"], "n_shared_experts": 1}


def qwen2_moe():
    sizes = {"num_experts": 6, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
    return build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**SIZES, **sizes))


MODELS = {
    "hf_moe": (lambda: hf_moe(**ALL_PARTS, shared_expert_gate=True, mlp_bias=True, attention_bias=True), LORA_PARTS),
    "hf_moe-moa": (lambda: hf_moe(attention_type="moa", num_attention_heads=2), ("attention",)),
    "deepseek_v3": (lambda: deepseek_v3(first_k_dense_replace=1), LORA_PARTS),
    "qwen2_moe": (qwen2_moe, LORA_PARTS),
    "mixtral": (mixtral, ("attention", "routed_experts")),
    "olmoe": (olmoe, ("attention", "routed_experts")),
}


def arguments(*parts, **changes) -> AdapterArguments:
    return AdapterArguments(lora_parts=list(parts), **{"lora_r": 3, "lora_alpha": 6, **changes})


def matrices(model, parts) -> set[str]:
    """Every matrix of the parts, found by the tensors' shapes alone."""
    vectors = ("bias", "norm.weight", "sinks")
    return {
        name
        for name, x in model.named_parameters()
        if part_of(name) in parts and not name.endswith(vectors) and 1 not in x.shape
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_every_part_is_reached_and_learns(name):
    """After two steps every A and B has moved, and nothing of the model's own."""
    make, parts = MODELS[name]
    model = make()
    expected, before = matrices(model, parts), {key: x.clone() for key, x in model.state_dict().items()}
    adapted, covered = add_adapter(model, arguments(*parts))
    assert adapted_weights(adapted).keys() == expected
    for part in parts:
        assert f"{len(matrices(make(), [part]))} matrices of {part}" in covered
    start = {key: x.detach().clone() for key, x in adapted.named_parameters()}
    train_one_step(adapted, 2, max_steps=2, learning_rate=1e-2, router_bias_update_speed=0.0)
    moved = {key for key, x in adapted.named_parameters() if not torch.equal(x, start[key])}
    assert moved == {key for key in start if "lora_" in key} and len(moved) == 2 * len(expected)
    merged = adapted.unload().state_dict()
    assert merged.keys() == before.keys() and all(torch.equal(merged[key], x) for key, x in before.items())


@pytest.mark.parametrize("part", LORA_PARTS)
def test_one_part_alone(part):
    adapted, _ = add_adapter(hf_moe(**ALL_PARTS), arguments(part))
    assert adapted_weights(adapted).keys() == matrices(hf_moe(**ALL_PARTS), [part])


@pytest.mark.parametrize("name", MODELS)
def test_adapter_is_low_rank_and_each_expert_has_its_own(name):
    make, parts = MODELS[name]
    adapted, _ = add_adapter(make(), arguments(*parts))
    torch.manual_seed(3)
    for key, x in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(x)
    merged = adapted.merge_and_unload().state_dict()
    for key, x in make().state_dict().items():
        if key in matrices(make(), parts):
            delta = (merged[key] - x).double()
            ranks = torch.linalg.matrix_rank(delta, atol=1e-3 * delta.abs().max().item())
            assert (ranks == min(3, *delta.shape[-2:])).all()
            if delta.dim() == 3:
                assert (delta[0] - delta[1]).abs().max() > 1e-2


class TestPeft:
    """What PEFT does with mixtures of experts: the reasons for how add_adapter names its targets."""

    def test_all_linear_misses_experts_without_a_word(self):
        model = hf_moe(**ALL_PARTS)
        targets = dict.fromkeys(matrices(model, ["routed_experts"]), "routed_experts")
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        with pytest.raises(ValueError, match=r"missed 2 weights, the first of them model.layers.1.mlp.experts.down"):
            check_coverage(adapted, targets, ["routed_experts"])

    def test_dense_mlp_by_module_reaches_experts_instead(self):
        names = ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]
        adapted = get_peft_model(deepseek_v3(first_k_dense_replace=1), LoraConfig(target_modules=names))
        assert adapted_weights(adapted).keys() == {"model.layers.1.mlp.experts.gate_up_proj"}

    def test_dropout_on_experts(self):
        with pytest.raises(ValueError, match="lora_dropout"):
            add_adapter(hf_moe(), arguments("routed_experts", lora_dropout=0.1))


@pytest.mark.parametrize(
    ("given", "trainable", "message"),
    [
        ({"lora_parts": ["experts"]}, "all", r"lora_parts is \['experts'\]; it can hold attention, dense_mlp"),
        ({"lora_parts": []}, "all", r"lora_parts is \[\]"),
        ({"lora_parts": ["attention"]}, "dense_only", "trainable is dense_only and lora_parts attention"),
        ({"lora_parts": ["attention", "dense_mlp"], "lora_dropout": 0.1}, "all", "lora_dropout is 0.1, which"),
        ({"lora_parts": ["attention"], "lora_r": 0}, "all", "lora_r is 0; it must be at least 1"),
        ({"lora_merge": "float32"}, "all", "lora_merge is float32, but there is no adapter"),
    ],
)
def test_arguments_that_contradict_each_other(given, trainable, message):
    with pytest.raises(ValueError, match=message) as error:
        check_adapter_arguments(AdapterArguments(**given), trainable)
    assert "\n" not in str(error.value)


def test_part_that_the_model_lacks():
    with pytest.raises(ValueError, match="names dense_mlp and shared_experts, but the model has attention, routed_"):
        add_adapter(hf_moe(), arguments("attention", "dense_mlp", "shared_experts"))


def test_experts_among_heads_are_refused():
    model, _ = MODELS["hf_moe-moa"]
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_experts: PEFT's wrapper would hide"):
        add_adapter(model(), arguments("routed_experts"))


@pytest.fixture
def command(data_folder, tmp_path):
    """A run of the tiny recipe with an adapter on every part of a model whose selection biases move."""
    torch.manual_seed(0)
    shape = {"mlp_layer_types": ["dense", "sparse", "sparse"], "n_shared_experts": 1}
    config = HfMoeConfig(**TINY, **shape, **BIASED, router_bias_update_speed=1e-2, initializer_range=0.3)
    HfMoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def words(*extra, output="out"):
        places = {"--model_name_or_path": tmp_path / "model", "--output_dir": tmp_path / output}
        places |= {"--train_data": data_folder / "train.jsonl", "--eval_data": data_folder / "val.jsonl"}
        given = [str(word) for pair in places.items() for word in pair]
        return ["tiny/sft", *given, "--lora_parts", *LORA_PARTS, "--max_steps", "6", "--save_steps", "2", *extra]

    return words


def test_run_saves_adapter_bias_and_merged_model(command, tmp_path, capsys):
    metrics = main(command("--lora_merge", "float32", "--learning_rate", "1e-2"))
    said = capsys.readouterr().err
    assert "adapter on 12 matrices of attention, 3 matrices of dense_mlp" in said
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    out = tmp_path / "out"
    assert {"adapter_config.json", "adapter_model.safetensors", BIAS_FILE} <= {path.name for path in out.iterdir()}
    assert not (out / "model.safetensors").exists() and not list(out.glob(".*"))
    assert json.loads((out / "merge_results.json").read_text()) == dict.fromkeys(
        ("merge_changed_routes", "merge_changed_tokens"), 0.0
    )
    assert metrics["merge_changed_routes"] == 0.0 and "merged in float32, whose rounding changed 0 of " in said
    assert "likeliest next tokens (0.00%): it writes what the adapter does" in said

    base = HfMoeForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: x.clone() for name, x in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, out).eval()
    load_router_bias(adapted, out)
    merged = HfMoeForCausalLM.from_pretrained(out / "merged").eval()
    ids = torch.arange(3, 90).view(3, 29)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    bias = [name for name in before if name.endswith("e_score_correction_bias")]
    assert bias and all(not torch.equal(merged.state_dict()[name], before[name]) for name in bias)


def test_resumed_adapter_ends_bitwise_where_the_unbroken_one_ends(command, tmp_path):
    main(command(output="whole"))
    main(command("--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-4"), output="resumed"))
    for file in ("adapter_model.safetensors", BIAS_FILE):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "resumed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], x) for key, x in resumed.items())
