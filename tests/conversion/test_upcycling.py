"""Every strategy on every dense family: it loads, generates and starts where its description says."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import upcycle, verify
from hf_moe.conversion.families import DENSE_FAMILIES
from hf_moe.conversion.files import writer
from hf_moe.conversion.upcycling import UPCYCLERS
from hf_moe.conversion.upcycling.router_init import ROUTER_INITS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import tokens
from tests.conversion.conftest import DENSE_CASES, build, files_of

WIDTH = 96  # 3 x 32: pieces of an eighth are still rows of 16 bytes
CALIBRATED = {"calibration": "calibration.txt"}
PROMPTED = {"prompts": "prompts.yaml"}
GENERATION = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

EQUAL = {
    "copy": {"experts": 3, "top_k": 2},
    "copy-hidden": {"experts": 3, "top_k": 1, "router_init": "hidden", **PROMPTED},
    "granular": {"strategy": "granular", "experts": 3, "top_k": 2, "granularity": 8},
    "split-all": {"strategy": "split", "experts": 4, "top_k": 4, **CALIBRATED},
    "carve-all": {"strategy": "carve", "experts": 3, "top_k": 3, "shared": 1, **CALIBRATED},
    "shared-added": {"strategy": "shared", "experts": 3, "top_k": 2, "shared": 2},
    "shared-carved": {"strategy": "shared", "experts": 3, "top_k": 2, "granularity": 4, "carved": True, **CALIBRATED},
    "merge-identical": {"strategy": "merge", "experts": 3, "top_k": 2, "sources": 3},
}
REPORTED = {
    "noise": {"strategy": "noise", "experts": 3, "top_k": 2, "noise_scale": 1e-3},
    "drop": {"strategy": "drop", "experts": 3, "top_k": 2},
    "split": {"strategy": "split", "experts": 4, "top_k": 2},
    "carve": {"strategy": "carve", "experts": 3, "top_k": 2, "shared": 1, **CALIBRATED},
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(61)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture(autouse=True)
def read_words(tokenizer, monkeypatch):
    """Whatever tokenizer a family has in Transformers, these models read words."""
    for name in ("upcycling.evidence", "verify"):
        module = import_module(f"hf_moe.conversion.{name}")
        monkeypatch.setattr(module, "load_tokenizer", lambda folder: tokenizer)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """sources(family) -> folder of a random model with a calibration text and prompts beside it."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            changes = next((changes for name, changes in DENSE_CASES.values() if name == family), {})
            build(family, **{**changes, "intermediate_size": WIDTH}).save_pretrained(folder)
            text = tokens(1, 300, 61, seed=5)[0].tolist()
            (folder / "calibration.txt").write_text(" ".join(f"w{index}" for index in text))
            (folder / "prompts.yaml").write_text("- w1 w2 w3\n- [w4 w5, w6]\n- w7 w8\n")
            folders[family] = folder
        return folders[family]

    return make


@pytest.fixture(scope="session")
def dense(sources):
    """dense(family) -> Transformers' own model, its logits and its greedy text."""
    models: dict[str, tuple] = {}

    def make(family: str) -> tuple:
        if family not in models:
            model = AutoModelForCausalLM.from_pretrained(sources(family), dtype=torch.float32).eval()
            ids = tokens(length=19, vocab_size=61)
            with torch.inference_mode():
                models[family] = ids, model(ids).logits, model.generate(ids, **GENERATION)
        return models[family]

    return make


