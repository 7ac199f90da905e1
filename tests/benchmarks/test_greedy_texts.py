"""Two greedy texts of a model differ at ties alone, or that is said."""

import torch

from tests.conftest import tiny_model

from .scripts import load


def test_ties_are_told_from_failures(monkeypatch):
    script = load("greedy_texts", monkeypatch)
    model = tiny_model(vocab_size=61, initializer_range=0.2).eval()
    ids, mask = torch.randint(1, 61, (3, 6), generator=torch.Generator().manual_seed(0)), torch.ones(3, 6).long()
    mask[1, :2] = 0
    text = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert script.compared(model, text, text, mask) == (0, [])
    other = text.clone()
    logits = script.logits_after(model, text[1, 2:9])
    first, second = logits.topk(2).indices.tolist()
    assert first == text[1, 9]  # read without its padding
    other[1, 9:] = second
    ties, (failure,) = script.compared(model, other, text, mask)
    assert ties == 0 and failure.startswith(f"row 1, place 9: {second}, not {first}; logits ")
    gap = float((logits[first] - logits[second]) / logits.abs().max())
    monkeypatch.setitem(script.BOUNDS, torch.float32, gap * 1.01)
    assert script.compared(model, other, text, mask) == (1, [])
    monkeypatch.setitem(script.BOUNDS, torch.float32, gap * 0.99)
    assert len(script.compared(model, other, text, mask)[1]) == 1
    assert script.compared(model, text[:, :-1], text, mask) == (0, ["12 tokens, not 13"])
