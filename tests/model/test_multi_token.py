"""Multi-token prediction: modules against other implementations, the loss against a slow one, exact speculation."""

import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, MtpCache, QuantizedLayer
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.modeling_layers import MtpModel

from hf_moe.model.decoding import HfMoeReservedCache
from hf_moe.model.speculation import Drafter, HfMoeSpeculativeOutput, follow
from tests.conftest import compiles_backward, since, tiny_model, tokens

MLA = {
    "attention_type": "mla",
    "num_attention_heads": 3,
    "num_key_value_heads": None,
    "kv_lora_rank": 13,
    "q_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
}
VARIANTS = {
    "gqa": {},
    "mla": MLA,
    "moa": {"attention_type": "moa"},
    "window": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "v3-router": {
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
        "seq_aux_loss_coef": 1e-3,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
    },
    "hash": {"router_type": "hash", "router_aux_loss_coef": 0.0},
    "reinforce": {"router_type": "reinforce"},
    "tied": {"tie_word_embeddings": True, "final_logit_softcapping": 20.0},
    "gemma": {
        "rms_norm_unit_offset": True,
        "layer_norm_placement": "sandwich",
        "embedding_multiplier": 48**0.5,
        "qk_norm": "head",
        "sliding_window": 5,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "granite": {
        "norm_type": "layer_norm",
        "layer_norm_placement": "post",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
    },
    "norms after": {"qk_norm": "head_after_rope", "sparse_output_norm": True},
    "llama4": {
        "qk_norm": "l2",
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "attention_chunk_size": 6,
        "no_rope_layers": [1, 1, 0],
        "attn_temperature_tuning": True,
        "floor_scale": 4,
    },
}


def mtp_model(depth=2, **changes):
    """A tiny model whose norms are not all ones, so that a forgotten or swapped one shows."""
    model = tiny_model(num_mtp_layers=depth, **changes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- the modules ----


def rms_norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def test_a_module_equals_equations_21_and_22_written_out():
    model = mtp_model(1, mlp_layer_types=["dense"] * 3)
    layer, ids = model.model.mtp_layers[0], tokens(1, 9)
    outputs = model.model(ids, output_mtp_hidden_states=True)
    hidden, embeds = outputs.last_hidden_state[0], model.model.embed_tokens.weight[ids[0]]
    half = model.config.hidden_size
    rows = []
    for i in range(8):  # entry i joins the hidden state of token i and the embedding of token i + 1
        of_embedding = layer.eh_proj.weight[:, :half] @ rms_norm(embeds[i + 1], layer.enorm)
        rows.append(of_embedding + layer.eh_proj.weight[:, half:] @ rms_norm(hidden[i], layer.hnorm))
    x = torch.stack(rows)

    block, attention = layer.block, layer.block.self_attn
    normed = rms_norm(x, block.input_layernorm)
    heads, groups, size = 6, 3, 8
    query, key, value = (
        (normed @ getattr(attention, f"{name}_proj").weight.T).view(8, -1, size) for name in ("q", "k", "v")
    )
    angles = torch.arange(8)[:, None] / 10000.0 ** (torch.arange(0, size, 2) / size)

    def turned(vectors):
        pairs = torch.view_as_complex(torch.stack(vectors.chunk(2, dim=-1), dim=-1).contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    query, key = turned(query), turned(key)
    attended = torch.zeros(8, heads, size)
    for i, head in itertools.product(range(8), range(heads)):
        weights = (key[: i + 1, head // groups] @ query[i, head] / size**0.5).softmax(-1)
        attended[i, head] = weights @ value[: i + 1, head // groups]
    x = x + attended.flatten(1) @ attention.o_proj.weight.T
    normed, mlp = rms_norm(x, block.post_attention_layernorm), block.mlp
    gated = nn.functional.silu(normed @ mlp.gate_proj.weight.T) * (normed @ mlp.up_proj.weight.T)
    expected = rms_norm(x + gated @ mlp.down_proj.weight.T, layer.norm)
    torch.testing.assert_close(outputs.mtp_hidden_states[0][0, :8], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["gqa", "mla", "v3-router"])
def test_drafts_equal_those_of_transformers_mtp(variant):
    model, ids = mtp_model(3, **VARIANTS[variant]), tokens(1, 9)
    model.config.mtp_layer_types, model.config.mtp_mlp_layer_types = ["full_attention"] * 3, ["sparse"] * 3
    theirs = MtpModel(model, 3).eval()
    names = {"block": "mtp_block", "norm": "post_norm"}
    state = {}
    for name, tensor in model.model.mtp_layers.state_dict().items():
        depth, part, *rest = name.split(".")
        state[".".join(("layers", depth, names.get(part, part), *rest))] = tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("layers.")]
    drafts, logits = [], []

    def choose(ids, row):
        logits.append(row)
        return row.argmax(-1, keepdim=True), None

    with torch.no_grad():
        hidden = model.model(ids[:, :-1]).last_hidden_state
        positions = torch.arange(9).unsqueeze(0)
        drafts, _ = Drafter(model, 0, choose).draft(ids, hidden, positions, None, 3)
        cache = MtpCache(config=model.config.get_mtp_config())
        expected, their_logits, _ = theirs(ids[:, 1:], hidden, None, positions[:, 1:], cache)
    assert torch.equal(drafts, expected)
    torch.testing.assert_close(torch.stack(logits, dim=1), their_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_the_modules_learns(variant):
    model, ids = mtp_model(2, **VARIANTS[variant]).train(), tokens(4, 21)
    model(ids, labels=ids).loss.backward()
    silent = [n for n, p in model.model.mtp_layers.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_what_is_recorded_of_the_layers_leaves_the_modules_out():
    model, ids = mtp_model(2).train(), tokens()
    model.set_attn_implementation("eager")
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert len(out.router_logits) == 2 + 2  # the layers' routers first
    torch.testing.assert_close(out.hidden_states[-1], model.model(ids).last_hidden_state)


# ---- the loss ----


def slow_mtp_loss(model, documents, labels, items):
    """Documents one by one, positions one by one, straight from the definition."""
    depth_losses = [0.0] * len(model.model.mtp_layers)
    for ids, targets in zip(documents, labels, strict=True):
        hidden = model.model(ids.unsqueeze(0), use_cache=False).last_hidden_state
        for k, layer in enumerate(model.model.mtp_layers, start=1):
            length = len(ids) - k
            if length <= 0:
                break
            positions = torch.arange(length).unsqueeze(0)
            embeds = model.model.embed_tokens(ids[k:]).unsqueeze(0)
            causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
            hidden = layer(
                hidden[:, :length],
                embeds,
                attention_mask=causal,
                position_ids=positions,
                position_embeddings=model.model.rotary_emb(embeds, positions),
            )
            for i in range(length):
                if i + k + 1 < len(ids) and targets[i + k + 1] != -100:
                    logits = model.lm_head(hidden[0, i])
                    depth_losses[k - 1] = depth_losses[k - 1] - logits.log_softmax(-1)[targets[i + k + 1]]
    return sum(depth_losses) / len(depth_losses) / items


DOCUMENTS = [tokens(1, n, seed=n)[0] for n in (2, 9, 1, 5)]


@pytest.mark.parametrize("layout", ["packed", "right-padded", "left-padded"])
@pytest.mark.parametrize(("depth", "items"), [(1, 40), (3, None), (3, 40)], ids=["depth-1", "mean", "depth-3"])
def test_the_loss_equals_a_slow_one(layout, depth, items):
    model = mtp_model(depth).train()
    labels = [ids.clone() for ids in DOCUMENTS]
    for i in (2, 5):
        labels[1][i] = -100  # a prompt or a tool's answer
    if layout == "packed":
        for document in labels:
            document[0] = -100  # as collators do: the main loss ends with the document, too
        inputs = {
            "input_ids": torch.cat(DOCUMENTS).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(len(ids)) for ids in DOCUMENTS]).unsqueeze(0),
            "use_cache": False,
        }
        target = torch.cat(labels).unsqueeze(0)
    else:
        side = layout.removesuffix("-padded")
        pad = [nn.utils.rnn.pad_sequence(x, True, fill, side) for x, fill in ((DOCUMENTS, 0), (labels, -100))]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in DOCUMENTS], True, 0, side)
        inputs, target = {"input_ids": pad[0], "attention_mask": mask}, pad[1]
    out = model(**inputs, labels=target, num_items_in_batch=items, output_router_logits=False)
    expected = slow_mtp_loss(model, DOCUMENTS, labels, items or int((target[:, 1:] != -100).sum()))
    torch.testing.assert_close(out.mtp_loss, expected, rtol=1e-4, atol=1e-5)
    plain = model(**inputs, labels=target, num_items_in_batch=items, output_router_logits=False, output_mtp_loss=False)
    assert plain.mtp_loss is None
    torch.testing.assert_close(out.loss, plain.loss + 0.3 * expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32():
    """The loss to bfloat16's three digits, and speculation that agrees with the logits it saw itself."""
    model, ids = mtp_model(2, **VARIANTS["v3-router"], initializer_range=0.1), tokens(2, 21)
    expected = model(ids, labels=ids, output_mtp_loss=True).mtp_loss
    model = model.bfloat16()
    assert model(ids, labels=ids, output_mtp_loss=True).mtp_loss.item() == pytest.approx(expected.item(), rel=0.01)
    options = {"max_new_tokens": 9, "attention_mask": torch.ones_like(ids), "use_mtp": True, **GREEDY}
    out = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(torch.stack([scores.argmax(-1) for scores in out.scores], dim=1), out.sequences[:, 21:])


def test_outside_training_the_loss_is_cross_entropy_unless_asked():
    model, ids = mtp_model(1), tokens()
    plain, asked = model(ids, labels=ids), model(ids, labels=ids, output_mtp_loss=True)
    assert plain.mtp_loss is None
    torch.testing.assert_close(asked.loss, plain.loss + 0.3 * asked.mtp_loss)


def test_micro_batches_add_up_to_one_batch():
    model, ids = mtp_model(2, router_aux_loss_coef=0.0).train(), tokens(4, 11)
    labels = ids.clone()
    labels[1, 3:9] = -100
    items = int((labels[:, 1:] != -100).sum())
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=items).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)


def test_the_last_entries_take_no_part_in_balancing():
    model, ids = mtp_model(2).train(), tokens(2, 11)
    outputs = model.model(ids, output_mtp_hidden_states=True, output_router_logits=True, output_router_indices=True)
    counted = [int(layer.mask_T.sum()) for layer in model.routed(outputs, model.routings(outputs))]
    assert counted == [22, 22, 20, 18]


@pytest.mark.parametrize("way", ["checkpointing", pytest.param("compile", marks=compiles_backward)])
def test_other_ways_to_run_change_no_gradient(way):
    layers = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}
    ids, expected, model = tokens(), mtp_model(1, **layers).train(), mtp_model(1, **layers).train()
    model.load_state_dict(expected.state_dict())
    expected(ids, labels=ids).loss.backward()
    if way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
    else:
        model(ids, labels=ids)  # Transformers places its hooks in a first forward, which does not compile
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    actual = gradients(model)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)


