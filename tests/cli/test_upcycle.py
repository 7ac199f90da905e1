"""`hf-moe upcycle`: every option arrives, and only a broken promise is a failure."""

import json

import pytest
import yaml

from hf_moe.demo import DEMO_MODEL

TEXT = "Once upon a time there was a postcard. It travelled over the sea and came home again. " * 4


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(["a letter from the sea", ["a dog", "a cat at home"]]))
    return {"{text}": tmp_path / "text.txt", "{prompts}": tmp_path / "prompts.yaml"}


RUNS = {
    "noise": ("--strategy noise --noise-scale 0.01", {"noise_scale": 0.01}, False),
    "drop on every second layer": ("--strategy drop --drop-ratio 0.1 --layers all/2", {"drop_ratio": 0.1}, False),
    "granular": ("--granularity 4 --router-std 0.1", {"granularity": 4, "router_std": 0.1}, True),
    "carve": ("--strategy carve --shared 2 --calibration {text}", {"shared": 2, "router_init": "zero"}, True),
    "shared": ("--strategy shared --carved --shared 3 --granularity 4", {"carved": True, "shared": 3}, True),
    "prompts": ("--router-init hidden --prompts {prompts}", {"router_init": "hidden"}, True),
    "merge": (f"{DEMO_MODEL} --strategy merge --rest 1", {"rest": "1"}, False),
}


@pytest.mark.parametrize(("words", "said", "equal"), RUNS.values(), ids=RUNS)
def test_options_arrive(words, said, equal, files, command, tmp_path):
    words = [files.get(word, word) for word in words.split()]
    extra = [words.pop(0)] if words[0] == str(DEMO_MODEL) else []
    target = tmp_path / "moe"
    code, out, err = command("upcycle", DEMO_MODEL, *extra, target, "--experts", 2, "--top-k", 2, *words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["equal_at_step_0"] == equal
    assert (report["max_abs_diff"] <= 1e-4) == (equal or "merge" in words)
    arguments = json.loads((target / "config.json").read_text())["provenance"]["arguments"]
    assert said.items() <= arguments.items()
    assert str(tmp_path) not in json.dumps(arguments)


def test_domain_texts_belong_to_the_sources_in_order(files, command, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT[:200])
    words = ["--domain-text", files["{text}"], "--domain-text", tmp_path / "other.txt", "--experts", 2, "--top-k", 1]
    code, out, _ = command(
        "upcycle", DEMO_MODEL, DEMO_MODEL, tmp_path / "moe", "--strategy", "merge", *words, "--json"
    )
    first, second = json.loads(out)["domains"]
    assert code == 0 and first["tokens"] > second["tokens"]


def test_a_broken_promise_fails(command, tmp_path, monkeypatch):
    from hf_moe.conversion.upcycling.copy import Copy

    piece = Copy.piece
    monkeypatch.setattr(Copy, "piece", lambda self, index, part, neurons: piece(self, index, part, neurons) * 1.1)
    code, _, err = command("upcycle", DEMO_MODEL, tmp_path / "moe", "--experts", 2, "--top-k", 1)
    assert code == 1 and "the logits differ by up to" in err


def test_an_option_without_effect_is_one_line(command, tmp_path):
    code, out, err = command("upcycle", DEMO_MODEL, tmp_path / "moe", "--experts", 2, "--top-k", 1, "--rest", "0")
    assert (code, out) == (2, "")
    assert err.startswith("hf-moe: rest (0) has no effect with strategy 'copy'") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_reports_in_reports_are_read_as_words(capsys):
    from hf_moe_cli.output import print_report

    print_report({"training_fields": {}, "domains": [{"text": "a", "perplexity_a": 3.79801}, {"text": "b"}]}, False)
    assert capsys.readouterr().out == "domains  text a, perplexity a 3.8; text b\n"
