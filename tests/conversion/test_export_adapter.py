"""A LoRA adapter in a family's names, expert by expert: the exported base with it is the hf_moe model with its own."""

import json

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint, verify
from hf_moe.training.weights.adapters import AdapterArguments, add_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..conftest import tokens

# Each with all the parts that it has, and what the matrices of its experts are called.
CASES = {
    "mixtral": (["attention", "routed_experts"], "mixtral", "block_sparse_moe.experts.{}.w{}"),
    "olmoe": (["attention", "routed_experts"], "olmoe", "mlp.experts.{}.{}_proj"),
    "qwen2_moe-mixed-window": (
        ["attention", "dense_mlp", "shared_experts", "routed_experts"],
        "qwen2_moe",
        "mlp.experts.{}.{}_proj",
    ),
    "qwen3_moe": (["attention", "routed_experts"], "qwen3_moe", "mlp.experts.{}.{}_proj"),
    "deepseek_v3": (["dense_mlp", "shared_experts", "routed_experts"], "deepseek_v3", "mlp.experts.{}.{}_proj"),
}
TOKENS = tokens(length=23, vocab_size=61)
QUIET = {"progress": False, "verify": False}


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """adapted(case): an hf_moe model and an adapter of it, of which no matrix is zero."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("adapted")
            import_checkpoint(checkpoint(case), folder / "base", **QUIET)
            base = AutoModelForCausalLM.from_pretrained(folder / "base")
            model, _ = add_adapter(base, AdapterArguments(lora_parts=CASES[case][0], lora_r=3, lora_alpha=5))
            torch.manual_seed(5)
            with torch.no_grad():
                for name, x in model.named_parameters():
                    if "lora_" in name:
                        torch.nn.init.normal_(x, std=0.3)
            model.save_pretrained(folder / "adapter")
            made[case] = folder
        return made[case]

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def own(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return logits(PeftModel.from_pretrained(base, folder / "adapter"))


def with_adapter(folder, adapter):
    """The family's weights as they lie in its files, with b @ a added to each matrix that the adapter names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale, pairs = config["lora_alpha"] / config["r"], load_file(adapter / "adapter_model.safetensors")
    weights = load_file(folder / "model.safetensors")
    for key in pairs:
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            weights[name] = weights[name] + scale * pairs[key.replace("lora_A", "lora_B")] @ pairs[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_exported_base_with_it_is_the_model_with_its_own(case, adapted, tmp_path):
    folder, (_, family, experts) = adapted(case), CASES[case]
    expected = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    )
    plain = logits(AutoModelForCausalLM.from_pretrained(folder / "base"))
    export_checkpoint(folder / "base", tmp_path / "base", to=family, **QUIET)
    report = export_checkpoint(folder / "adapter", tmp_path / "adapter", to=family, progress=False)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(
        logits(with_adapter(tmp_path / "base", tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4
    )

    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert report["matrices"] == len(names) // 2
    for expert in (0, 4):
        for projection in ("1", "2", "3") if family == "mixtral" else ("gate", "up", "down"):
            assert any(f"{experts.format(expert, projection)}.lora_A.weight" in name for name in names)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["target_parameters"] is None and said["base_model_name_or_path"] is None
    assert all(any(name.split(".lora_")[0].endswith(x) for x in said["target_modules"]) for name in names)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_peft_reads_it_on_the_hosts_own_model(case, adapted, tmp_path):
    folder, family = adapted(case), CASES[case][1]
    expected = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    )
    export_checkpoint(folder / "base", tmp_path / "base", to=family, **QUIET)
    report = export_checkpoint(folder / "adapter", tmp_path / "adapter", to=family, progress=False)
    assert "names no base, for that is the exported one: say --exported-base" in report["warning"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(model, tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_it_loads_by_itself_where_its_base_is_named(case, adapted, tmp_path):
    folder, family, base = adapted(case), CASES[case][1], str(tmp_path / "base")
    quiet = {"to": family, "progress": False, "exported_base": base}
    export_checkpoint(folder / "base", base, to=family, **QUIET)
    assert "warning" not in export_checkpoint(folder / "adapter", tmp_path / "adapter", **quiet)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), own(folder), atol=1e-4, rtol=1e-4)


def test_an_exported_base_of_another_family(adapted, tmp_path):
    folder = adapted("qwen3_moe")
    for source, message in (("adapter", "base is a model of hf_moe, but the adapter"), ("base", "is for an adapter")):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(
                folder / source, tmp_path / "out", to="qwen3_moe", exported_base=str(folder / "base"), progress=False
            )


def changed(folder, target, **fields):
    target.mkdir()
    for path in (folder / "adapter").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    said = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(said | fields))
    return target


REFUSED = {
    "kind": ({"peft_type": "IA3"}, "qwen3_moe", "is no LoRA adapter of matrices alone"),
    "dora": ({"use_dora": True}, "qwen3_moe", "has use_dora=True, which no server reads with experts"),
    "family": ({}, "gpt_oss", "gpt_oss stores all experts in one tensor, .* exported to mixtral, olmoe"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3]}}, "qwen3_moe", "has trainable_token_indices="),
}


@pytest.mark.parametrize(("fields", "to", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_other_way(fields, to, message, adapted, tmp_path):
    source = changed(adapted("qwen3_moe"), tmp_path / "adapter", **fields)
    with pytest.raises(ValueError, match=rf"{message}.*: train with --lora_merge float32, which writes .*merged") as e:
        export_checkpoint(source, tmp_path / "out", to=to, progress=False)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_merged_model_beside_it_is_named(adapted, tmp_path):
    source = changed(adapted("qwen3_moe"), tmp_path / "adapter", use_dora=True)
    (source / "merged").mkdir()
    (source / "merged" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"export the whole model instead: {source / 'merged'}\."):
        export_checkpoint(source, tmp_path / "out", to="qwen3_moe", progress=False)


def test_a_family_that_does_not_hold_the_base(adapted, tmp_path):
    with pytest.raises(ValueError, match=r"mixtral cannot hold this model's .*qk_norm"):
        export_checkpoint(adapted("qwen3_moe") / "adapter", tmp_path / "out", to="mixtral", progress=False)


def test_biases_that_moved(adapted, tmp_path):
    source = changed(adapted("deepseek_v3"), tmp_path / "adapter")
    base = load_file(adapted("deepseek_v3") / "base" / "model.safetensors")
    biases = {name: x.float() for name, x in base.items() if name.endswith("e_score_correction_bias")}
    save_file(biases, source / "router_bias.safetensors")
    export_checkpoint(source, tmp_path / "same", to="deepseek_v3", progress=False)
    save_file({name: x + 0.1 for name, x in biases.items()}, source / "router_bias.safetensors")
    with pytest.raises(ValueError, match=r"adapter moved model.layers.*bias of its base"):
        export_checkpoint(source, tmp_path / "out", to="deepseek_v3", progress=False)


def test_another_files_adapter(adapted, tmp_path):
    source = changed(adapted("qwen3_moe"), tmp_path / "adapter", target_parameters=None)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors holds .*, which adapter_config"):
        export_checkpoint(source, tmp_path / "out", to="qwen3_moe", progress=False)


@pytest.mark.parametrize(
    "command", [verify, lambda a, b: import_checkpoint(a, b, progress=False)], ids=["verify", "import"]
)
def test_other_commands_name_the_whole_model(command, adapted, tmp_path):
    adapter = adapted("qwen3_moe") / "adapter"
    with pytest.raises(FileNotFoundError, match=r"adapter is an adapter: give the whole model, which --lora_merge"):
        command(adapter, tmp_path / "out")
