"""Best of N: the mean log-probability is that of the model, whatever drew the tokens."""

import pytest
import torch

from hf_moe.generation.best_of import mean_log_probability


def test_it_is_what_generate_saw(model, tokenizer):
    """Against Transformers' own transition scores, recorded while the texts were drawn at another temperature."""
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    start = inputs.input_ids.shape[1]
    drawn = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.7,
        top_k=7,
        num_return_sequences=3,
        max_new_tokens=9,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = model.compute_transition_scores(drawn.sequences, drawn.logits, normalize_logits=True).mean(dim=-1)
    ours = [mean_log_probability(model, ids, start) for ids in drawn.sequences]
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=1e-5, atol=1e-5)


def test_it_is_a_mean_so_length_alone_decides_nothing(model):
    ids = torch.tensor([5, 6, 7, 8, 9])
    one_by_one = []
    for place in range(2, 5):
        logits = model(input_ids=ids[None, :place]).logits[0, -1].double()
        one_by_one.append((logits[ids[place]] - logits.logsumexp(dim=0)).item())
    assert mean_log_probability(model, ids, 2) == pytest.approx(sum(one_by_one) / 3, rel=1e-5)


def test_a_text_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="There are 3 tokens, 3 of them the prompt's"):
        mean_log_probability(model, torch.tensor([5, 6, 7]), 3)