# ---- saving and adding ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_and_loaded_with_the_model(tmp_path, dtype):
    model = mtp_model(2, **VARIANTS["v3-router"]).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].to(tensor.dtype), tensor), name
    assert not [name for name in model.state_dict() if "mtp" in name and ("embed" in name or "head" in name)]
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}


def test_a_checkpoint_without_the_modules_is_refused(tmp_path):
    mtp_model(1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_mtp_layers is 2, but the checkpoint lacks 13 of their weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_mtp_layers=2)


@pytest.mark.parametrize("variant", ["gqa", "mla", "v3-router", "moa", "gemma", "granite", "llama4"])
def test_new_modules_for_any_model(variant, tmp_path):
    model, ids = tiny_model(**VARIANTS[variant]).train(), tokens()
    before = model(ids, labels=ids)  # places the hooks that record routers
    model.add_mtp_layers(2)
    after = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(after.logits, before.logits) and after.mtp_loss.isfinite()
    per_block = len(after.router_logits) - len(before.router_logits)
    assert per_block == (4 if variant == "moa" else 2) and len(after.hidden_states) == 4
    for name, tensor in model.model.layers[-1].state_dict().items():
        copy = model.model.mtp_layers[1].block.state_dict()[name]
        assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_mtp_layers == 2 and loaded.state_dict().keys() == model.state_dict().keys()


