"""Padding takes no place at an expert, whatever says where it is, and the cache's kind changes no text."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from hf_moe.model.padding import valid_tokens
from hf_moe.model.routing import CAPACITY, ROUTERS
from tests.conftest import tiny_model, tokens

TIGHT = 0.6  # some slots are dropped
LENGTH, PAD = 11, 6

# Router and what it holds: each with every way of its own to limit what an expert takes.
ROUTINGS = {
    "-".join((router, *map(str, args.values()))): {"router_type": router, "router_args": args}
    for router in ROUTERS
    for args in (
        {},
        {"eval_capacity_factor": TIGHT},
        {"eval_capacity_factor": TIGHT, "capacity_priority": "score"},
        {"solver": "auction"},
    )
    if args.keys() <= ROUTERS[router].args.keys()
}


def fields(name: str) -> dict:
    top_k = 2 if name.startswith("gshard") else 3
    auction = {"num_experts_per_tok": 1} if "auction" in name else {"num_experts_per_tok": top_k}
    return ROUTINGS[name] | auction | {"expert_capacity_factor": None if name.startswith(("dense", "base")) else TIGHT}


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Ids with padding on a side, their mask [B, S], and where the tokens are."""
    pad = torch.full((len(ids), PAD), 5)
    order = (pad, ids) if side == "left" else (ids, pad)
    mask = torch.cat([torch.full_like(x, x is ids) for x in order], dim=1)
    begin = PAD if side == "left" else 0
    return torch.cat(order, dim=1), mask, slice(begin, begin + ids.shape[1])


def paired(mask: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S] True where a query sees a key."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]


def infinite(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def filled(mask: torch.Tensor) -> torch.Tensor:
    """As Transformers writes a mask where a row that sees nothing would be no numbers."""
    return mask | ~mask.any(dim=-1, keepdim=True)


MASKS = {
    "tokens": lambda mask: mask,
    "bool": paired,
    "added": lambda mask: torch.where(paired(mask), 0.0, torch.finfo(torch.float32).min),
    "infinite": lambda mask: infinite(paired(mask)),
    "filled": lambda mask: filled(paired(mask)),
    "heads": lambda mask: infinite(paired(mask)).repeat(1, 6, 1, 1),
    "by-kind": lambda mask: {"full_attention": paired(mask)},
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("training", [False, True], ids=["outside", "training"])
def test_padding_changes_no_logit(name, training, monkeypatch):
    """Of every router, whatever mask names the padding: what the tokens get is what they get without it."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.7))  # gshard's and REINFORCE's draws
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: x.fill_(1.0))
    model, ids = tiny_model(**fields(name)).train(training), tokens(1, LENGTH)
    asked = {"output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, **asked)
        for side in ("left", "right"):
            longer, mask, here = padded(ids, side)
            for kind, make in MASKS.items():
                found = model(longer, attention_mask=make(mask), **asked)
                message = f"{side} {kind}"
                torch.testing.assert_close(
                    found.logits[:, here], expected.logits, rtol=1e-4, atol=1e-4, msg=lambda m, n=message: f"{n}: {m}"
                )
                torch.testing.assert_close(found.aux_loss, expected.aux_loss, msg=lambda m, n=message: f"{n}: {m}")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_mask_of_pairs_is_read_alike_in_bool_and_in_numbers(implementation, dtype):
    model = tiny_model().to(dtype)
    model.set_attn_implementation(implementation)
    ids, mask, here = padded(tokens(2, LENGTH), "right")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, here]
        for kind in ("bool", "added", "infinite"):  # in float32, whatever the model's dtype
            found = model(ids, attention_mask=MASKS[kind](mask)).logits[:, here]
            torch.testing.assert_close(found, expected, msg=lambda m, n=kind: f"{n}: {m}")


WINDOWS = {
    "full": {},
    "sliding": {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "chunked": {"attention_chunk_size": 9, "layer_types": ["chunked_attention"] * 3},
}


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("priority", CAPACITY["capacity_priority"])
def test_the_kind_of_cache_changes_no_text(windows, priority):
    args = {"eval_capacity_factor": TIGHT, "capacity_priority": priority}
    model = tiny_model(router_args=args, **WINDOWS[windows])
    ids, mask, _ = padded(tokens(3, LENGTH), "left")
    mask[1, PAD - 2 : PAD] = 1
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    for kind in ("static", "hybrid"):
        assert torch.equal(model.generate(ids, cache_implementation=kind, **options), expected), kind
    one = mask[0].bool()
    alone = {"max_new_tokens": 9, "do_sample": False}
    unpadded = model.generate(ids[:1, one], **alone)[:, one.sum() :]
    for kind in (None, "static"):
        found = model.generate(ids[:1], attention_mask=mask[:1], cache_implementation=kind, **alone)
        assert torch.equal(found[:, len(one) :], unpadded), kind


def test_a_mask_in_blocks_says_it_too():
    mask = padded(tokens(2, LENGTH), "left")[1].bool()
    mask[1, 1:4] = True

    def sees(row, head, query, key):
        return (query >= key) & mask[row, key]

    blocks = create_block_mask(sees, 2, None, *mask.shape[1:] * 2, device=mask.device)
    for given in (blocks, {"full_attention": blocks}):
        assert torch.equal(valid_tokens(given, *mask.shape, None, ["full_attention"]), mask)
    everywhere = create_block_mask(lambda b, h, q, k: q >= k, None, None, *mask.shape[1:] * 2, device=mask.device)
    assert valid_tokens(everywhere, *mask.shape).all()


def test_a_longer_mask_than_the_text_so_far_names_the_tokens_by_position():
    """As a static cache takes it: [B, all positions]."""
    model, ids = tiny_model(router_args={"eval_capacity_factor": TIGHT}), tokens(1, LENGTH)
    with torch.no_grad():
        first = model(ids, use_cache=True, attention_mask=torch.ones_like(ids))
        expected = model(ids, past_key_values=first.past_key_values or first.cache).logits
        first = model(ids, use_cache=True, attention_mask=torch.ones_like(ids))
        mask = torch.nn.functional.pad(torch.ones(1, 2 * LENGTH, dtype=torch.long), (0, 7))
        found = model(ids, attention_mask=mask, past_key_values=first.past_key_values or first.cache).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, LENGTH, LENGTH), r"attention_mask has shape \[2, 11, 11\]"),
        (torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.long), "is torch.int64: give a bool one"),
    ],
)
def test_a_mask_that_would_be_read_as_another_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens(2, LENGTH), attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "drafts"),
        ({"use_mtp": True}, "drafts"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"cache_implementation": "paged"}, "Continuous batching"),
    ],
)
def test_what_would_change_a_texts_batches_is_refused_beside_a_capacity(options, message):
    """The capacity counts the tokens of a forward: read in other pieces, or beside others' requests, they get others'
    experts."""
    model = tiny_model(router_args={"eval_capacity_factor": TIGHT}, num_mtp_layers=1)
    with pytest.raises(ValueError, match=f"{message}.*eval_capacity_factor|eval_capacity_factor.*{message}"):
        model.generate(tokens(1, LENGTH), max_new_tokens=3, do_sample=False, **options)
