"""`hf-moe trace` and `hf-moe card` on every mixture of experts in Transformers: what they say is what layers do."""

import json
import re

import pytest
import torch
from hf_moe_cli import main
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from hf_moe.telemetry import trace
from hf_moe.telemetry.texts import Domain

from ..families import EXPERTS, FAMILIES, TOP_K, fields_of, text_config, tiny

STORY = "Once upon a time there was a little fox. She lived by the river and counted stones.\n"
VOCABULARY = 512  # the tokenizer's


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "story.txt"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def one_figure(monkeypatch):
    figures = pytest.importorskip("hf_moe.telemetry.figures", exc_type=ImportError)
    monkeypatch.setattr(figures, "FIGURES", {"load": figures.load})


def reading(model_type: str) -> nn.Module:
    """A tiny model of as many tokens as the tokenizer has, in each of the vocabularies that it says."""
    sizes = {name: VOCABULARY for name in fields_of(text_config(model_type)) if "vocab_size" in name}
    return tiny(model_type, **sizes)


def calls_of_experts(model: nn.Module, ids: torch.Tensor) -> dict[str, tuple]:
    """Where the experts are -> what they are called with in a forward, and themselves. JetMoE's are two maps each."""
    seen = {}

    def keep(name):
        def hook(module, args, kwargs):
            seen[name.rpartition(".")[0]] = [*args, *kwargs.values()], module

        return hook

    names = [name for name, _ in model.named_modules() if name.endswith((".experts", ".input_linear"))]
    for name in names:
        part = model.get_submodule(name)
        if f"{name}.input_linear" not in names and not isinstance(part, nn.Linear):
            part.register_forward_pre_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen


def fused(module: nn.Module) -> set[int]:
    """How many experts have rows in each weight; none where there is no such weight."""
    return {len(x) for x in module.parameters() if x.dim() == 3}


def counts(args: list, tokens: int) -> list[int]:
    """Tokens of each expert. JetMoE's are told how many; Llama 4's get all, times 0 where a token is another's."""
    index = next((x for x in args[1:] if torch.is_tensor(x) and not x.is_floating_point()), None)
    if index is not None:
        weights = next(x for x in args[1:] if torch.is_tensor(x) and x.is_floating_point())
        return [int(((index == expert) & (weights != 0)).sum()) for expert in range(EXPERTS)]
    if len(args) > 1:
        return list(args[1])
    return args[0].view(EXPERTS, tokens, -1).any(dim=-1).sum(dim=-1).tolist()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_trace_and_card_of_every_family(model_type, story, tokenizer, one_figure, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    reading(model_type).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["--data", str(story), "--out", str(out), "--prune-tokens", "0", "--json"]
    assert main(["trace", str(folder), *words]) == 0, capsys.readouterr().err
    assert main(["card", str(folder), "--trace", str(out)]) == 0, capsys.readouterr().err

    model = AutoModelForCausalLM.from_pretrained(folder)
    (ids,) = Domain("story", str(story), tokenizer, VOCABULARY, None).windows()
    calls = calls_of_experts(model, torch.tensor([ids]))
    layers = json.loads((out / "numbers.json").read_text())["layers"]
    top_k = 1 if model_type == "zaya" else TOP_K
    assert {layer["router"].rpartition(".")[0] for layer in layers} == calls.keys()
    for layer in layers:
        args, module = calls[layer["router"].rpartition(".")[0]]
        assert layer["tokens"] == counts(args, len(ids)), layer["router"]
        # LongCat's first weight has rows for experts that compute nothing, too; DBRX's have one dimension less.
        assert layer["experts"] == len(layer["load"]) == min(fused(module) or {EXPERTS})
        assert layer["top_k"] == top_k
    numbers = [int(layer["label"].split()[0]) for layer in layers]
    assert numbers == sorted(numbers)

    card = (folder / "README.md").read_text()
    assert f"| Routed experts | {EXPERTS}, {top_k} per token |" in card
    assert re.search(rf"^\| Layers \| \d+, {len(set(numbers))} of them with experts \|$", card, re.MULTILINE)
    assert f"| Parameters | {sum(x.numel() for x in model.parameters()):,} |" in card


def test_a_choice_of_no_expert_is_in_no_number_of_a_trace(story, tokenizer, one_figure, tmp_path):
    model = reading("zaya")
    for name, bias in model.named_buffers():
        if name.endswith("balancing_biases"):
            bias.zero_()
    trace(model, story, tmp_path / "out", tokenizer=tokenizer, prune_tokens=2000, progress=False)
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    skipped = 0
    for layer, experts in zip(numbers["layers"], numbers["passages"][0]["experts"], strict=True):
        assert layer["tokens"] == [experts.count(expert) for expert in range(EXPERTS)]
        assert sum(layer["load"]) == pytest.approx(EXPERTS) and 0 <= layer["routing_entropy"] <= 1
        assert layer["pruning"]
        skipped += experts.count(EXPERTS)
    assert skipped == len(numbers["layers"]) * numbers["tokens"] - sum(sum(x["tokens"]) for x in numbers["layers"])
    assert skipped > 0
