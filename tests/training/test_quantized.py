"""QLoRA: what is stored in 4 bits, fused experts too, and a run from recipe to merged model."""

import logging
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
from hf_moe.training.balance.selection_bias import BIAS_FILE, load_router_bias
from hf_moe.training.main import main
from hf_moe.training.weights.adapters import (
    AdapterArguments,
    add_adapter,
    check_adapter_arguments,
    lora_targets,
    matrices,
)
from hf_moe.training.weights.groups import part_of
from hf_moe.training.weights.quantized import Nf4Weight, coverage, dequantize, quantize, quantize_experts
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_moe import HfMoeForCausalLM

from .models import hf_moe, hf_moe_biased, mixtral
from .policies import BYTES, pairs, save_model, write_rows

CPU = torch.device("cpu")
# The 16 levels of NF4: https://arxiv.org/abs/2305.14314, appendix E.
LEVELS = "-1 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.09105004 0 "
LEVELS += "0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1"
ALL_PARTS = {"mlp_layer_types": ["dense", "sparse"], "n_shared_experts": 1}


def wide(**changes):
    """Whole blocks of 64, of several experts each."""
    return hf_moe(**ALL_PARTS, hidden_size=64, moe_intermediate_size=24, **changes)


MODELS = {"hf_moe": wide, "mixtral": lambda: mixtral(hidden_size=64, intermediate_size=24)}


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("hf_moe.training.weights.quantized.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lora_base is nf4, which needs bitsandbytes: pip install 'hf_moe\[qlora\]'"):
        check_adapter_arguments(AdapterArguments(lora_parts=["attention"], lora_base="nf4"), "all")


def test_base_without_adapter():
    with pytest.raises(ValueError, match="lora_base is nf4, but there is no adapter"):
        check_adapter_arguments(AdapterArguments(lora_base="nf4"), "all")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantization_config_says_that_it_left_the_experts_and_what_stores_them(tmp_path, caplog, bits, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    plain = wide()
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True}))
    left = [x for name, x in plain.named_parameters() if ".experts." in name]
    stays = sum(x.nbytes for x in left)
    whole = sum(x.nbytes for x in model.parameters())
    said = [record.getMessage() for record in caplog.records if "fused matrices" in record.getMessage()]
    assert len(said) == 1 and "\n" not in said[0]
    assert f"{len(left)} fused matrices of the experts in float32: {stays:,} of the model's {whole:,} bytes" in said[0]
    ids = torch.arange(2, 9).unsqueeze(0)
    before = model(ids).logits
    assert f"nf4 for {len(left)} matrices of routed_experts" in quantize_experts(model)
    assert sum(getattr(x, "bytes", 0) for x in model.parameters()) < 0.2 * stays
    after = model(ids).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0.1, atol=0.2 * before.abs().max().item())
    with pytest.raises(ValueError, match="no expert in full precision"):
        quantize_experts(model)


@pytest.mark.parametrize("stored", ["nf4", "fp8"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_is_saved_are_the_values_of_the_experts(make, stored, tmp_path):
    make().save_pretrained(tmp_path / "plain")
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=in_4_bits)
    quantize_experts(model, stored)
    model.save_pretrained(tmp_path / "saved")
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), torch.arange(2, 9).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert any(hasattr(x, "packed") for x in model.state_dict().values())  # as before


def test_a_merge_into_what_is_stored_in_4_bits_is_refused():
    model = wide()
    quantize_experts(model)
    adapted, _ = add_adapter(model, AdapterArguments(lora_parts=["attention", "routed_experts"], lora_r=3))
    with pytest.raises(ValueError, match=r"stored as nf4 cannot be changed in place .*dequantize\(model\) before"):
        adapted.merge_and_unload()


def test_without_a_quantization_config_nothing_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    wide().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "fused matrices" not in caplog.text


