"""What vLLM's Transformers backend asks of a model that it does not know, on our class, without vLLM.

By its documentation ("Writing custom models") and its code: it builds auto_map's AutoModel with attn_implementation
"vllm", replaces each sparse block's `experts`, hands its attention down by keyword, one per layer_idx, and feeds one
row of tokens without a cache of Transformers'.
"""

import ast
import inspect
import re
import textwrap

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_moe.model.modeling_hf_moe import ATTENTIONS
from tests.conftest import tiny_config, tiny_model, tokens

MODELS = {
    "sliding": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4},
    "qk-norm": {"qk_norm": "projection", "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "shared": {"n_shared_experts": 1, "shared_expert_gate": True, "router_type": "topk_softmax"},
    "bias": {
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "mla": {
        "attention_type": "mla",
        "num_key_value_heads": 6,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "num_mtp_layers": 1,
    },
    "moa": {"attention_type": "moa"},
    "hash": {"router_type": "hash"},
}


class PagedAttention:
    """Causal attention of one layer that keeps keys and values itself, as vLLM's instances do."""

    def __init__(self, window: int | None):
        self.window, self.keys, self.values, self.calls = window, None, None, 0

    def __call__(self, query, key, value, scaling):
        """Query, key and value [1, H, S, d] of the next tokens; [S, H d] of them."""
        self.calls += 1
        self.keys = key if self.keys is None else torch.cat((self.keys, key), dim=2)
        self.values = value if self.values is None else torch.cat((self.values, value), dim=2)
        repeats = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (self.keys, self.values))
        scores = query @ keys.transpose(-1, -2) * scaling
        place = torch.arange(keys.shape[2])
        ahead = place[None] - place[-query.shape[2] :, None]
        hidden = ahead > 0 if self.window is None else (ahead > 0) | (ahead <= -self.window)
        output = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ values
        return output.transpose(1, 2).reshape(query.shape[2], -1)


def vllm_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    return attention_instances[module.layer_idx](query, key, value, scaling), None


class ReplacedExperts(nn.Module):
    """Stands where `experts` stood, and computes silu experts token by token from their tensors."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.calls = experts.gate_up_proj, experts.down_proj, 0

    def forward(self, hidden_states, topk_ids, topk_weights, **kwargs):
        self.calls += 1
        assert hidden_states.ndim == 2 and topk_ids.shape == topk_weights.shape == (len(hidden_states), 3)
        assert topk_ids.min() >= 0 and topk_ids.max() < len(self.down_proj)
        output = torch.zeros_like(hidden_states)
        for token, x in enumerate(hidden_states):
            for expert, weight in zip(topk_ids[token], topk_weights[token], strict=True):
                gate, up = (self.gate_up_proj[expert] @ x).chunk(2)
                output[token] += weight * (self.down_proj[expert] @ (nn.functional.silu(gate) * up))
        return output


@pytest.fixture
def backend(monkeypatch):
    """The name "vllm" is an attention function of Transformers, as importing vLLM makes it."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", vllm_attention)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_its_attention_and_its_experts_give_our_hidden_states(kind, backend):
    changes = {"num_attention_heads": 6} | MODELS[kind]
    ours = tiny_model(**changes).model.eval()
    theirs = AutoModel.from_config(tiny_config(**changes), attn_implementation="vllm").eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "mtp_layers" not in k})
    replaced = []
    for layer in theirs.layers:
        experts = dict(layer.mlp.named_children()).get("experts")
        if experts is not None:
            assert all(parameter.ndim == 3 for parameter in experts.parameters())
            names = list(inspect.signature(type(experts).forward).parameters)
            assert names[1:4] == ["hidden_states", "top_k_index", "top_k_weights"]
            layer.mlp.experts = ReplacedExperts(experts)
            replaced.append(layer.mlp.experts)
    assert len(replaced) == 2
    ids = tokens(batch=1, length=11)
    windows = [4 if kind == "sliding_attention" else None for kind in theirs.config.layer_types]
    instances = {i: PagedAttention(window) for i, window in enumerate(windows)}
    steps = []
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 11)]:  # a prompt, two tokens, and a chunk of two
        output = theirs(
            input_ids=ids[:, start:end],
            position_ids=torch.arange(start, end)[None],
            use_cache=False,
            attention_instances=instances,
            return_dict=False,
        )
        steps.append(output[0])
    assert [instance.calls for instance in instances.values()] == [4, 4, 4]
    assert [experts.calls for experts in replaced] == [4, 4]
    torch.testing.assert_close(torch.cat(steps, dim=1), ours(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_the_class_and_its_files_say_that_they_comply(tmp_path):
    model = tiny_model(num_mtp_layers=1, logits_scaling=4.0, final_logit_softcapping=30.0, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map["AutoModel"] == "modeling_hf_moe.HfMoeModel"
    decoder = AutoModel.from_config(config)
    assert type(decoder).is_backend_compatible()
    # Names that it reads from the configuration.
    assert (config.num_experts_per_tok, config.moe_intermediate_size, config.n_shared_experts) == (3, 24, 0)
    assert (config.logit_scale, config.final_logit_softcapping, config.tie_word_embeddings) == (0.25, 30.0, True)
    # Weights are named for the decoder under "model.", and those it has no place for are marked.
    assert decoder.base_model_prefix == "model"
    names = [name.removeprefix("model.") for name in model.state_dict() if name != "lm_head.weight"]
    extra = [name for name in names if name not in decoder.state_dict()]
    marks = decoder._keys_to_ignore_on_load_unexpected
    assert extra and all(any(re.search(mark, f"model.{name}") for mark in marks) for name in extra)
    # One list of layers to divide between pipeline stages; the rest are its neighbours.
    children = dict(decoder.named_children())
    stages = list(config.base_model_pp_plan)
    assert stages == ["embed_tokens", "layers", "norm"] and set(stages) <= set(children)
    assert [name for name in stages if isinstance(children[name], nn.ModuleList)] == ["layers"]


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_attentions_source_shows_its_one_call(kind):
    """It looks there for the function of the interface, and for the scaling that it is called with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(ATTENTIONS[kind].forward)))
    names = [
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    assert len(names) == len(calls) == 1
    assert {word.arg: ast.unparse(word.value) for word in calls[0].keywords}["scaling"] == "self.scaling"


@pytest.mark.parametrize("kind", ["sliding", "shared", "mla"])
def test_the_tensor_parallel_plan_names_linear_layers_and_experts(kind):
    decoder = tiny_model(**MODELS[kind]).model
    places = dict(decoder.named_modules()) | dict(decoder.named_parameters())
    for pattern, style in decoder.config.base_model_tp_plan.items():
        found = [places[name] for name in places if re.fullmatch(pattern.replace("*", r"\d+"), name)]
        assert found, pattern
        linear = style in ("colwise", "rowwise") and not pattern.startswith("layers.*.mlp.experts")
        assert all(isinstance(x, nn.Linear) for x in found) or not linear


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention_sinks": True}, "attention_sinks"),
        ({"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 4}, "chunked_attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"gated_mlp": False}, "gated_mlp False"),
        ({"experts_swiglu_limit": 7.0}, "experts_swiglu_limit"),
        ({"expert_input_scaling": True}, "expert_input_scaling"),
        ({"router_type": "dense"}, "router_type 'dense'"),
        ({"router_args": {"eval_capacity_factor": 2.0}}, "eval_capacity_factor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_would_leave_out_is_refused(changes, name, backend):
    with pytest.raises(ValueError, match=f"vLLM's Transformers backend has no .*{name}"):
        AutoModel.from_config(tiny_config(**changes), attn_implementation="vllm")
