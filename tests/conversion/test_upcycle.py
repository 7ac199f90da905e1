"""Dense to mixture of experts: the same function before and after, and a refusal for everything else."""

import hashlib
import json
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import upcycle, verify
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import tokens
from tests.conversion.conftest import DENSE_CASES, build, files_of


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def llama(checkpoint, tmp_path) -> Path:
    """A copy of the plain Llama to damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("case", DENSE_CASES)
def test_computes_what_the_dense_model_computes(case, sharded, checkpoint, tmp_path):
    source = checkpoint(case, sharded)
    upcycle(source, tmp_path / "moe", experts=3, top_k=2, verify=False, progress=False)
    dense, moe = load(source), load(tmp_path / "moe")
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(moe.generate(ids, **greedy), dense.generate(ids, **greedy))
    assert moe.config.tie_word_embeddings == dense.config.tie_word_embeddings


def test_report_and_provenance(checkpoint, tmp_path):
    source = checkpoint("qwen2")
    plan = upcycle(source, tmp_path / "moe", experts=5, top_k=2, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    report = upcycle(source, tmp_path / "moe", experts=5, top_k=2, seed=7, progress=False)
    json.dumps(report)
    for only_planned in ("peak_memory_bytes", "verify_memory_bytes"):
        assert plan.pop(only_planned) > 0
    assert {name: report[name] for name in plan} == plan | {"dry_run": False}
    model = load(tmp_path / "moe")
    ffn = 3 * 24 * 36
    assert report["total_params"] == model.num_parameters() == build("qwen2").num_parameters() + 3 * (4 * ffn + 5 * 24)
    assert report["active_params"] == report["total_params"] - 3 * 3 * ffn
    assert report["disk_bytes"] == (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert report["max_abs_diff"] <= 1e-4
    provenance = model.config.provenance
    assert provenance["source"] == source.name
    assert (provenance["strategy"], provenance["seed"], provenance["model_type"]) == ("copy", 7, "qwen2")
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["sha256"] == {"model.safetensors": digest}
    assert str(tmp_path) not in (tmp_path / "moe" / "config.json").read_text()


def test_router_is_drawn_per_layer_from_the_seed(checkpoint, tmp_path):
    def routers(name, **options):
        upcycle(checkpoint("llama"), tmp_path / name, experts=40, top_k=2, verify=False, progress=False, **options)
        weights = load_file(tmp_path / name / "model.safetensors")
        return [weights.get(f"model.layers.{layer}.mlp.gate.weight") for layer in range(3)]

    zero, one, some = routers("a"), routers("b", seed=1), routers("c", layers="0-1,2", router_std=0.5)
    assert torch.stack(zero).std() == pytest.approx(0.02, rel=0.05)
    assert torch.stack(some).std() == pytest.approx(0.5, rel=0.05)
    assert len({tuple(weight.flatten().tolist()) for weight in zero + one}) == 6
    last = routers("d", layers="2")
    assert last[:2] == [None, None]
    assert torch.equal(last[2], zero[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_are_copies_in_the_dtype_of_the_source(dtype, tmp_path):
    build("llama", dtype, mlp_bias=True).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, top_k=1, layers="1", progress=False)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    assert {tensor.dtype for tensor in moe.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == dtype
    mlp = "model.layers.1.mlp."
    for expert in range(3):
        for kind, suffix in [("weight", ""), ("bias", "_bias")]:
            up = torch.cat([dense[f"{mlp}gate_proj.{kind}"], dense[f"{mlp}up_proj.{kind}"]])
            assert torch.equal(moe[f"{mlp}experts.gate_up_proj{suffix}"][expert], up)
            assert torch.equal(moe[f"{mlp}experts.down_proj{suffix}"][expert], dense[f"{mlp}down_proj.{kind}"])
    for name in dense.keys() & moe.keys():
        assert torch.equal(dense[name], moe[name])
    assert len(dense.keys() & moe.keys()) == len(dense) - 6


def test_same_input_same_bytes(checkpoint, tmp_path):
    for name in ("a", "b"):
        upcycle(
            checkpoint("qwen3"),
            tmp_path / name / "moe",
            experts=3,
            top_k=2,
            max_shard_size="30KB",
            verify=False,
            progress=False,
        )
    first = files_of(tmp_path / "a" / "moe")
    assert first == files_of(tmp_path / "b" / "moe")
    shards = sorted(name for name in first if name.endswith(".safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads(first["model.safetensors.index.json"])
    held = {}
    for shard in shards:
        with safe_open(tmp_path / "a" / "moe" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == held
    assert load(tmp_path / "a" / "moe").config.num_experts == 3


def test_what_goes_along(llama, tmp_path):
    carried = {
        "tokenizer.json": Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str(),
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "generation_config.json": '{"temperature": 0.7, "eos_token_id": [2, 5]}',
        "LICENSE": "terms",
    }
    (llama / "additional_chat_templates").mkdir()
    for name, text in carried.items():
        (llama / name).write_text(text)
    (llama / "README.md").write_text("about the dense model")
    report = upcycle(llama, tmp_path / "moe", experts=2, top_k=1, verify=False, progress=False)
    assert report["carried_files"] == sorted(carried)
    for name, text in carried.items():
        assert (tmp_path / "moe" / name).read_text() == text
    assert "about the dense model" not in (tmp_path / "moe" / "README.md").read_text()
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    for target in config["auto_map"].values():
        assert (tmp_path / "moe" / f"{target.split('.')[0]}.py").exists()


@pytest.mark.parametrize(
    ("case", "named", "unchanged"),
    [
        ("qwen2", None, False),
        ("qwen2", "LlamaTokenizer", False),
        ("mistral", "LlamaTokenizer", False),
        ("llama", "PreTrainedTokenizerFast", True),
    ],
)
def test_the_tokenizer_stays_the_same(case, named, unchanged, checkpoint, shared_data, tmp_path):
    """Transformers goes by the model_type too when it chooses the class, and the conversion changes that."""
    source = Path(shutil.copytree(checkpoint(case), tmp_path / "dense"))
    stories = shared_data / "stories260K-hf"
    (source / "tokenizer.json").write_bytes((stories / "tokenizer.json").read_bytes())
    said = json.loads((stories / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    said = {name: value for name, value in said.items() if value is not None}
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    upcycle(source, tmp_path / "moe", experts=2, top_k=1, verify=False, progress=False)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "moe", source))
    assert type(ours) is type(theirs)
    text = " Once  upon a\ttime, Zoë's cat – 12 of them!\n"
    assert ours(text).input_ids == theirs(text).input_ids
    carried = json.loads((tmp_path / "moe" / "tokenizer_config.json").read_text())
    assert (carried == said) == unchanged
    assert carried | {"tokenizer_class": None} == said | {"tokenizer_class": None}


def test_a_tokenizer_of_mistrals_own_format_goes_along(llama, tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"th"]
    vocabulary = [{"rank": rank, "token_bytes": b64encode(token).decode()} for rank, token in enumerate(tokens)]
    special = [{"rank": rank, "token_str": token} for rank, token in enumerate(["<unk>", "<s>", "</s>"])]
    said = {"config": {"pattern": r"\S+|\s+", "version": "v3"}, "vocab": vocabulary, "special_tokens": special}
    (llama / "tekken.json").write_text(json.dumps(said))
    upcycle(llama, tmp_path / "moe", experts=2, top_k=1, verify=False, progress=False)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "moe", llama))
    assert ours("the cat").input_ids == theirs("the cat").input_ids


def test_refuses_a_tokenizer_that_cannot_be_loaded(llama, tmp_path):
    (llama / "tokenizer.json").write_text("{}")
    assert_refused(llama, tmp_path, "tokenizer in .*llama cannot be loaded")


def test_older_spellings_and_buffers_of_a_source(llama, tmp_path):
    """torch_dtype, rope_theta beside the fields, a stored tied head, a RoPE buffer, keys that Transformers ignores."""
    path = llama / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    old = {"rope_theta": 55.0, "rope_scaling": None, "torch_dtype": "float32", "is_llama_config": True}
    path.write_text(json.dumps(config | old | {"tie_word_embeddings": True}))
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, llama / "model.safetensors")
    report = upcycle(llama, tmp_path / "moe", experts=2, top_k=1, progress=False)
    assert report["max_abs_diff"] <= 1e-4
    assert report["ignored_config_keys"] == ["is_llama_config"]
    moe = load(tmp_path / "moe")
    assert moe.config.rope_parameters["rope_theta"] == 55.0
    assert moe.config.tie_word_embeddings


def test_stories(shared_data, tmp_path):
    source = shared_data / "stories260K-hf"
    report = upcycle(source, tmp_path / "moe", experts=8, top_k=2, progress=False)
    assert report["max_abs_diff"] <= 1e-4
    assert report["top1_agreement"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    told = [load(model).generate(ids, max_new_tokens=60, do_sample=False) for model in (source, tmp_path / "moe")]
    assert torch.equal(*told)


BAD_ARGUMENTS = {
    "top_k above experts": ({"experts": 4, "top_k": 5}, r"top_k \(5\).*\(4\)"),
    "top_k 0": ({"top_k": 0}, r"top_k \(0\)"),
    "strategy": ({"strategy": "magic"}, "'magic'.*copy"),
    "layers syntax": ({"layers": "1..2"}, "'1..2'.*'2-5,8'"),
    "layers range": ({"layers": "0,2-3"}, "2-3 is not within 0-2"),
    "layers backwards": ({"layers": "2-1"}, "2-1 is not within 0-2"),
    "shard size": ({"max_shard_size": "many"}, "'many'"),
    "shard size below 0": ({"max_shard_size": "-5GB"}, "'-5GB' is no size"),
    "shard size without end": ({"max_shard_size": "infGB"}, "'infGB' is no size"),
    "router_std": ({"router_std": -1.0}, "router_std"),
}


def assert_refused(source, tmp_path, match, error=ValueError, **options):
    """One line that matches, and nothing beside what was there."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match) as raised:
        upcycle(source, tmp_path / "moe", **{"experts": 4, "top_k": 2, "progress": False, **options})
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("options", "match"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_refuses_arguments(options, match, checkpoint, tmp_path):
    assert_refused(checkpoint("llama"), tmp_path, match, **options)


BAD_CONFIGS = {
    "another family's tensors": ({"model_type": "gpt2"}, "lacks transformer.wte.weight, which a gpt2"),
    "unknown family": ({"model_type": "gpt7"}, "'gpt7', which Transformers .* does not know: take a newer one"),
    "no family": ({"model_type": None}, "None, which Transformers .* does not know"),
    "hf_moe already": ({"model_type": "hf_moe"}, "an hf_moe checkpoint already"),
    "a mixture already": ({"model_type": "mixtral"}, "mixtral.*import"),
    "field of the wrong type": ({"num_hidden_layers": "three"}, "config.json.*num_hidden_layers"),
    "quantized": (
        {"quantization_config": {"quant_method": "awq"}},
        "field quantization_config says quant_method=.awq",
    ),
    "per layer": ({"per_layer_config": {"0": {"head_dim": 4}}}, "llama field per_layer_config"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "more layers than tensors": ({"num_hidden_layers": 4}, r"lacks model\.layers\.3\."),
    "fewer layers than tensors": ({"num_hidden_layers": 2}, r"holds model\.layers\.2\."),
    "biases without tensors": ({"mlp_bias": True}, r"lacks model\.layers\.0\.mlp.*bias"),
    "another width": ({"intermediate_size": 40}, r"mlp.*shape \[36, 24\].*\[40, 24\]"),
    "no activation": ({"hidden_act": "magic"}, "llama cannot be carried: .*'magic' is (missing or )?unknown"),
    "no rotation": ({"rope_parameters": {"rope_type": "magic", "rope_theta": 9.0}}, "rope_type 'magic' is unknown"),
    "half a rotation": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0}},
        "llama config: Missing required keys .*'factor'}$",
    ),
    "no dtype": ({"dtype": "float8"}, "llama config: .*float8"),
    "a list for a family": ({"model_type": ["llama"]}, r"model_type=\['llama'\], which is no str"),
    "a word for a quantization": ({"quantization_config": "int8"}, "quantization_config='int8', which is no dict"),
    "untrue tie": ({"tie_word_embeddings": True}, "lm_head.weight differs"),
}


