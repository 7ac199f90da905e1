"""DeepSeek V1 to V3: the imported model is the released one. V1, which Transformers lacks, against its formulas."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint
from hf_moe.conversion.computation import TRAINING_FIELDS, computation
from hf_moe.conversion.families import FAMILIES
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy, linear, one_hot, silu
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from hf_moe import HfMoeConfig
from tests.conftest import tokens
from tests.conversion.conftest import DEEPSEEK_CASES, DEEPSEEK_V3, build

LAYOUTS = {
    "per-expert": {},
    "per-expert-sharded": {"sharded": True},
    "fused": {"save_original_format": False},
}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- V2 and V3 ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", DEEPSEEK_CASES)
def test_import_is_the_released_model(case, layout, checkpoint, tmp_path):
    source = checkpoint(case, **LAYOUTS[layout])
    report = import_checkpoint(source, tmp_path / "moe", max_shard_size="9KB", verify=False, progress=False)
    theirs, ours = load(source), load(tmp_path / "moe")
    assert report["total_params"] == ours.num_parameters() == theirs.num_parameters()
    weights, expected = ours.state_dict(), theirs.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    ids = tokens(length=29, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **greedy), theirs.generate(ids, **greedy))


def test_the_bias_stays_float32_beside_bfloat16_weights(tmp_path):
    model_type, fields = DEEPSEEK_CASES["deepseek_v3"]
    build(model_type, torch.bfloat16, **fields).save_pretrained(tmp_path / "v3")
    weights = load_file(tmp_path / "v3" / "model.safetensors")
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    weights[name] = torch.randn(6)  # as in the release; Transformers' own random models have it in bfloat16
    save_file(weights, tmp_path / "v3" / "model.safetensors", metadata={"format": "pt"})
    report = import_checkpoint(tmp_path / "v3", tmp_path / "moe", verify=False, progress=False)
    assert report["dtype"] == "bfloat16"
    written = load_file(tmp_path / "moe" / "model.safetensors")
    assert written[name].dtype == torch.float32
    assert torch.equal(written[name], weights[name])
    assert written["model.norm.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert loaded.dtype == torch.bfloat16
    for layer, bias in ((1, weights[name.replace("2", "1")].float()), (2, weights[name])):
        assert torch.equal(loaded.model.layers[layer].mlp.gate.e_score_correction_bias, bias)


def test_balance_loss_of_the_release_is_carried(checkpoint, tmp_path):
    source = Path(shutil.copytree(checkpoint("deepseek_v2-lite"), tmp_path / "source"))
    edit_config(source, aux_loss_alpha=0.001, seq_aux=False, ep_size=1, scoring_func="softmax", moe_layer_freq=1)
    report = import_checkpoint(source, tmp_path / "moe", verify=False, progress=False)
    assert report["ignored_config_keys"] == []
    config = load(tmp_path / "moe").config
    assert (config.router_aux_loss_coef, config.seq_aux_loss_coef) == (0.002, 0)


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
OF_ALL = {
    **{"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-06},
    **{"moe_layer_freq": 1, "ep_size": 1, "pretraining_tp": 1, "aux_loss_alpha": 0.001, "seq_aux": True},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"max_position_embeddings": 163840, "rope_theta": 10000, "tie_word_embeddings": False, "use_cache": True},
}
RELEASED = {  # what the config.json files of the releases say
    "deepseek-v2-lite": (
        "deepseek_v2",
        {
            **{"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408},
            **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None},
            **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False},
            **{"n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax"},
            **{"routed_scaling_factor": 1.0, "first_k_dense_replace": 1},
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {
            **{"vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536},
            **{"num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536},
            **{"n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False},
            **{"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "scoring_func": "softmax"},
            **{"routed_scaling_factor": 16.0, "first_k_dense_replace": 1},
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048},
            **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536},
            **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True},
            **{"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            **{"routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1},
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_configs_of_the_releases_are_the_presets(name):
    family = FAMILIES[RELEASED[name][0]]
    released = family.config_class(**OF_ALL, **RELEASED[name][1])
    ours = computation(HfMoeConfig(**family.hf_moe_fields(released)))
    preset = computation(HfMoeConfig.from_preset(name))
    ours["rope_parameters"].pop("type")  # the old name of rope_type
    apart = TRAINING_FIELDS | {"initializer_range", "bos_token_id", "eos_token_id", "num_mtp_layers"}
    assert {x for x in preset if preset[x] != ours.get(x)} <= apart
    assert ours["num_mtp_layers"] == (1 if name == "deepseek-v3" else 0)
    assert ours["seq_aux_loss_coef"] == pytest.approx(0.001 * ours["mlp_layer_types"].count("sparse"))


REFUSED = {
    "routing of another kind": ("deepseek_v2-lite", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    "normalised V2": ("deepseek_v2-lite", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    "sigmoid V2": ("deepseek_v2-lite", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    "biased MLPs": ("deepseek_v2-lite", {"mlp_bias": True}, "mlp_bias=True"),
    "softmax V3": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    "greedy V3": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    "every other layer": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "no shared experts": ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts=0"),
    "another rank": ("deepseek_v3", {"kv_lora_rank": 12}, r"kv_a_proj_with_mqa.* \[20, 24\].* \[18, 24\]"),
    "another head": ("deepseek_v3", {"v_head_dim": 8}, r"kv_b_proj.* \[76, 14\].* \[72, 14\]"),
}


@pytest.mark.parametrize(("case", "changes", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses(case, changes, match, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint(case), tmp_path / case))
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=match) as raised:
        import_checkpoint(folder, tmp_path / "moe", progress=False)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [folder]


# ---- V1 ----

V1 = {  # the keys of the release
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.003,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 36,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 20,
    "moe_layer_freq": 1,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 100,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 61,
}
V1_CASES = {
    "released": {},
    "normalised-gqa": {"norm_topk_prob": True, "num_key_value_heads": 2, "attention_bias": True},
    "one-expert-whole-batch": {"num_experts_per_tok": 1, "norm_topk_prob": True, "seq_aux": False},
    "every-second-layer": {"moe_layer_freq": 2, "first_k_dense_replace": 0, "n_shared_experts": None},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 3.0}},
}


def is_sparse(config: dict, layer: int) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def v1_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the release."""
    size, vocabulary = config["hidden_size"], config["vocab_size"]
    rows = {"q": size, "k": config["num_key_value_heads"] * 6, "v": config["num_key_value_heads"] * 6, "o": size}
    shapes = {"model.embed_tokens": (vocabulary, size), "model.norm": (size,), "lm_head": (vocabulary, size)}
    biases = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}input_layernorm": (size,), f"{name}post_attention_layernorm": (size,)}
        shapes |= {f"{name}self_attn.{x}_proj": (count, size) for x, count in rows.items()}
        if config["attention_bias"]:
            biases |= {f"{name}self_attn.{x}_proj.bias": (count,) for x, count in rows.items()}
        widths = {"mlp": config["intermediate_size"]}
        if is_sparse(config, layer):
            shapes[f"{name}mlp.gate"] = (config["n_routed_experts"], size)
            wide = config["moe_intermediate_size"]
            widths = {f"mlp.experts.{expert}": wide for expert in range(config["n_routed_experts"])}
            if config["n_shared_experts"]:
                widths["mlp.shared_experts"] = wide * config["n_shared_experts"]
        for mlp, width in widths.items():
            shapes |= {f"{name}{mlp}.{x}_proj": (width, size) for x in ("gate", "up")}
            shapes[f"{name}{mlp}.down_proj"] = (size, width)
    return {f"{name}.weight": shape for name, shape in shapes.items()} | biases