def convert(source: Path, target: Path, sources: int = 1, **options) -> dict:
    for name in ("calibration", "prompts"):
        if name in options:
            options[name] = source / options[name]
    return upcycle([source] * sources, target, **{"verify": False, "progress": False, **options})


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit, in float32."""
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_every_strategy_is_in_the_matrix():
    tested = {options.get("strategy", "copy") for options in (EQUAL | REPORTED).values()}
    assert tested == set(UPCYCLERS)


@pytest.mark.parametrize("case", EQUAL | REPORTED)
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_matrix(family, case, sources, dense, tmp_path):
    ids, logits, text = dense(family)
    report = convert(sources(family), tmp_path / "moe", **(EQUAL | REPORTED)[case], layers="0,2")
    moe = load(tmp_path / "moe")
    with torch.inference_mode():
        found, told = moe(ids).logits, moe.generate(ids, **GENERATION)
    assert told.shape == text.shape and torch.isfinite(found).all()
    if case in EQUAL:
        assert_equal(found, logits)
        assert torch.equal(told, text)
        assert report["equal_at_step_0"] or case == "merge-identical"
    else:
        assert not report["equal_at_step_0"]
        assert (found - logits).abs().max() > 1e-4
        if case == "noise":
            assert (found - logits).abs().max() < 0.05 * logits.std()


@pytest.mark.parametrize("case", REPORTED)
def test_what_is_not_equal_is_reported(case, sources, tmp_path):
    report = convert(sources("llama"), tmp_path / "moe", **REPORTED[case], verify=True)
    assert report["max_abs_diff"] > 1e-4
    assert math.isfinite(report["perplexity_a"]) and math.isfinite(report["perplexity_b"])


@pytest.mark.parametrize("granularity", [2, 4, 8])
@pytest.mark.parametrize(("family", "act"), [("llama", "silu"), ("mistral", "gelu"), ("qwen3", "relu")])
def test_granular_is_exact_for_any_activation(family, act, granularity, tmp_path):
    model = build(family, intermediate_size=160, hidden_act=act)  # 160 = 5 x 32
    model.save_pretrained(tmp_path / "dense")
    options = {"experts": 5, "top_k": 3, "strategy": "granular", "granularity": granularity}
    report = convert(tmp_path / "dense", tmp_path / "moe", **options)
    moe, ids = load(tmp_path / "moe"), tokens(3, 29, 61)
    assert (moe.config.num_experts, moe.config.num_experts_per_tok) == (5 * granularity, 3 * granularity)
    assert moe.config.moe_intermediate_size == 160 // granularity
    with torch.inference_mode():
        assert_equal(moe(ids).logits, model(ids).logits)
        chosen = moe(ids, output_router_logits=True).router_indices[0]
    whole = (chosen // granularity).sort(dim=-1).values.view(-1, 3, granularity)
    assert torch.equal(whole, whole[..., :1].expand_as(whole)), "a token met part of a network"
    sparse = report["total_params"] - model.num_parameters()
    assert sparse == 3 * (4 * 3 * 24 * 160 + 5 * granularity * 24)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_identical_models_returns_the_model(count, dtype, sources, dense, tmp_path):
    folder = tmp_path / "dense"
    build("llama", dtype, tie_word_embeddings=True, mlp_bias=True).save_pretrained(folder)
    convert(folder, tmp_path / "moe", experts=count, top_k=2, strategy="merge", sources=count, layers="1")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "moe"))
    for name in before.keys() & after.keys():
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    ids = tokens(length=19, vocab_size=61)
    with torch.inference_mode():
        assert_equal(load(tmp_path / "moe")(ids).logits, load(folder)(ids).logits)


@pytest.fixture
def siblings(tmp_path) -> list[Path]:
    """Three models that differ in every weight."""
    folders = []
    for index in range(3):
        folder = tmp_path / f"sibling{index}"
        model = build("qwen2", intermediate_size=WIDTH)
        torch.manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        (folder / "text.txt").write_text(" ".join(f"w{i}" for i in tokens(1, 40, 61, seed=index)[0].tolist()))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("rest", ["average", "0", "2"])
def test_merge_takes_experts_from_each_and_the_rest_as_said(rest, siblings, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.conversion.upcycling.strategy.CHUNK", 50)  # of 24 columns: two rows at a time
    upcycle(
        siblings,
        tmp_path / "moe",
        experts=3,
        top_k=1,
        strategy="merge",
        rest=rest,
        layers="1",
        verify=False,
        progress=False,
    )
    dense = [load_file(folder / "model.safetensors") for folder in siblings]
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    mlp = "model.layers.1.mlp."
    for expert, weights in enumerate(dense):
        up = torch.cat([weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]])
        assert torch.equal(moe[f"{mlp}experts.gate_up_proj"][expert], up)
        assert torch.equal(moe[f"{mlp}experts.down_proj"][expert], weights[f"{mlp}down_proj.weight"])
    others = dense[0].keys() & moe.keys()
    assert len(others) == len(dense[0]) - 3
    for name in others:
        expected = sum(weights[name].double() for weights in dense) / 3
        expected = expected.float() if rest == "average" else dense[int(rest)][name]
        torch.testing.assert_close(moe[name], expected, rtol=1e-6, atol=1e-7)


def test_merge_reports_each_domain_and_where_it_came_from(siblings, tmp_path):
    texts = [folder / "text.txt" for folder in siblings]
    report = upcycle(
        siblings, tmp_path / "moe", experts=3, top_k=2, strategy="merge", domain_texts=texts, progress=False
    )
    json.dumps(report)
    assert [domain["source"] for domain in report["domains"]] == [folder.name for folder in siblings]
    assert len({domain["perplexity_a"] for domain in report["domains"]}) == 3
    assert all(domain["tokens"] == 40 for domain in report["domains"])
    card = (tmp_path / "moe" / "README.md").read_text()
    for folder, text, domain in zip(siblings, texts, report["domains"], strict=True):
        alone = verify(folder, tmp_path / "moe", data=text)
        assert alone.items() <= domain.items()
        perplexities = f"{alone['perplexity_a']:.4g} | {alone['perplexity_b']:.4g}"
        assert f"\n| {folder.name} | text.txt | {perplexities} |" in card
    provenance = json.loads((tmp_path / "moe" / "config.json").read_text())["provenance"]
    digests = [provenance["sha256"], *(sibling["sha256"] for sibling in provenance["siblings"])]
    assert len({digest["model.safetensors"] for digest in digests}) == 3
    assert str(tmp_path) not in json.dumps(provenance)


@pytest.mark.parametrize("start", ROUTER_INITS)
def test_router_starts(start, sources, dense, tmp_path):
    """Any start leaves copies equal; the rows have the size that was asked for."""
    options = {
        name: CALIBRATED.get(name) or PROMPTED[name] for name in ROUTER_INITS[start].options if name != "router_std"
    }
    std = {} if start == "zero" else {"router_std": 0.07}
    convert(sources("llama"), tmp_path / "moe", experts=3, top_k=2, router_init=start, **options, **std)
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    rows = torch.stack([weights[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(3)])
    assert rows.square().mean().sqrt().item() == pytest.approx(0.0 if start == "zero" else 0.07, rel=0.2)
    same = start in ("zero", "cheap_embed")  # one start for all layers
    assert torch.equal(rows[0], rows[1]) == same
    ids, logits, _ = dense("llama")
    with torch.inference_mode():
        assert_equal(load(tmp_path / "moe")(ids).logits, logits)


def test_hidden_states_of_prompts_are_those_of_the_dense_model(sources, tmp_path):
    source = sources("qwen2")
    convert(source, tmp_path / "moe", experts=3, top_k=1, router_init="hidden", **PROMPTED)
    model = load(source)
    seen = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    means = []
    for prompts in ([[1, 2, 3]], [[4, 5], [6]], [[7, 8]]):
        seen.clear()
        with torch.inference_mode():
            for ids in prompts:
                model(torch.tensor([ids]))
        means.append(torch.cat(seen).mean(dim=0))
    expected = torch.stack(means) - torch.stack(means).mean(dim=0)
    expected = expected / expected.square().mean(dim=-1, keepdim=True).sqrt() * 0.02
    found = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [("split", 4, 2), ("carve", 3, 1)], ids=["split", "carve"])
def test_neurons_are_grouped_on_a_real_text(case, shared_data, tmp_path, monkeypatch):
    """Rows of text, the model's own tokenizer: grouped neurons and their router beat random ones, half at work."""
    monkeypatch.undo()
    strategy, experts, top_k = case
    stories = shared_data / "stories260K-hf"
    text, held_out = (shared_data / "text" / "tinystories" / f"{name}.jsonl" for name in ("train", "val"))
    (tmp_path / "rows.jsonl").write_text("".join(text.read_text().splitlines(keepends=True)[:30]))
    (tmp_path / "held_out.txt").write_text(json.loads(held_out.read_text().splitlines()[0])["text"])
    options = {"verify": False, "progress": False}
    upcycle(stories, tmp_path / "random", experts=4, top_k=2, strategy="split", **options)
    options |= {"strategy": strategy, "calibration": tmp_path / "rows.jsonl"}
    upcycle(stories, tmp_path / "grouped", experts=experts, top_k=top_k, **options)
    grouped, random = (
        verify(stories, tmp_path / name, data=tmp_path / "held_out.txt") for name in ("grouped", "random")
    )
    assert grouped["perplexity_a"] < grouped["perplexity_b"] < 0.8 * random["perplexity_b"]