@pytest.mark.parametrize(("changes", "match"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_refuses_configs(changes, match, llama, tmp_path):
    edit_config(llama, **changes)
    assert_refused(llama, tmp_path, match)


def test_refuses_a_config_that_is_no_json(llama, tmp_path):
    (llama / "config.json").write_text("{")
    assert_refused(llama, tmp_path, "config.json is not valid JSON")


def test_refuses_missing_sources(tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path, "nowhere", FileNotFoundError)
    assert_refused("./no/where", tmp_path, "no/where", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", tmp_path, "config.json", FileNotFoundError)


def test_refuses_an_id_that_the_hub_does_not_give(tmp_path):
    assert_refused("nobody/nothing", tmp_path, "nobody/nothing is no folder.*Hub", FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("score.weight", torch.ones(2, 24), "score.weight"),
        ("model.norm.weight", torch.ones(24, dtype=torch.int8), "model.norm.weight is torch.int8"),
        ("model.norm.weight", torch.ones(23), r"model.norm.weight has shape \[23\].*\[24\]"),
    ],
    ids=["left over", "codes", "shape"],
)
def test_refuses_tensors(name, tensor, match, llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    save_file(weights | {name: tensor}, llama / "model.safetensors")
    assert_refused(llama, tmp_path, match)


def test_refuses_feed_forward_networks_of_several_dtypes(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    save_file(weights | {name: weights[name].bfloat16()}, llama / "model.safetensors")
    assert_refused(llama, tmp_path, rf"{name} is torch.bfloat16, but .*down_proj.weight is torch.float32: save")


def test_refuses_an_output_that_is_not_empty(checkpoint, tmp_path):
    (tmp_path / "moe").mkdir()
    upcycle(checkpoint("llama"), tmp_path / "moe", experts=2, top_k=1, verify=False, progress=False)
    before = files_of(tmp_path)
    assert_refused(checkpoint("llama"), tmp_path, "moe is not empty", FileExistsError)
    assert files_of(tmp_path) == before


def test_verify_sees_a_wrong_expert(checkpoint, tmp_path):
    upcycle(checkpoint("llama"), tmp_path / "moe", experts=2, top_k=1, verify=False, progress=False)
    assert verify(checkpoint("llama"), tmp_path / "moe")["max_abs_diff"] <= 1e-4
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    weights["model.layers.2.mlp.experts.down_proj"][1] *= 1.1
    save_file(weights, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    assert verify(checkpoint("llama"), tmp_path / "moe")["max_abs_diff"] > 1e-2