def test_values_are_the_nearest_levels():
    torch.manual_seed(0)
    weight = torch.randn(3, 7, 64)
    packed = Nf4Weight.quantize(weight)
    blocks, values = weight.view(-1, 64), packed.values().view(-1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    levels = torch.tensor([float(x) for x in LEVELS.split()])
    nearest = levels[(blocks.unsqueeze(-1) / scale.unsqueeze(-1) - levels).abs().argmin(-1)] * scale
    assert (values - nearest).abs().max() < 0.02 * scale.max()  # the scales are quantised, too
    assert packed.shape == weight.shape and packed.bytes < 0.6 * weight.numel()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_matrix_is_covered_and_nothing_else(make):
    model, plain = make(), make()
    said = quantize(model, matrices(model), CPU)
    for name, x in model.named_parameters():
        kept = part_of(name) in ("embeddings", "norms", "router")
        assert isinstance(x, Nf4Weight) != kept and not (isinstance(x, Nf4Weight) and x.requires_grad)
        assert x.shape == plain.get_parameter(name).shape
    assert "2 matrices of routed_experts" in said or "4 matrices of routed_experts" in said
    targets = lora_targets(plain, ["attention", "routed_experts"])
    with pytest.raises(ValueError, match=r"weights are stored in another way than was asked, first model\.layers"):
        coverage(plain, targets, 1, 1)


def test_adapter_trains_beside_4_bits_as_beside_their_values():
    """Forward and gradient, on a model whose weights are the values that the 4 bits stand for."""
    model = wide()
    quantize(model, matrices(model), CPU)
    plain, weights = wide(), model.state_dict()
    plain.load_state_dict({name: x.values() if isinstance(x, Nf4Weight) else x for name, x in weights.items()})
    parts, ids, results = ["attention", "dense_mlp", "routed_experts"], torch.arange(3, 33).view(2, 15), []
    for x in (model, plain):
        adapted, _ = add_adapter(x, AdapterArguments(lora_parts=parts, lora_r=3))
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        logits = adapted(ids).logits
        logits.square().mean().backward()
        results.append([logits, *(x.grad for x in adapted.parameters() if x.requires_grad)])
    assert len(results[0]) == len(results[1]) == 1 + 2 * 13
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_keep_4_bits_and_other_types_do_not():
    weight = Nf4Weight.quantize(torch.randn(5, 64))
    moved = weight.moved(CPU)
    assert torch.equal(moved.values(), weight.values()) and moved.packed is not weight
    assert type(weight.bfloat16()) is torch.Tensor and torch.equal(weight.bfloat16(), weight.values().bfloat16())
    layer = torch.nn.Linear(64, 5)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dequantize(layer)
    assert type(layer.weight) is torch.nn.Parameter and torch.equal(layer.weight, weight.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, its metrics, what it said, and the words of another like it."""
    folder = tmp_path_factory.mktemp("qlora")
    model = save_model(folder / "model", hf_moe_biased(**BYTES, **ALL_PARTS, router_bias_update_speed=1e-2))
    said = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(9)]
    rows = write_rows(folder / "rows.jsonl", said)

    def words(output, *extra):
        given = ["--model_name_or_path", model, "--output_dir", folder / output, "--train_data", rows]
        given += ["--lora_parts", "attention", "routed_experts", "--lora_base", "nf4", "--learning_rate", 1e-2]
        return ["tiny/sft", *map(str, [*given, "--max_steps", 4, "--save_steps", 2, *extra])]

    with redirect_stderr(StringIO()) as said:
        metrics = main(words("whole", "--lora_merge", "float32"))
    return folder, metrics, said.getvalue(), words


def test_run_ends_in_a_merged_model_with_the_same_routes(run):
    folder, metrics, said, _ = run
    assert "nf4 for 8 matrices of attention, 3 matrices of dense_mlp" in said and "MiB instead of" in said
    assert metrics["merge_changed_routes"] == 0.0
    base = HfMoeForCausalLM.from_pretrained(folder / "model")
    quantize(base, matrices(base), CPU)
    adapted = PeftModel.from_pretrained(base, folder / "whole").eval()
    load_router_bias(adapted, folder / "whole")
    merged = HfMoeForCausalLM.from_pretrained(folder / "whole" / "merged").eval()
    ids = torch.arange(3, 90).view(3, 29)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_resumed_run_ends_bitwise_where_the_unbroken_one_ends(run):
    folder, *_, words = run
    main(words("resumed", "--resume_from_checkpoint", folder / "whole" / "checkpoint-2"))
    for file in ("adapter_model.safetensors", BIAS_FILE):
        whole, resumed = (load_file(folder / name / file) for name in ("whole", "resumed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], x) for key, x in resumed.items())