def test_adapters_reach_the_modules_and_merge(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = mtp_model(1), tokens()
    targets = ["q_proj", "o_proj", "eh_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)).train()
    adapted(ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="before adapters"):
        adapted.get_base_model().add_mtp_layers()
    touched = {name for name, p in adapted.named_parameters() if p.grad is not None and "mtp_layers" in name}
    assert len(touched) == 6
    expected = adapted(ids, labels=ids, output_router_logits=False).mtp_loss
    adapted.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(mtp_model(1), tmp_path).merge_and_unload().train()
    torch.testing.assert_close(merged(ids, labels=ids).mtp_loss, expected, rtol=1e-4, atol=1e-4)


# ---- speculation ----


def learned(depth, **changes):
    """A model that learned a rule (next = 3 t + 1, mostly), and modules that half forgot it: some drafts are right."""
    model = tiny_model(num_mtp_layers=depth, vocab_size=31, initializer_range=0.1, **changes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(25):
        ids = sequences(8, 24, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model.model.mtp_layers:
        layer.eh_proj.weight.data.add_(torch.randn_like(layer.eh_proj.weight), alpha=0.4)
    return model.eval()


def sequences(batch, length, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": generator, "device": "cpu"}
    ids = torch.randint(1, 31, (batch, 1), **options)
    for _ in range(length - 1):
        rule, random = ids[:, -1:] * 3 % 30 + 1, torch.randint(1, 31, (batch, 1), **options)
        ids = torch.cat((ids, torch.where(torch.rand(batch, 1, **options) < 0.67, rule, random)), dim=1)
    return ids.to(torch.get_default_device())


GREEDY = {"do_sample": False, "disable_compile": True}
SPECULATION = [("gqa", 1), ("gqa", 3), ("mla", 3), ("window", 3), ("hash", 1)]
SPECULATION += [("gemma", 2), ("granite", 1), ("llama4", 2)]


@pytest.fixture(scope="module", params=SPECULATION, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def half_learned(request):
    torch.manual_seed(0)
    name, depth = request.param
    return learned(depth, **VARIANTS[name])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_that_of_plain_decoding(half_learned, cache, batch):
    ids = sequences(3, 7, seed=99)[-batch:]
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 23, "cache_implementation": cache, **GREEDY}
    options["repetition_penalty"] = 1.5  # a text that does not end in a loop
    options |= {"return_dict_in_generate": True, "output_scores": True}
    if cache == "static" and {"sliding_attention", "chunked_attention"} & set(half_learned.config.layer_types):
        with pytest.raises(ValueError, match="can't take tokens back from a static sliding-window cache"):
            half_learned.generate(ids, use_mtp=True, **options)
        return
    expected = half_learned.generate(ids, **options)
    out = half_learned.generate(ids, use_mtp=True, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-3, atol=1e-3)
    assert isinstance(out, HfMoeSpeculativeOutput)
    if batch == 1:
        assert out.forward_passes + out.accepted_tokens == 23
    else:  # the test means little where drafts are all wrong or all right
        assert 0 < out.acceptance_rate < 1
    assert int(out.past_key_values.get_seq_length()) == 29


@since(23, "its repetition penalty can't leave out the padding of each row")
@pytest.mark.parametrize("batch", [1, 3])
def test_drafts_are_accepted_where_training_would_count_them_right(half_learned, batch):
    """Acceptance equals the agreement of modules and head over the finished text, as training computes both."""
    model, ids, mask = half_learned, sequences(3, 7, seed=97)[-batch:], torch.ones(batch, 7, dtype=torch.long)
    if batch > 1:
        mask[0, :3] = 0
    penalty = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=7 - mask.sum(-1))
    options = {"attention_mask": mask, "max_new_tokens": 40, "repetition_penalty": 1.5, **GREEDY}
    out = model.generate(ids, use_mtp=True, return_dict_in_generate=True, **options)
    text, end = out.sequences, out.sequences.shape[1]
    mask = nn.functional.pad(mask, (0, 40), value=1)
    with torch.no_grad():
        outputs = model.model(
            text,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            output_mtp_hidden_states=True,
            use_cache=False,
        )
        ahead = [model.project(hidden_states) for hidden_states in outputs.mtp_hidden_states]
        of_head = model.project(outputs.last_hidden_state)

    def choice(logits, entry, place):
        return penalty(text[:, :place], logits[:, entry]).argmax(-1)

    assert all(torch.equal(choice(of_head, place - 1, place), text[:, place]) for place in range(7, end))
    known, drafted, accepted, passes = 8, 0, 0, 1  # the prompt's pass gives one token, without drafts
    while known < end:
        count = min(len(ahead), end - known - 1)
        # Module k, at the last entry that reads a known token or k - 1 drafts, predicts place known + k - 1.
        right = [choice(ahead[k], known - 2, known + k) == text[:, known + k] for k in range(count)]
        matches = torch.stack([torch.ones(batch, dtype=torch.bool), *right]).cumprod(dim=0).sum(dim=0) - 1
        common = int(matches.min())
        drafted, accepted = drafted + batch * count, accepted + int(matches.clamp_max(common + 1).sum())
        known, passes = known + common + 1, passes + 1
    assert batch == 1 or 0 < accepted < drafted  # the test means little where drafts are all wrong or all right
    assert (out.drafted_tokens, out.accepted_tokens, out.forward_passes) == (drafted, accepted, passes)


@pytest.mark.parametrize("padding", [0, 2])
def test_the_drafters_cache_equals_reading_everything_again(half_learned, padding):
    model, text = half_learned, sequences(2, 30, seed=5)
    mask = torch.ones_like(text)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    count, seen, logits = model.config.num_mtp_layers, 0, []

    def choose(ids, row):
        logits.append(row)
        return row.argmax(-1, keepdim=True), None

    drafter = Drafter(model, 0, choose)
    with torch.no_grad():
        hidden = model.model(text, attention_mask=mask, position_ids=positions).last_hidden_state
        for known in (5, 6, 7, 10, 12, 13, 17, 18, 22):  # the next token alone, or with drafts that were right
            ids = text[:, :known]
            logits.clear()
            given = mask if padding else None
            drafts, _ = drafter.draft(ids, hidden[:, seen : known - 1], positions, given, count)
            seen = known - 1
            whole = torch.cat((ids, drafts), dim=1)
            longer = {"attention_mask": mask[:, : known + count], "position_ids": positions[:, : known + count]}
            outputs = model.model(whole, output_mtp_hidden_states=True, use_cache=False, **longer)
            for k, row in enumerate(logits):
                expected = model.project(outputs.mtp_hidden_states[k][:, known - 2])
                torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def drafting_model():
    torch.manual_seed(0)
    return learned(2)


class TwiceTheSame(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == input_ids[:, -3]


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": [4, 13], "pad_token_id": 0},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 9, "eos_token_id": 13, "pad_token_id": 0},
        {"stopping_criteria": StoppingCriteriaList([TwiceTheSame()])},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("batch", [1, 4])
def test_stops_and_processors_act_as_in_plain_decoding(drafting_model, options, batch):
    ids = sequences(batch, 6, seed=3)
    options = {"max_new_tokens": 20, "attention_mask": torch.ones_like(ids), **GREEDY, **options}
    expected = drafting_model.generate(ids, **options)
    assert torch.equal(drafting_model.generate(ids, use_mtp=True, **options), expected)


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=24),
    "reserved": lambda model: HfMoeReservedCache(model.config.num_hidden_layers, 24),  # of a recorded decoding
}


@pytest.mark.parametrize("cache", CACHES)
def test_goes_on_from_a_cache(drafting_model, cache):
    ids = sequences(2, 12, seed=8)
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "repetition_penalty": 1.5, **GREEDY}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    expected = drafting_model.generate(ids, **options)
    cache = CACHES[cache](drafting_model)
    with torch.no_grad():
        drafting_model(ids[:, :8], past_key_values=cache)
    out = drafting_model.generate(ids, past_key_values=cache, use_mtp=True, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-3, atol=1e-3)
    assert 0 < out.acceptance_rate < 1 and int(cache.get_seq_length()) == 23


@pytest.mark.parametrize("draft", ["gqa", "mla", "window"])
def test_a_draft_model_beside_the_modules(drafting_model, draft):
    """Speculation with another hf_moe model, which may have modules of its own, is as if there were no modules."""
    ids = sequences(1, 7, seed=4)
    options = {"max_new_tokens": 20, "attention_mask": torch.ones_like(ids), **GREEDY}
    expected = drafting_model.generate(ids, **options)
    assistant = tiny_model(num_mtp_layers=1, vocab_size=31, **VARIANTS[draft])
    assert torch.equal(drafting_model.generate(ids, assistant_model=assistant, **options), expected)
    assert torch.equal(drafting_model.generate(ids, use_mtp=True, **options), expected)


def chi_square_p_value(observed, probabilities):
    expected = probabilities * observed.sum()
    statistic = ((observed - expected).square() / expected).sum()
    half_freedom = torch.tensor((len(observed) - 1) / 2)
    return torch.special.gammaincc(half_freedom, statistic / 2).item()


def test_verified_tokens_have_the_models_distribution():
    rows, count, size = 60_000, 2, 5
    p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.05, 0.6, 0.2, 0.1], [0.3, 0.1, 0.1, 0.1, 0.4]])
    q = torch.tensor([[0.1, 0.5, 0.1, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]])
    drafts = torch.stack([torch.multinomial(row, rows, replacement=True) for row in q], dim=1)
    reached, shares = torch.ones(rows, dtype=torch.bool), []
    for place in range(count + 1):
        draft, of_draft = (drafts[:, place], q[place].expand(rows, -1)) if place < count else (None, None)
        token, same = follow(p[place].log().expand(rows, -1), draft, of_draft, sample=True)
        observed = torch.bincount(token[reached], minlength=size).float()
        assert chi_square_p_value(observed, p[place]) > 1e-3
        reached = reached & same
        shares.append(reached.float().mean().item())
    overlap = torch.minimum(p[:2], q).sum(-1)
    assert shares == pytest.approx([float(overlap[0]), float(overlap[0] * overlap[1]), 0.0], abs=0.01)


