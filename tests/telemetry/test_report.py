"""The whole of `trace`: the files it writes, what they say, and what it refuses."""

import copy
import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hf_moe.telemetry import trace
from hf_moe.telemetry.findings import findings, percent
from hf_moe.telemetry.report import draw_all, render, writing

from ..training.models import hf_moe
from .conftest import FIELDS, MODELS

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.said = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.said.append(data)


def check_page(text):
    """Nothing is fetched, every link has a target, every figure a name, and ids are unique."""
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert all(x.startswith(("#", "data:")) for x in links)
    assert {x[1:] for x in links if x.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    labelled = [value for tag, name, value in page.attributes if tag == "figure" and name == "aria-label"]
    assert len(labelled) == page.tags.count("figure")
    assert page.tags.count("script") == 2
    return page


@pytest.fixture
def one_figure(monkeypatch):
    """Draw the first figure alone, to save time."""
    figures = pytest.importorskip("hf_moe.telemetry.figures", exc_type=ImportError)
    monkeypatch.setattr(figures, "FIGURES", {"load": figures.load})


def test_report_of_a_saved_model(saved, texts, tmp_path):
    pytest.importorskip("matplotlib")
    torch.set_num_threads(1)
    out = tmp_path / "out"
    data = [str(texts / "river.txt"), f"{HOSTILE}={texts / 'dogs.jsonl'}"]
    summary = trace(saved, data, out, compare=[saved], prune_tokens=128 * 5, progress=False)
    numbers = json.loads((out / "numbers.json").read_text())
    page = check_page((out / "report.html").read_text())

    assert summary["tokens"] == numbers["tokens"] == sum(domain["tokens"] for domain in numbers["domains"])
    assert summary["layers"] == 2 and summary["experts"] == 12 and summary["pruning_trials"] == 5
    assert [len(layer["load"]) for layer in numbers["layers"]] == [6, 6]
    assert numbers["saturation"][0]["layers"] == [1.0, 1.0]
    assert len(numbers["passages"][0]["experts"]) == 2 and summary["findings"] == numbers["findings"]
    pictures = {path.stem for path in (out / "figures").iterdir()}
    sections = {"load", "entropy", "similarity", "vocabulary", "saturation", "pruning"}
    assert pictures == sections | {f"{name}-layer-{i}" for name in ("domains", "coactivation") for i in (0, 1)}
    assert all((out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert page.tags.count("figure") == page.tags.count("svg") == len(pictures)
    for finding in summary["findings"]:
        assert any(finding.rpartition(" (")[0] in said for said in page.said)
    assert any(HOSTILE in said for said in page.said)
    assert not list(tmp_path.glob(".*"))


def test_a_loaded_model_is_left_as_it_was(texts, tokenizer, tmp_path, one_figure):
    torch.set_num_threads(1)
    model = MODELS["deepseek_v3"]().train()
    state = copy.deepcopy(model.state_dict())
    data = {"river": texts / "river.txt", "said": ["A dog ran.", "It ran on."]}
    summary = trace(model, data, tmp_path / "out", tokenizer=tokenizer, prune_tokens=128 * 12, progress=False)
    assert list(summary["perplexity"]) == ["river", "said"]
    assert summary["pruning_trials"] == 12 and summary["model"] == "DeepseekV3ForCausalLM"
    assert model.training and all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def numbers_by_hand() -> dict:
    """Two layers of four experts in which everything stands out."""
    layer = {
        "router": "layers.0.gate",
        "label": "0",
        "experts": 4,
        "top_k": 2,
        "experts_per_token": {"mean": 2.0, "spread": 0.0},
        "tokens": [100, 90, 10, 0],
        "load": [2.0, 1.8, 0.2, 0.0],
        "first_choice": [0.5, 0.45, 0.05, 0.0],
        "dead": [3],
        "load_entropy": 0.6,
        "routing_entropy": 0.4,
        "coactivation": [[0, 0.9, 0.1, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0]],
        "domain_specialization": [[1.0, 0.9, 0.1, 0.0]],
        "vocabulary_specialization": {"read": 0.8, "predicted": 0.6, "chance": 0.5},
        "favourite_tokens": [[[HOSTILE, 0.9, 12]], [], [], []],
        "weight_similarity": None,
        "output_similarity": [[1.0] * 4] * 4,
        "duplicates": [[0, 1]],
        "pruning": [{"expert": 0, "loss_change": 0.5, "standard_error": 0.1}],
    }
    even = {"router": "layers.1.gate", "label": "1", "load": [1.0] * 4, "dead": [], "duplicates": [], "pruning": []}
    return {
        "hf_moe_version": "0",
        "model": f"models/{HOSTILE}",
        "model_type": "hf_moe",
        "dtype": "float32",
        "parameters": 10,
        "tokens": 100,
        "pruning_tokens": 128,
        "domains": [{"name": "a", "source": "a.txt", "tokens": 100, "perplexity": None}],
        "layers": [layer, layer | even],
        "saturation": [],
        "passages": [{"domain": "a", "tokens": [HOSTILE, "x\n"], "experts": [[0, 3], [1, 2]]}],
    }


def test_findings_say_what_stands_out():
    said = [finding.text for finding in findings(numbers_by_hand())]
    for part in (
        "Layer 0 sends 50% of its choices to 1 of 4 experts; with an even load they would get 25%",
        "The busiest, expert 0, gets 2.0 times its fair share",
        "1 of 8 experts got not one token: expert 3 of layer 0",
        "2 experts have a near copy in their layer: 0, 1 of layer 0",
        "40% of the entropy of equal ones",
        "goes to its favourite expert 80% of the time, against 50%",
        "Of the 1 of 8 experts that were tried, of those with the least load, 0 can each go",
        "Losing expert 0 of layer 0 costs most: +0.500 nats",
    ):
        assert any(part in text for text in said), part
    assert said[0].startswith("Layer 0 sends")  # what needs attention comes first


def special_layer(place: int, count: int) -> dict:
    """Numbers of `count` layers, of which one has an expert of a domain and a pair that works together."""
    numbers = numbers_by_hand()
    even = numbers["layers"][1] | {"tokens": [50] * 4, "coactivation": [[0, 0.3, 0.3, 0.3]] * 4}
    even |= {"domain_specialization": [[0.5] * 4] * 2, "load": [1.0, 1.0, 1.0, 0.05]}
    special = {"domain_specialization": [[0.9, 0.4, 0.4, 0.3], [0.1, 0.6, 0.6, 0.7]], "load": [1.3, 0.9, 0.9, 0.9]}
    special |= {"coactivation": [[0, 1.0, 0, 0], [1.0, 0, 0, 0], [0] * 4, [0] * 4]}
    numbers["domains"] = [{"name": name, "source": name, "tokens": 9, "perplexity": 1.5} for name in ("a", "b")]
    numbers["layers"] = [
        even | {"router": f"layers.{i}.gate", "label": str(i)} | (special if i == place else {}) for i in range(count)
    ]
    return numbers


def test_every_finding_names_its_place_its_figure_and_its_sample(tmp_path):
    pytest.importorskip("matplotlib")
    numbers = special_layer(4, 9)  # neither the first nor the middle, nor the last
    numbers["layers"][4], numbers["layers"][3] = numbers["layers"][3], numbers["layers"][4]
    found = findings(numbers)
    draw_all(tmp_path / "figures", numbers)
    for finding in found:
        assert (tmp_path / "figures" / f"{finding.figure}.png").is_file(), finding
        assert re.search(r"\d[\d,]* tokens", finding.sample) and str(finding).endswith(f"{finding.figure}.png)")
    by_section = {finding.section: finding for finding in found}
    label = numbers["layers"][3]["label"]
    assert by_section["domains"].figure == f"domains-layer-{label}" and f"of layer {label}" in str(found)
    assert by_section["coactivation"].layer == label
    idle = next(finding.text for finding in found if "less than a tenth" in finding.text)
    assert "expert 3 of layer 0, expert 3 of layer 1" in idle and "4 more" in idle


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (1.0, "100%"),
        (0.99996, "over 99.99%"),
        (0.9996, "99.96%"),
        (0.42, "42%"),
        (0.042, "4.2%"),
        (0.0001, "under 0.1%"),
        (0, "0%"),
    ],
)
def test_shares_are_not_rounded_to_all_or_nothing(share, said):
    assert percent(share) == said


def test_nothing_published_has_a_path_of_this_machine(saved, texts, tmp_path):
    pytest.importorskip("matplotlib")
    before = tmp_path / "before"
    shutil.copytree(saved, before)
    out = tmp_path / "out"
    trace(str(saved), str(texts / "river.txt"), out, compare=[str(before)], prune_tokens=0, progress=False)
    for file in ("report.html", "numbers.json"):
        text = (out / file).read_text()
        assert str(tmp_path) not in text and str(texts) not in text and str(saved) not in text
        assert saved.name in text and "river.txt" in text and "before" in text


def test_the_page_escapes_what_comes_from_data():
    numbers = numbers_by_hand()
    panel = {"title": "", "wide": False, "svg": ""}
    names = ("load", "entropy", "similarity", "domains", "vocabulary", "coactivation", "pruning")
    panels = {name: [panel] for name in names}
    text = render(numbers, findings(numbers), panels)
    page = check_page(text)
    assert HOSTILE not in text and sum(HOSTILE in said for said in page.said) >= 3
    assert 'id="saturation"' not in text


def test_a_dense_model(texts, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    model = hf_moe(**FIELDS, mlp_layer_types=["dense", "dense"])
    with pytest.raises(ValueError, match="is a dense model \\(hf_moe\\): it has no router to trace"):
        trace(model, texts / "river.txt", tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, -1])
def test_a_model_that_reads_no_text(count, texts, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    model = hf_moe(**FIELDS | {"max_position_embeddings": count})
    with pytest.raises(ValueError, match=f"max_position_embeddings={count}, but a text takes at least 2"):
        trace(model, texts / "river.txt", tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_content(texts, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty"):
        trace("nothing", texts / "river.txt", tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("part", ["numbers.json", "load.png"])
def test_a_full_disk(tmp_path, monkeypatch, part):
    pytest.importorskip("matplotlib")

    def full(write):
        def wrapped(path, content, *args, **kwargs):
            if path.name == part:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, content, *args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("write_text", "write_bytes"):
            patch.setattr(Path, name, full(getattr(Path, name)))
        with (
            pytest.raises(OSError, match=re.escape(f"The disk that holds {tmp_path / 'out'} is full")),
            writing(tmp_path / "out") as write,
        ):
            write(numbers_by_hand())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_tokens": 1}, "max_tokens is 1; it must be at least 2"),
        ({"prune_tokens": -1}, "prune_tokens is -1; it must be at least 0"),
    ],
)
def test_numbers_out_of_range(texts, tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        trace("nothing", texts / "river.txt", tmp_path / "out", **given)


def test_a_checkpoint_with_other_routers_is_refused_before_the_work(saved, texts, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("hf_moe.telemetry.tracing.Run.count_routing", None)
    other = tmp_path / "other"
    MODELS["olmoe"](num_experts=4, num_hidden_layers=1).save_pretrained(other)  # needs no tokenizer of its own
    said = r"cannot be compared with .*: they have not the same routers, but 2 and 1; model\.layers\.1\.mlp\.gate is"
    with pytest.raises(ValueError, match=said):
        trace(saved, texts / "river.txt", tmp_path / "out", compare=[other], prune_tokens=0, progress=False)


def test_a_checkpoint_that_is_not_there_shows_before_the_work(saved, texts, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("hf_moe.telemetry.tracing.load", None)
    with pytest.raises(FileNotFoundError, match=r"\./nothing is neither a folder nor a model id"):
        trace(saved, texts / "river.txt", tmp_path / "out", compare=["./nothing"], progress=False)


def test_a_model_without_tokenizer(texts, tmp_path):
    pytest.importorskip("matplotlib")
    MODELS["olmoe"]().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model has no tokenizer"):
        trace(tmp_path / "model", texts / "river.txt", tmp_path / "out", progress=False)


def test_one_expert_alone_is_no_toss():
    numbers = numbers_by_hand()
    numbers["layers"] = [layer | {"experts": 1, "routing_entropy": 1.0} for layer in numbers["layers"]]
    assert not [finding for finding in findings(numbers) if finding.section == "entropy"]


def test_a_budget_for_less_than_one_expert_tries_none(saved, texts, tmp_path, one_figure, capfd):
    summary = trace(saved, texts / "river.txt", tmp_path / "out", prune_tokens=2)
    assert summary["pruning_trials"] == 0
    assert "prune" not in capfd.readouterr().err


def test_one_expert_that_was_tried():
    numbers = numbers_by_hand()
    numbers["layers"][0]["pruning"] = [{"expert": 0, "loss_change": 0.0, "standard_error": 0.1}]
    said = [finding.text for finding in findings(numbers) if finding.section == "pruning"]
    assert said == [
        "Nothing was lost without any one of the 1 of 8 experts that were tried, of those with the least load."
    ]
