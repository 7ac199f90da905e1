"""First layers that take the experts of a token's id, and weigh them by learned scores."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_moe import HfMoeForCausalLM
from hf_moe.model.hashing import HfMoeHashedChoice
from hf_moe.model.routing import ROUTERS
from tests.conftest import tiny_config, tiny_model, tokens

ABLE = [name for name, router in ROUTERS.items() if router.may_hash]
SPARSE = {"mlp_layer_types": ["sparse"] * 3, "num_hash_layers": 2}


@pytest.mark.parametrize("router_type", ABLE)
@pytest.mark.parametrize("normed", [False, True])
def test_the_id_says_which_and_the_scores_how_much(router_type, normed):
    model = tiny_model(**SPARSE, router_type=router_type, norm_topk_prob=normed, routed_scaling_factor=1.5)
    router, ids, x = model.model.layers[1].mlp.gate, tokens(2, 9).flatten(), torch.randn(18, 48)
    assert isinstance(router, HfMoeHashedChoice) and not isinstance(model.model.layers[2].mlp.gate, HfMoeHashedChoice)
    logits, weights, index, *_ = router(x, None, ids)
    assert torch.equal(index, router.hash_table[ids])
    for row, of_row in enumerate(index.tolist()):
        values = [logits[row, e] for e in range(7)]
        total = sum(v.exp() for v in values)
        score = {
            "softmax_topk": lambda e, v=values, t=total: v[e].exp() / t,
            "topk_softmax": lambda e, v=values, i=of_row: v[e].exp() / sum(v[j].exp() for j in i),
            "sigmoid_topk": lambda e, v=values: 1 / (1 + (-v[e]).exp()),
            "sqrtsoftplus_topk": lambda e, v=values: (1 + v[e].exp()).log().sqrt(),
        }[router_type]
        scores = torch.stack([score(e) for e in of_row])
        expected = 1.5 * (scores / scores.sum() if normed else scores)
        torch.testing.assert_close(weights[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_decodes_and_loads_as_it_was_saved(dtype, tmp_path):
    changes = SPARSE | {"router_type": "sigmoid_topk", "router_args": {"selection_bias": True}, "num_mtp_layers": 1}
    model, ids = tiny_model(**changes).to(dtype), tokens(2, 12)
    model.train()(ids, labels=ids).loss.backward()
    gates = [layer.mlp.gate for layer in model.model.layers]
    assert all(gate.weight.grad.abs().sum() > 0 for gate in gates)
    assert [gate.e_score_correction_bias is None for gate in gates] == [True, True, False]
    model.eval()
    with torch.no_grad():
        whole, cache, parts = model(ids).logits, None, []
        for start, end in ((0, 5), (5, 6), (6, 12)):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=tolerance, atol=tolerance)
    model.save_pretrained(tmp_path)
    again = HfMoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again.model.layers[0].mlp.gate.hash_table, gates[0].hash_table)
    torch.testing.assert_close(again(ids).logits, whole, rtol=tolerance, atol=tolerance)


def test_layers_hash_differently_and_a_larger_vocabulary_keeps_what_was():
    model = tiny_model(**SPARSE)
    first, second = (model.model.layers[i].mlp.gate.hash_table.clone() for i in (0, 1))
    assert not torch.equal(first, second)
    model.resize_token_embeddings(101)
    assert torch.equal(model.model.layers[0].mlp.gate.hash_table[:97], first)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 48))


@pytest.mark.parametrize("router_type", [name for name in ROUTERS if name not in ABLE])
def test_routers_that_weigh_no_others_choice_are_refused(router_type):
    top_k = {"num_experts_per_tok": 2} if router_type == "gshard" else {}
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"num_hash_layers \(1\) needs a router that weighs any"
    ):
        tiny_config(num_hash_layers=1, router_type=router_type, **top_k)