@pytest.mark.parametrize(
    ("batch", "variant", "cache"), [(1, "gqa", "dynamic"), (3, "mla", "static")], ids=["one", "rows-latent-static"]
)
def test_sampled_text_has_the_models_distribution(batch, variant, cache):
    small = {"vocab_size": 3, "num_hidden_layers": 1, "mlp_layer_types": ["dense"], "initializer_range": 0.1}
    model = tiny_model(num_mtp_layers=2, **VARIANTS[variant], **small)
    prompt, runs, temperature = torch.tensor([[1, 2]]), 600 // batch, 0.7
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        log_p = (model(torch.cat((prompt.expand(27, -1), texts), dim=1)).logits / temperature).log_softmax(-1)
    p = log_p[:, 1:4].gather(-1, texts.unsqueeze(-1)).sum(dim=(1, 2)).exp()
    ids = prompt.expand(batch, -1)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 3, "use_mtp": True}
    options |= {"cache_implementation": cache, "disable_compile": True}
    observed, accepted = torch.zeros(27), 0
    for _ in range(runs):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
        observed += torch.bincount((out.sequences[:, 2:] * torch.tensor([9, 3, 1])).sum(dim=1), minlength=27)
        accepted += out.accepted_tokens
    assert accepted > runs / 4
    assert chi_square_p_value(observed, p) > 1e-3


FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES = {"longrope": {"original_max_position_embeddings": 12, **FACTORS}, "dynamic": {}}


@pytest.mark.parametrize("rope_type", ROPES)
def test_no_drafts_where_frequencies_change(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, **ROPES[rope_type]}
    model = tiny_model(num_mtp_layers=1, rope_parameters=rope, max_position_embeddings=12)
    ids, greedy = tokens(1, 7), {"do_sample": False}
    drafted = model.generate(ids, use_mtp=True, max_new_tokens=5, **greedy)
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=5, **greedy))
    for drafts in ({"use_mtp": True}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match=f"'{rope_type}' where a text outgrows 12 tokens"):
            model.generate(ids, max_new_tokens=6, **greedy, **drafts)


class UnroundedLayer(QuantizedLayer):
    """A quantized layer of Transformers without the backend: it says that it can be cropped, and can't."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def test_errors_name_the_way_out(drafting_model):
    ids = sequences(2, 5)
    options = {"max_new_tokens": 4, "attention_mask": torch.ones_like(ids), "use_mtp": True}
    with pytest.raises(ValueError, match="num_mtp_layers is 0: add some with"):
        tiny_model().generate(ids, **options)
    with pytest.raises(ValueError, match="use_mtp does not go with num_beams > 1"):
        drafting_model.generate(ids, num_beams=2, **options)
    with pytest.raises(ValueError, match="use_mtp does not go with assistant_model"):
        drafting_model.generate(ids, assistant_model=tiny_model(), **options)
    with pytest.raises(ValueError, match="use_mtp does not go with use_cache=False"):
        drafting_model.generate(ids, use_cache=False, **options)
    with pytest.raises(ValueError, match="needs input_ids of the whole sequence"):
        drafting_model.generate(inputs_embeds=drafting_model.model.embed_tokens(ids), **options)
    windows = mtp_model(1, **VARIANTS["window"])
    with pytest.raises(ValueError, match="static sliding-window cache: use a dynamic one"):
        windows.generate(ids, cache_implementation="static", disable_compile=True, **options)
    with pytest.raises(ValueError, match="can't take tokens back from this Cache: use a dynamic or static one"):
        drafting_model.generate(ids, past_key_values=Cache(layers=[UnroundedLayer(residual_length=4)] * 3), **options)
    for changes in ({"num_mtp_layers": -1}, {"mtp_loss_coef": -0.1}):
        with pytest.raises(StrictDataclassClassValidationError, match=f"{next(iter(changes))} .* must be at least 0"):
            tiny_model(**changes)
    with pytest.raises(ValueError, match="takes a count of at least 1, not 0"):
        drafting_model.add_mtp_layers(0)
    model = mtp_model(1).train()
    with pytest.raises(ValueError, match="leave out past_key_values"):
        model(ids, labels=ids, past_key_values=DynamicCache(config=model.config))
