"""The counts of a run over padded batches against a slow count of one window at a time."""

import math
from collections import Counter

import pytest
import torch

from hf_moe.telemetry.tracing import Run

from .conftest import MODELS

RARE = 10


@pytest.fixture(params=["hf_moe", "olmoe"])
def run(request, tokenizer, texts):
    torch.set_num_threads(1)
    model = MODELS[request.param]().eval()
    sources = {"river": str(texts / "river.txt"), "dogs": str(texts / "dogs.jsonl")}
    run = Run(model, tokenizer, "tiny", sources, None, progress=False)
    run.count_tokens()
    run.count_routing()
    run.compare_experts()
    return run


def slowly(run):
    """For each router the experts of each token in order of their scores, with the token's domain and ids."""
    seen = [[] for _ in run.counts]
    for domain in run.domains:
        for ids in domain.windows():
            with torch.no_grad():
                out = run.model(torch.tensor([ids]), output_router_logits=True)
            predicted = out.logits[0].argmax(-1).tolist()
            for tokens, logits in zip(seen, out.router_logits, strict=True):
                for token, guess, row in zip(ids, predicted, logits.softmax(-1).tolist(), strict=True):
                    best = sorted(range(len(row)), key=lambda i: -row[i])[:2]
                    tokens.append((domain.name, token, guess, best, -sum(p * math.log(p) for p in row)))
    return seen


def test_counts_equal_a_slow_count(run):
    layers, domains = run.numbers()["layers"], [domain.name for domain in run.domains]
    assert len({len(ids) for domain in run.domains for ids in domain.windows()}) > 2  # batches are padded
    for layer, tokens in zip(layers, slowly(run), strict=True):
        experts = range(6)
        chosen = Counter(expert for *_, best, _ in tokens for expert in best)
        assert layer["tokens"] == [chosen[i] for i in experts] and sum(chosen.values()) == 2 * run.tokens
        assert layer["load"] == pytest.approx([chosen[i] * 6 / (2 * len(tokens)) for i in experts])
        assert layer["dead"] == [i for i in experts if not chosen[i]]
        shares = [chosen[i] / (2 * len(tokens)) for i in experts]
        spread = -sum(p * math.log(p) for p in shares if p)
        assert layer["load_entropy"] == pytest.approx(spread / math.log(6))
        mean = sum(entropy for *_, entropy in tokens) / len(tokens)
        assert layer["routing_entropy"] == pytest.approx(mean / math.log(6), rel=1e-4)
        for i in experts:
            for j in experts:
                both = sum(i in best and j in best for *_, best, _ in tokens)
                assert layer["coactivation"][i][j] == pytest.approx(both / chosen[i] if i != j and chosen[i] else 0)
        for place, name in enumerate(domains):
            own = [best for domain, *_, best, _ in tokens if domain == name]
            for key, k in (("domain_specialization", 2), ("domain_specialization_first", 1)):
                shares = [sum(i in best[:k] for best in own) / len(own) for i in experts]
                assert layer[key][place] == pytest.approx(shares)


def test_vocabulary_specialization_equals_a_slow_count(run):
    followed = [token for token, count in Counter(ids_of(run)).items() if count >= RARE]
    assert sorted(run.followed.tolist()) == sorted(followed)
    for layer, tokens in zip(run.numbers()["layers"], slowly(run), strict=True):
        for key, which in (("read", 1), ("predicted", 2)):
            shares = []
            for token in followed:
                first = Counter(entry[3][0] for entry in tokens if entry[which] == token)
                if sum(first.values()) >= RARE:
                    shares.append(max(first.values()) / sum(first.values()))
            expected = pytest.approx(sum(shares) / len(shares)) if shares else None
            assert layer["vocabulary_specialization"][key] == expected
        first = Counter(entry[3][0] for entry in tokens)
        assert layer["vocabulary_specialization"]["chance"] == pytest.approx(max(first.values()) / len(tokens))
        for expert, favourites in enumerate(layer["favourite_tokens"]):
            for text, share, times in favourites:
                same = [e for e in tokens if run.tokenizer.decode([e[1]]) == text]
                assert times == len(same) and share == pytest.approx(sum(e[3][0] == expert for e in same) / times)


def test_perplexity_is_that_of_each_window(run):
    for domain, said in zip(run.domains, run.numbers()["domains"], strict=True):
        losses = []
        for ids in domain.windows():
            with torch.no_grad():
                log_p = run.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            losses += [-log_p[t, following].item() for t, following in enumerate(ids[1:])]
        assert said["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert said["tokens"] == sum(map(len, domain.windows()))


def test_memory_does_not_grow_with_the_text(run):
    def size():
        tensors = [x for counts in run.counts.values() for x in vars(counts).values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)

    before, tokens = size(), sum(run.counts[name].tokens_N.sum() for name in run.counts)
    run.count_routing()
    assert size() == before
    assert sum(run.counts[name].tokens_N.sum() for name in run.counts) == 2 * tokens


def ids_of(run):
    return [token for domain in run.domains for ids in domain.windows() for token in ids]