def v1_logits(config: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits [B, S, V] and the balance loss that training adds: DeepSeekMoE, arXiv 2401.06066, eq. 9-14."""
    eps, heads, top_k = config["rms_norm_eps"], config["num_attention_heads"], config["num_experts_per_tok"]
    batch, length = ids.shape
    size = config["hidden_size"] // heads
    scale = config["rope_scaling"]["factor"] if config["rope_scaling"] else 1.0
    frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    turns = torch.polar(torch.ones(()), torch.arange(length)[:, None] / scale * frequencies)  # [S, d / 2]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weights[f"{name}.weight"]

    def project(x, name):
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def turn(x):  # dimension i is the real part, i + d / 2 the imaginary one
        turned = torch.complex(*x.chunk(2, dim=-1)) * turns
        return torch.cat((turned.real, turned.imag), dim=-1)

    def mlp(x, name):
        return project(silu(project(x, f"{name}.gate_proj")) * project(x, f"{name}.up_proj"), f"{name}.down_proj")

    x, balance = weights["model.embed_tokens.weight"][ids], 0.0
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            project(h, f"{name}.self_attn.{part}_proj").view(batch, length, -1, size).transpose(1, 2) for part in "qkv"
        )
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        scores = turn(q) @ turn(k).transpose(2, 3) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        x = x + project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.self_attn.o_proj")

        h = norm(x, f"{name}.post_attention_layernorm")
        if not is_sparse(config, layer):
            x = x + mlp(h, f"{name}.mlp")
            continue
        affinity = project(h, f"{name}.mlp.gate").softmax(-1)  # [B, S, E]
        gates, chosen = affinity.topk(top_k)
        if config["norm_topk_prob"] and top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        if config["n_shared_experts"]:
            x = x + mlp(h, f"{name}.mlp.shared_experts")
        for expert in range(config["n_routed_experts"]):
            gate = (gates * (chosen == expert)).sum(-1, keepdim=True)
            x = x + gate * mlp(h, f"{name}.mlp.experts.{expert}")
        share = one_hot(chosen, config["n_routed_experts"]).float().sum(2) * config["n_routed_experts"] / top_k
        over = 1 if config["seq_aux"] else (0, 1)  # within each sequence, or over the whole batch
        balance += (share.mean(over) * affinity.mean(over)).sum(-1).mean() * config["aux_loss_alpha"]
    return project(norm(x, "model.norm"), "lm_head"), balance


def v1_checkpoint(folder: Path, config: dict, sharded: bool = False) -> dict[str, torch.Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(11)
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in v1_shapes(config).items()}
    for name in weights:
        weights[name] += float("norm" in name)
    names = list(weights)
    parts = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)} if sharded else {}
    for file, held in (parts or {"model.safetensors": names}).items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    if sharded:
        index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return weights


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("case", V1_CASES)
def test_v1_computes_its_formulas(case, sharded, tmp_path):
    config = V1 | V1_CASES[case]
    weights = v1_checkpoint(tmp_path / "v1", config, sharded)
    report = import_checkpoint(tmp_path / "v1", tmp_path / "moe", verify=False, progress=False)
    assert report["ignored_config_keys"] == []
    model = load(tmp_path / "moe")
    ids = tokens(batch=3, length=23, vocab_size=61)
    with torch.inference_mode():
        expected, balance = v1_logits(config, weights, ids)
        output = model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    loss = cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + balance
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert report["total_params"] == sum(weight.numel() for weight in weights.values())
    assert (tmp_path / "moe" / "tokenizer.json").exists()


def test_v1_is_compared_only_where_that_can_be(tmp_path):
    v1_checkpoint(tmp_path / "v1", V1)
    assert import_checkpoint(tmp_path / "v1", tmp_path / "moe", dry_run=True)["total_params"] > 0
    with pytest.raises(ValueError, match=r"no class for deepseek.*verify=False"):
        import_checkpoint(tmp_path / "v1", tmp_path / "moe", progress=False)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("topk_method", "greedy"), ("scoring_func", "sigmoid"), ("pruned_layers", [1])]
)
def test_v1_fields_that_are_not_known_are_refused_by_name(field, value, tmp_path):
    v1_checkpoint(tmp_path / "v1", V1 | {field: value})
    with pytest.raises(ValueError, match=f"deepseek field {field}="):
        import_checkpoint(tmp_path / "v1", tmp_path / "moe", verify=False, progress=False)


# ---- multi-token prediction ----


def with_mtp_layers(folder: Path, count: int = 1) -> dict[str, torch.Tensor]:
    """A V3 with two layers and `count` more for multi-token prediction, named as in the release."""
    fields = {"n_group": 1, "topk_group": 1, "num_hidden_layers": 2 + count}
    build("deepseek_v3", **{**DEEPSEEK_V3, **fields}).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    added = {"enorm": (24,), "hnorm": (24,), "eh_proj": (24, 48), "shared_head.norm": (24,)}
    for layer in range(2, 2 + count):
        weights |= {f"model.layers.{layer}.{name}.weight": torch.randn(shape) for name, shape in added.items()}
        weights[f"model.layers.{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{layer}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_hidden_layers=2, num_nextn_predict_layers=count)
    return weights


@pytest.mark.parametrize("count", [1, 2])
def test_mtp_layers_are_carried(count, tmp_path, monkeypatch):
    released = with_mtp_layers(tmp_path / "v3", count)
    import_checkpoint(tmp_path / "v3", tmp_path / "moe", verify=False, progress=False)
    model = load(tmp_path / "moe")
    assert model.config.num_mtp_layers == count
    weights = model.state_dict()
    for ours, theirs in {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "norm": "shared_head.norm",
        "block.self_attn.kv_b_proj": "self_attn.kv_b_proj",
        "block.mlp.shared_experts.up_proj": "mlp.shared_experts.up_proj",
    }.items():
        expected = released[f"model.layers.{1 + count}.{theirs}.weight"]
        assert torch.equal(weights[f"model.mtp_layers.{count - 1}.{ours}.weight"], expected), ours
    down = [released[f"model.layers.{1 + count}.mlp.experts.{expert}.down_proj.weight"] for expert in range(6)]
    assert torch.equal(weights[f"model.mtp_layers.{count - 1}.block.mlp.experts.down_proj"], torch.stack(down))

    export_checkpoint(tmp_path / "moe", tmp_path / "back", to="deepseek_v3", progress=False)
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == released.keys()
    for name, weight in written.items():
        assert torch.equal(weight, released[name]), name
    # Transformers finds the layers by the number that they have in the release.
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23].*"])
    theirs, ids = load(tmp_path / "back"), tokens(batch=1, length=17, vocab_size=61)
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    plain = theirs.generate(ids, **greedy)
    assert torch.equal(theirs.generate(ids, use_mtp=True, **greedy), plain)
    assert torch.equal(model.generate(ids, **greedy), plain)
    assert torch.equal(model.generate(ids, use_mtp=True, **greedy), plain)


def test_mtp_layers_are_left_out_only_where_that_is_asked_for(tmp_path):
    weights = with_mtp_layers(tmp_path / "v3")
    import_checkpoint(tmp_path / "v3", tmp_path / "moe", drop_mtp=True, verify=False, progress=False)
    assert load(tmp_path / "moe").config.num_mtp_layers == 0
    edit_config(tmp_path / "v3", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"holds model\.layers\.2\..*does not use"):
        import_checkpoint(tmp_path / "v3", tmp_path / "none", progress=False)

    for name in [name for name in weights if name.startswith("model.layers.2.")]:
        del weights[name]
    save_file(weights, tmp_path / "v3" / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = load(tmp_path / "v3"), load(tmp_path / "moe")
    ids = tokens(length=17, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    edit_config(tmp_path / "v3", num_nextn_predict_layers=1)
    with pytest.raises(
        ValueError, match=r"num_mtp_layers=1, but the checkpoint lacks model\.layers\.2\..*drop_mtp=True"
    ):
        import_checkpoint(tmp_path / "v3", tmp_path / "none", progress=False)


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_mtp_copies_must_be_copies(copy, tmp_path):
    weights = with_mtp_layers(tmp_path / "v3")
    weights[f"model.layers.2.{copy}.weight"][5, 3] += 1
    save_file(weights, tmp_path / "v3" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.layers.2.{copy}.weight differs from"):
        import_checkpoint(tmp_path / "v3", tmp_path / "moe", progress=False)