def test_layers_and_their_strategies(sources, tmp_path):
    source = sources("llama")
    report = convert(
        source, tmp_path / "moe", experts=3, top_k=2, layers="0=drop,1-2/2", strategy="copy", drop_ratio=0.25
    )
    assert not report["equal_at_step_0"]
    weights, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "moe", source))
    assert "model.layers.2.mlp.gate.weight" not in weights
    downs = [weights[f"model.layers.{layer}.mlp.experts.down_proj"] for layer in (0, 1)]
    changed = [
        (down != dense[f"model.layers.{layer}.mlp.down_proj.weight"]).any(1).sum(-1)
        for layer, down in enumerate(downs)
    ]
    assert changed[0].tolist() == [WIDTH // 4] * 3 and changed[1].tolist() == [0] * 3
    provenance = json.loads((tmp_path / "moe" / "config.json").read_text())["provenance"]
    assert provenance["strategy"] == "copy, drop"
    assert provenance["arguments"] == {
        **{"experts": 3, "top_k": 2, "layers": "0=drop,1-2/2", "granularity": 1, "drop_ratio": 0.25},
        **{"router_init": "normal", "router_std": 0.02},
    }
    convert(source, tmp_path / "every", experts=2, top_k=1, layers="all/2")
    config = json.loads((tmp_path / "every" / "config.json").read_text())
    assert config["mlp_layer_types"] == ["sparse", "dense", "sparse"]


@pytest.mark.parametrize("case", ["noise", "drop", "split", "carve", "shared-carved", "copy-hidden"])
def test_same_input_same_bytes(case, sources, tmp_path):
    options = (EQUAL | REPORTED)[case]
    folders = [tmp_path / name / "moe" for name in "ab"]
    for folder in folders:
        convert(sources("llama"), folder, **options)
    assert files_of(folders[0]) == files_of(folders[1])
    draws = case in ("noise", "drop", "split", "carve")
    convert(sources("llama"), tmp_path / "c", **options, seed=1)
    first, other = (load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path / "c"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(first[name], other[name]) != draws
    if draws:
        assert not torch.equal(first[name], first[name.replace("1", "0")])


@pytest.mark.parametrize("case", ["copy", "noise", "drop", "split", "carve", "shared-carved"])
def test_works_on_the_cpu_whatever_the_default_device(case, sources, tmp_path):
    options = (EQUAL | REPORTED)[case]
    convert(sources("llama"), tmp_path / "a" / "moe", **options)
    with torch.device("meta"):
        convert(sources("llama"), tmp_path / "b" / "moe", **options)
    assert files_of(tmp_path / "a" / "moe") == files_of(tmp_path / "b" / "moe")


@pytest.mark.parametrize("case", ["noise", "carve", "merge-identical"])
def test_goes_on_to_the_same_bytes(case, sources, tmp_path, monkeypatch):
    options = {**(EQUAL | REPORTED)[case], "max_shard_size": "15KB"}
    whole, broken = (tmp_path / name / "moe" for name in ("whole", "broken"))
    convert(sources("llama"), whole, **options)
    write, written = writer.write_shard, []

    def interrupted(folder, shard, advance):
        written.append(shard)
        if len(written) > 3:
            raise KeyboardInterrupt
        return write(folder, shard, advance)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(sources("llama"), broken, **options)
    if "calibration" in options:
        text = sources("llama") / "other.txt"
        text.write_text("w5 w6 w7")
        with pytest.raises(ValueError, match="calibration"):
            convert(sources("llama"), broken, **options | {"calibration": "other.txt"}, resume=True)
    convert(sources("llama"), broken, **options, resume=True)
    assert files_of(broken) == files_of(whole)


BAD = {
    "granular without": ({"strategy": "granular"}, "strategy 'granular' needs granularity"),
    "granularity": ({"granularity": 7}, r"96 cannot be cut into granularity \(7\).*2, 3, 4"),
    "granularity below 1": ({"granularity": -2}, r"granularity \(-2\)"),
    "granularity unread": ({"strategy": "split", "granularity": 2}, r"granularity \(2\) has no effect.*'copy'"),
    "shared unread": ({"shared": 1}, r"shared \(1\) has no effect.*'carve'.*'shared'"),
    "unknown option": ({"colour": 3}, r"colour \(3\) has no effect.*nothing reads it"),
    "noise unread": ({"noise_scale": 0.1}, "noise_scale.*'noise'"),
    "noise 0": ({"strategy": "noise", "noise_scale": 0.0}, r"noise_scale \(0.0\)"),
    "noise without end": ({"strategy": "noise", "noise_scale": float("inf")}, r"noise_scale \(inf\)"),
    "std no number": ({"router_std": float("nan")}, r"router_std \(nan\)"),
    "drop above 1": ({"strategy": "drop", "drop_ratio": 1.5}, r"drop_ratio \(1.5\)"),
    "split width": ({"strategy": "split", "experts": 7}, r"experts \(7\)"),
    "carve without text": ({"strategy": "carve"}, "strategy 'carve' needs calibration"),
    "carve width": ({"strategy": "carve", "shared": 3, **CALIBRATED}, r"experts \+ shared \(7\)"),
    "carved too much": ({"strategy": "shared", "carved": True, "shared": 2, "granularity": 2}, r"shared \(2\).*\(2\)"),
    "text for nothing": ({"strategy": "shared", **CALIBRATED}, "say carved"),
    "text unread": (CALIBRATED, "calibration.*has no effect"),
    "router": ({"router_init": "magic"}, "'magic'.*normal, zero"),
    "router without prompts": ({"router_init": "hidden"}, "router_init 'hidden' needs prompts"),
    "router without text": ({"router_init": "centroids"}, "router_init 'centroids' needs calibration"),
    "prompts unread": (PROMPTED, "prompts.*'cheap_embed'"),
    "prompts for another number": ({"router_init": "hidden", **PROMPTED}, r"prompts \(3\).*experts \(4\)"),
    "std of zeros": ({"router_init": "zero", "router_std": 0.1}, "router_std"),
    "zeros and pieces": ({"router_init": "zero", "granularity": 2}, "'zero' cannot tell whole networks apart"),
    "merge of one": ({"strategy": "merge"}, "at least 2 sources"),
    "several for copy": ({"sources": 2}, "takes 1 source, not 2"),
    "merge and experts": ({"strategy": "merge", "sources": 3}, r"experts \(4\).*\(3\)"),
    "rest": ({"strategy": "merge", "sources": 4, "rest": "4"}, "'4'.*0 to 3"),
    "domain texts": (
        {"strategy": "merge", "sources": 4, "domain_texts": ["a"], "verify": True},
        r"domain_texts \(1\)",
    ),
    "domain texts unread": (
        {"strategy": "merge", "sources": 4, "domain_texts": ["a", "b", "c", "d"]},
        "domain_texts has no effect with verify=False",
    ),
    "layer twice": ({"layers": "0-1,1"}, "layer 1 twice"),
    "strategy of a layer": ({"layers": "all=magic"}, "'magic'.*copy"),
    "strategy of no layer": ({"strategy": "drop", "layers": "0=copy"}, "strategy 'drop' has no effect"),
    "unlike layers": ({"layers": "0=split,1=copy"}, "'copy' and 'split' cannot share"),
}


@pytest.mark.parametrize(("options", "match"), BAD.values(), ids=BAD)
def test_refusals(options, match, sources, tmp_path):
    with pytest.raises(ValueError, match=match) as raised:
        convert(sources("llama"), tmp_path / "moe", **{"experts": 4, "top_k": 2, **options})
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


BAD_FILES = {
    "no calibration": ("calibration", "no.txt", None, FileNotFoundError, "no.txt"),
    "empty calibration": ("calibration", "text.txt", " \n", ValueError, "empty"),
    "rows without text": ("calibration", "rows.jsonl", '{"words": "w1"}', ValueError, "columns words"),
    "rows with no text": ("calibration", "rows.jsonl", '{"text": null}', ValueError, "row 1 .* None"),
    "rows of numbers": ("calibration", "rows.jsonl", '{"text": 5}', ValueError, "row 1 .* 5"),
    "no rows": ("calibration", "rows.jsonl", "", ValueError, "empty"),
    "no prompts": ("prompts", "no.yaml", None, FileNotFoundError, "no.yaml"),
    "prompts no yaml": ("prompts", "p.yaml", "[", ValueError, "no valid YAML"),
    "prompts no list": ("prompts", "p.yaml", "a: b", ValueError, "must be a list"),
    "prompts empty": ("prompts", "p.yaml", "- w1\n- []", ValueError, "must be a list"),
    "prompts alike": ("prompts", "p.yaml", "- w1\n- w2\n- w1", ValueError, "experts 0 and 2"),
}


@pytest.mark.parametrize(("option", "name", "text", "error", "match"), BAD_FILES.values(), ids=BAD_FILES)
def test_refuses_files(option, name, text, error, match, sources, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    before = files_of(tmp_path)
    start = "hidden" if option == "prompts" else "centroids"
    with pytest.raises(error, match=match) as raised:
        convert(sources("llama"), tmp_path / "moe", experts=3, top_k=2, router_init=start, **{option: tmp_path / name})
    assert "\n" not in str(raised.value)
    assert files_of(tmp_path) == before


def test_refuses_sources_that_are_no_siblings(sources, siblings, tmp_path):
    def refused(match, *folders):
        with pytest.raises(ValueError, match=match):
            upcycle(folders, tmp_path / "moe", experts=2, top_k=1, strategy="merge", progress=False)
        assert not (tmp_path / "moe").exists()

    refused("qwen2.*llama|llama.*qwen2", siblings[0], sources("llama"))
    build("qwen2", intermediate_size=WIDTH, rms_norm_eps=1e-3).save_pretrained(tmp_path / "eps")
    refused("rms_norm_eps=0.001", siblings[0], tmp_path / "eps")
    half = {name: weight.half() for name, weight in load_file(siblings[1] / "model.safetensors").items()}
    save_file(half, siblings[1] / "model.safetensors", metadata={"format": "pt"})
    refused("float16", siblings[0], siblings[1])
    texts = [siblings[0] / "text.txt", tmp_path / "nowhere"]
    with pytest.raises(FileNotFoundError, match=r"no domain text .*nowhere"):
        upcycle([siblings[0]] * 2, tmp_path / "moe", experts=2, top_k=1, strategy="merge", domain_texts=texts)
    texts[1].write_text("")
    with pytest.raises(ValueError, match="nowhere has 0 tokens"):
        upcycle([siblings[0]] * 2, tmp_path / "moe", experts=2, top_k=1, strategy="merge", domain_texts=texts)
    assert not (tmp_path / ".moe.partial").exists()


def test_needs_a_tokenizer_only_to_read(checkpoint, sources, tmp_path, monkeypatch):
    monkeypatch.undo()
    text = sources("llama") / "calibration.txt"
    with pytest.raises(ValueError, match="no tokenizer"):
        upcycle(checkpoint("llama"), tmp_path / "moe", experts=2, top_k=1, router_init="centroids", calibration=text)
