"""verify: its figures against a direct computation, and what cannot be compared."""

import json
import math
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch
from hf_moe.conversion import upcycle, verify
from hf_moe.conversion.files import file_backed
from hf_moe.conversion.verify import RANDOM, TEXTS, token_ids, unusable
from hf_moe_cli import main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tests.conversion.conftest import build

# What a small vocabulary has to have words of to be compared on each text; the last one has words of none.
WORDS = {**TEXTS, RANDOM: "\N{SNOWMAN} \N{COMET}"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models, the second a little off."""
    folder = tmp_path_factory.mktemp("pair")
    model = build("llama")
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    model.save_pretrained(folder / "b")
    return folder / "a", folder / "b"


def test_figures(pair):
    a, b = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in pair)
    report = verify(*pair, max_tokens=150, seed=5)
    ids, text = token_ids(pair[0], None, 61, 150, 5)
    assert text == report["text"] == "random token ids"
    distances, divergences, agreements, losses = [], [], [], []
    with torch.inference_mode():
        for start in range(0, 150, 64):  # max_position_embeddings
            part = ids[start : start + 64]
            x, y = (model(part[None]).logits[0].double() for model in (a, b))
            distances.append((x - y).abs().flatten())
            p, q = x.softmax(-1), y.softmax(-1)
            divergences.append((p * (p / q).log()).sum(-1))
            agreements.append(x.argmax(-1) == y.argmax(-1))
            losses.append([torch.nn.functional.cross_entropy(z[:-1], part[1:], reduction="none") for z in (x, y)])
    assert report["tokens"] == 150
    assert report["max_abs_diff"] == pytest.approx(torch.cat(distances).max().item(), rel=1e-4)
    assert report["mean_abs_diff"] == pytest.approx(torch.cat(distances).mean().item(), rel=1e-4)
    assert report["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert report["top1_agreement"] == pytest.approx(torch.cat(agreements).double().mean().item())
    for name, loss in zip("ab", zip(*losses, strict=True), strict=True):
        assert report[f"perplexity_{name}"] == pytest.approx(torch.cat(loss).mean().exp().item(), rel=1e-4)
    assert report["top1_agreement"] < 1


def test_a_model_equals_itself(pair):
    report = verify(pair[0], pair[0], max_tokens=70)
    assert (report["max_abs_diff"], report["mean_abs_diff"], report["kl"], report["top1_agreement"]) == (0, 0, 0, 1)


def test_experts_of_any_width(tmp_path):
    # Transformers' grouped product refuses rows that are no multiple of 16 bytes.
    model = build("mixtral", intermediate_size=19, num_local_experts=3)
    for name, fused in [("fused", True), ("per-expert", False)]:
        model.save_pretrained(tmp_path / name, save_original_format=not fused)
    report = verify(tmp_path / "fused", tmp_path / "per-expert", max_tokens=40)
    assert report["max_abs_diff"] == 0 and report["tokens"] == 40


@pytest.mark.parametrize("room", [True, False])
def test_experts_one_by_one_are_put_together_on_the_disk(room, tmp_path, monkeypatch):
    model = build("mixtral").to(torch.bfloat16)
    for name, fused in [("fused", True), ("per-expert", False)]:
        model.save_pretrained(tmp_path / name, save_original_format=not fused)
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    if not room:
        monkeypatch.setattr(file_backed.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    placed = []
    load = file_backed.by_transformers

    def loads(folder, trust_remote_code, **where):
        placed.append(where)
        loaded = load(folder, trust_remote_code, **where)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"meta" if room else "cpu"}
        assert any(aside.rglob("*.safetensors")) == room
        return loaded

    monkeypatch.setattr(file_backed, "by_transformers", loads)
    report = verify(tmp_path / "fused", tmp_path / "per-expert", max_tokens=40)
    assert report["max_abs_diff"] == 0 and report["cached_text_equal"]
    assert len(placed) == 1 and not any(aside.iterdir())


@pytest.mark.parametrize("expected", WORDS)
def test_text_is_one_that_the_tokenizer_covers(expected, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS[expected]] * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    ids, text = token_ids(tmp_path, None, 500, 512, 0)
    assert text == expected
    if expected in TEXTS:
        assert tokenizer.decode(ids.tolist()) == TEXTS[expected]


@pytest.mark.parametrize(("factor", "warned"), [(1.02, False), (3.0, True)])
def test_a_conversion_that_leaves_nothing_usable_says_so(factor, warned, pair, tmp_path, capsys):
    report = upcycle(pair[0], tmp_path / "moe", experts=2, top_k=1, progress=False)
    assert report["warning"] is None
    changed = {"kl": math.log(factor), "top1_agreement": 0.03}
    said = unusable(report | changed)
    assert bool(said) == warned
    if warned:
        assert "3 times the source's" in said and "3.0%" in said and "\n" not in said
        assert "no number" in unusable(report | {"kl": float("inf"), "top1_agreement": 0.0})
        assert unusable(report | {"kl": float("nan"), "top1_agreement": 0.0})


def test_warning_stands_on_standard_error_and_in_the_card(shared_data, tmp_path, capsys):
    source, moe = shared_data / "stories260K-hf", tmp_path / "moe"
    arguments = ["--experts", "2", "--top-k", "1", "--strategy", "drop", "--drop-ratio", "0.9"]
    assert main(["upcycle", str(source), str(moe), *arguments]) == 0
    out, err = capsys.readouterr()
    (warning,) = (line for line in err.splitlines() if "not usable" in line)
    assert "perplexity of the source" in out and "perplexity of the result" in out and "simple words" in out
    assert warning.removeprefix("hf-moe: ") in (moe / "README.md").read_text()
    assert main(["verify", str(source), str(moe)]) == 1
    assert f"perplexity of {moe}" in capsys.readouterr().out


def test_a_cache_that_is_not_read_is_seen(tmp_path, request, capsys):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    report = verify(tmp_path, tmp_path, max_tokens=40)
    assert report["cached_text_equal"] is True and report["cache_max_abs_diff"] < 1e-4
    request.getfixturevalue("cache_is_forgotten")
    report = verify(tmp_path, tmp_path, max_tokens=40)
    assert report["max_abs_diff"] == 0  # logits without a cache say nothing of it
    assert report["cached_text_equal"] is False and report["cache_max_abs_diff"] > 0.1
    assert main(["verify", str(tmp_path), str(tmp_path)]) == 1
    assert "the text with a cache is not the text without" in capsys.readouterr().err


def test_a_capacity_in_evaluation_leaves_nothing_to_compare(tmp_path):
    tiny_model(router_args={"eval_capacity_factor": 1.0}).save_pretrained(tmp_path)
    assert verify(tmp_path, tmp_path, max_tokens=40)["cached_text_equal"] is None


def test_a_nan_is_not_passed_over(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    report = verify(pair[0], tmp_path, max_tokens=20)
    assert not report["max_abs_diff"] <= 1


def test_reads_a_text(shared_data, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl. " * 30)
    model = shared_data / "stories260K-hf"
    report = verify(model, model, data=tmp_path / "text.txt", max_tokens=300)
    assert report["tokens"] == 300
    own = verify(model, model)
    assert own["perplexity_a"] > report["perplexity_a"]


def test_refuses(pair, tmp_path, shared_data):
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(ValueError, match="no tokenizer"):
        verify(*pair, data=tmp_path / "text.txt")
    with pytest.raises(ValueError, match="max_tokens is 1; it must be at least 2"):
        verify(*pair, max_tokens=1)
    stories = shared_data / "stories260K-hf"
    with pytest.raises(ValueError, match=r"61 tokens.*512"):
        verify(pair[0], stories)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt has [01] tokens"):
        verify(stories, stories, data=tmp_path / "empty.txt")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "stub" / "model.safetensors").write_bytes(b"12345678")
    for model, match in [("nowhere", "nowhere does not exist"), ("stub", "truncated"), ("", "config.json")]:
        with pytest.raises((ValueError, FileNotFoundError), match=match) as raised:
            verify(stories, tmp_path / model)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        verify(stories, stories, data=tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is no text in UTF-8"):
        verify(stories, stories, data=tmp_path / "latin.txt")


UNLIKE = {
    "a layer more": ({"num_hidden_layers": 4}, r"lacks \d+ of .* the first of them model\.layers\.3\."),
    "another width": ({"intermediate_size": 40}, r"in another size, .*mlp\.\w+\.weight: \[.*36.*\] for \[.*40"),
    "one position": ({"max_position_embeddings": 1}, r"max_position_embeddings=1, but a text takes at least 2"),
    "fewer than none": ({"max_position_embeddings": -1}, r"max_position_embeddings=-1, but a text takes at least 2"),
    "activation": ({"hidden_act": "magic"}, "'magic' is missing or unknown"),
    "model_type": ({"model_type": ["llama"]}, r"model_type=\['llama'\], which is no str"),
    "quantization": ({"quantization_config": "int8"}, "quantization_config='int8', which is no dict"),
}


@pytest.mark.parametrize(("changes", "match"), UNLIKE.values(), ids=UNLIKE)
def test_refuses_a_model_that_is_not_what_its_config_says(changes, match, pair, tmp_path):
    said = json.loads((pair[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | changes))
    shutil.copyfile(pair[1] / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match) as raised:
        verify(pair[0], tmp_path, max_tokens=10)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_compared_is_said_before_it_is_converted(pair, tmp_path):
    source = shutil.copytree(pair[0], tmp_path / "source")
    said = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 1}
    (source / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="max_position_embeddings=1, but a text takes at least 2"):
        upcycle(source, tmp_path / "out", experts=2, top_k=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
