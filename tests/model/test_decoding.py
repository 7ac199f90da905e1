"""Recorded decoding: the cache that it reserves, and on a GPU that its text is that of ordinary decoding."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from hf_moe.training.balance.router_replay import recording
from transformers.generation.streamers import BaseStreamer

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.model import decoding
from hf_moe.model.chosen_experts import listening
from hf_moe.model.decoding import KEPT, HfMoeReservedCache
from hf_moe.routers import find_routers
from tests.recordings import decode_on_cpu, record_on_cpu

LATENT = {"attention_type": "mla", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
CONFIGS = {
    "mla": LATENT | {"n_shared_experts": 2},
    "mla, sigmoid, groups": LATENT
    | {"router_type": "sigmoid_topk", "router_args": {"selection_bias": True}, "n_group": 2, "q_lora_rank": 24},
    "gqa": {"num_key_value_heads": 2, "qk_norm": "head", "router_type": "topk_softmax"},
    "gqa, window": {"sliding_window": 7, "mlp_layer_types": ["dense", "sparse"]},
    "moa": {"attention_type": "moa", "num_attention_heads": 4, "num_key_value_heads": 2},
}
configs = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float32, **fields) -> HfMoeForCausalLM:
    base = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48}
    base |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    base |= {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    return HfMoeForCausalLM(HfMoeConfig(**(base | fields))).to(device, dtype).eval()


def prompts(device: str, rows: int, length: int = 9, padding: int = 0):
    ids = torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A GPU, or a CPU that takes the same way."""
    if request.param == "cpu":
        decode_on_cpu(monkeypatch)
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def recording_device(request, monkeypatch):
    if request.param == "cpu":
        record_on_cpu(monkeypatch)
    return request.param


@configs
def test_a_reserved_cache_acts_as_a_dynamic_one(fields):
    model, inputs = tiny(**fields), prompts("cpu", 3, length=248, padding=2)
    cache = HfMoeReservedCache(model.config.num_hidden_layers, 4)  # too small: it moves
    expected = model.generate(**inputs, max_new_tokens=15)
    assert torch.equal(model.generate(**inputs, max_new_tokens=15, past_key_values=cache), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert cache.layers[0].max_cache_len == 512
    cache.crop(-5)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 10), value=1)
    again = model.generate(expected[:, :-5], attention_mask=mask, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(again, expected)


@pytest.mark.gpu
@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 4], ids=["no padding", "left padding"])
def test_recorded_logits_are_those_of_ordinary_decoding(fields, dtype, padding):
    if fields.get("attention_type") == "moa" and dtype == torch.float32:
        pytest.skip("Transformers' grouped product of float32 waits for the device")
    model, inputs = tiny("cuda", dtype, **fields), prompts("cuda", 3, padding=padding)
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **options)
    assert isinstance(out.past_key_values, HfMoeReservedCache)
    assert out.past_key_values.step is not None
    whole = torch.cat((inputs["attention_mask"], torch.ones_like(out.sequences[:, 9:])), dim=1)
    position_ids = (whole.cumsum(-1) - 1).clamp_min(0)
    expected = model(out.sequences, attention_mask=whole, position_ids=position_ids).logits[:, 8:-1].float()
    logits = torch.stack(out.logits, dim=1)
    error = (logits - expected).abs().amax(-1) / expected.abs().max()  # [B, N]
    if dtype == torch.float32:
        assert error.max() < 1e-4
    else:  # a tie between experts may fall the other way: that changes single tokens
        assert error.median() < 2e-2


def test_the_next_text_replays_the_graph_and_changes_are_seen(recording_device):
    device = recording_device
    model, inputs = tiny(device, **CONFIGS["mla"]), prompts(device, 2)
    first = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    graph = KEPT[model].step
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), first)
    assert KEPT[model].step is graph
    with torch.no_grad():
        model.lm_head.weight.neg_()  # in place: the graph reads it
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False, disable_compile=True)
    assert not torch.equal(plain, first)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain)
    assert KEPT[model].step is graph
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.neg())  # elsewhere: recorded again
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), first)
    assert KEPT[model].step is not graph


def test_the_first_token_does_not_wait_for_a_recording(recording_device, monkeypatch):
    model, inputs, happened = tiny(recording_device, **CONFIGS["gqa"]), prompts(recording_device, 1), []
    record = decoding.RecordedStep.record

    class Heard(BaseStreamer):
        def put(self, value):
            happened.append("tokens")

        def end(self):
            pass

    monkeypatch.setattr(decoding.RecordedStep, "record", lambda step: happened.append("recording") or record(step))
    model.generate(**inputs, max_new_tokens=1, do_sample=False, streamer=Heard())
    assert happened == ["tokens"] * 2  # the prompt and one more
    happened.clear()
    model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=Heard())
    assert happened == ["tokens"] * 2 + ["recording"] + ["tokens"] * 11
    (layer, *_) = KEPT[model].layers
    assert layer.length == 9 + 11  # the last token is not read


def test_a_hook_for_checkpointing_is_in_no_steps_way(recording_device):
    model, inputs = tiny(recording_device, **CONFIGS["gqa"]), prompts(recording_device, 2)
    before = list(decoding.obstacles(model))
    model.enable_input_require_grads()
    assert list(decoding.obstacles(model)) == before
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False, disable_compile=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain)
    model.get_input_embeddings().register_forward_hook(lambda *x: None)
    assert "a hook on a module is to see every call" in decoding.obstacles(model)


def test_a_replay_tells_the_experts_that_were_written_over():
    """To those who listen to it alone, in memory of their own."""
    router, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    replay = decoding.Recording.__new__(decoding.Recording)
    first, second = torch.tensor([[1, 2]]), torch.tensor([[3], [4]])
    replay.graph, replay.result = SimpleNamespace(replay=lambda: (first.add_(1), second.add_(2))), None
    replay.chosen = {}
    with listening() as heard:
        replay()
    assert not heard
    first[:], second[:] = torch.tensor([[1, 2]]), torch.tensor([[3], [4]])
    replay.chosen = {router: [first], other: [second]}
    with listening() as heard:
        replay()
        with listening(alone=True) as apart:
            replay()
        replay()
    replay()
    assert [x.tolist() for x in heard[router]] == [[[2, 3]], [[4, 5]]]
    assert [x.tolist() for x in heard[other]] == [[[5], [6]], [[9], [10]]]
    assert [x.tolist() for x in apart[router]] == [[[3, 4]]]


@pytest.mark.gpu
@configs
def test_recorded_steps_tell_the_experts_of_ordinary_decoding(fields):
    model, inputs = tiny("cuda", **fields), prompts("cuda", 3)
    routers = find_routers(model)
    told = []
    for options in ({}, {"disable_compile": True}):
        with recording(routers) as calls:
            out = model.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, **options)
        told.append(calls)
        assert isinstance(out.past_key_values, HfMoeReservedCache) == (not options)
    for name, index in told[1].items():
        assert [x.tolist() for x in told[0][name][: len(index)]] == [x.tolist() for x in index]


@pytest.mark.gpu
def test_a_graph_that_is_garbage_does_not_end_a_recording():
    model = tiny("cuda", **CONFIGS["mla"])
    model.generate(**prompts("cuda", 2), max_new_tokens=20, do_sample=False)
    garbage = [KEPT.pop(model)]
    garbage.append(garbage)
    del garbage
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        out = model.generate(**prompts("cuda", 2), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    finally:
        gc.set_threshold(*before)
    assert out.past_key_values.step is not None


@pytest.mark.gpu
def test_what_is_kept_of_a_text_does_not_keep_its_model():
    model = tiny("cuda", **CONFIGS["mla"])
    model.generate(**prompts("cuda", 2), max_new_tokens=20, do_sample=False)
    assert KEPT[model].step is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
def test_a_cache_that_was_handed_out_stays_its_owners():
    model, inputs = tiny("cuda", **CONFIGS["mla"]), prompts("cuda", 2)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    assert model not in KEPT
    longer = {"attention_mask": torch.ones_like(out.sequences), "past_key_values": out.past_key_values}
    text = model.generate(out.sequences, max_new_tokens=10, do_sample=False, **longer)
    assert model not in KEPT
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False, disable_compile=True)
    assert torch.equal(text, plain)


def test_ends_streams_and_samples_as_ordinary_decoding_does(device):
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value)

        def end(self):
            self.ended = True

    model, inputs = tiny(device, **CONFIGS["gqa"]), prompts(device, 3, padding=2)
    text = model.generate(**inputs, max_new_tokens=24, do_sample=False, disable_compile=True)
    eos = int(text[0, 15])
    for options in ({"eos_token_id": eos}, {"eos_token_id": eos, "min_new_tokens": 9}, {"repetition_penalty": 1.3}):
        plain, recorded = (
            model.generate(
                **inputs,
                max_new_tokens=24,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                **off,
                **options,
            )
            for off in ({"disable_compile": True}, {})
        )
        assert torch.equal(plain.sequences, recorded.sequences)
        assert len(plain.scores) == len(recorded.scores)
        torch.testing.assert_close(torch.stack(plain.scores), torch.stack(recorded.scores), rtol=1e-4, atol=1e-4)
        assert recorded.past_key_values.get_seq_length() == recorded.sequences.shape[1] - 1
        assert type(recorded.past_key_values) is HfMoeReservedCache
    one = {name: x[:1] for name, x in inputs.items()}
    heard = Heard()
    text = model.generate(**one, max_new_tokens=12, do_sample=False, streamer=heard)
    assert torch.equal(torch.cat([x.flatten() for x in heard.tokens]), text[0].cpu())
    assert heard.ended
    torch.manual_seed(3)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=True, disable_compile=True)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=True), plain)


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_a_step_hears_of_rows_that_have_ended(recording_device, monkeypatch, name):
    """On a GPU they then choose no expert; the text stays that of ordinary decoding."""
    device = recording_device
    model, inputs, heard = tiny(device, **CONFIGS[name]), prompts(device, 3), []
    inputs |= {"max_new_tokens": 24, "do_sample": False}
    text, call = model.generate(**inputs, disable_compile=True), decoding.RecordedStep.__call__
    ends = [text[0, 12].item(), text[1, 20].item()]
    expected = model.generate(**inputs, eos_token_id=ends, disable_compile=True)

    def counted(step, *args):
        logits = call(step, *args)
        heard.append(int(step.cache.unfinished.sum()))
        return logits

    monkeypatch.setattr(decoding.RecordedStep, "__call__", counted)
    assert torch.equal(model.generate(**inputs, eos_token_id=ends), expected)
    assert heard == sorted(heard, reverse=True) and min(heard) < max(heard)
    heard.clear()
    assert torch.equal(model.generate(**inputs), text)  # whose rows don't end, by the same step
    assert set(heard) == {3}
    heard.clear()
    whole = model.generate(**inputs, eos_token_id=ends, return_dict_in_generate=True)
    assert torch.equal(whole.sequences, expected)
    assert set(heard) == {3}  # the cache is its caller's


@pytest.mark.gpu
def test_what_cannot_be_recorded_decodes_as_before():
    model = tiny("cuda", **CONFIGS["gqa"])
    model.set_experts_implementation("eager")
    out = model.generate(**prompts("cuda", 2), max_new_tokens=12, return_dict_in_generate=True)
    assert not isinstance(out.past_key_values, HfMoeReservedCache)
