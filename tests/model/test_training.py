"""The loss and its gradient: what is added, what is masked, what checkpointing must not change."""

import pytest
import torch

from hf_moe import HfMoeForSequenceClassification, HfMoeForTokenClassification
from hf_moe.model.balancing import LOSSES, routed, statistics
from tests.conftest import tiny_config, tiny_model, tokens


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_loss_in_training_is_cross_entropy_plus_the_balance_losses():
    model, ids = tiny_model(router_aux_loss_coef=0.3, router_z_loss_coef=0.02).train(), tokens()
    plain = model(ids, labels=ids, output_router_logits=False)
    balanced = model(ids, labels=ids)
    assert plain.aux_loss is None and plain.router_logits is None
    assert list(balanced.router_losses) == ["router_aux_loss_coef", "router_z_loss_coef"]
    expected = plain.loss + 0.3 * balanced.aux_loss + 0.02 * balanced.router_losses["router_z_loss_coef"]
    torch.testing.assert_close(balanced.loss, expected)


def test_outside_training_the_loss_is_cross_entropy_unless_asked():
    model, ids = tiny_model(), tokens()
    plain, asked = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None
    torch.testing.assert_close(asked.loss, plain.loss + 0.01 * asked.aux_loss)
    model.config.output_router_logits = True
    torch.testing.assert_close(model(ids, labels=ids).loss, asked.loss)


def test_router_outputs_have_one_entry_a_sparse_layer():
    out = tiny_model()(tokens(2, 11), output_router_logits=True)
    assert [x.shape for x in out.router_logits] == [(22, 7)] * 2
    assert [x.shape for x in out.router_indices] == [(22, 3)] * 2
    assert all(x.dtype == torch.float32 for x in out.router_logits)
    layers = [routed(x, x.softmax(-1), i) for x, i in zip(out.router_logits, out.router_indices, strict=True)]
    losses = [LOSSES["router_aux_loss_coef"](layer, statistics(layer), None) for layer in layers]
    torch.testing.assert_close(out.aux_loss, sum(losses) / 2)


def test_a_dense_model_has_no_router_losses():
    model, ids = tiny_model(mlp_layer_types=["dense"] * 3).train(), tokens()
    out = model(ids, labels=ids)
    assert out.aux_loss is None and out.loss.isfinite()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_and_no_gradient(side):
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    ids = tokens(1, 9)
    labels = torch.cat((torch.tensor([[-100]]), ids[:, 1:]), dim=1)  # left padding gives the first token a prompt
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    pad = torch.zeros(1, 5, dtype=torch.long)
    order = (pad, ids) if side == "left" else (ids, pad)
    mask = torch.cat([torch.full_like(x, x is ids) for x in order], dim=1)
    padded = torch.cat(order, dim=1)
    labels = torch.cat([labels if x is ids else torch.full_like(pad, -100) for x in order], dim=1)
    model(padded, attention_mask=mask, labels=labels).loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_every_parameter_learns():
    model, ids = (
        tiny_model(n_shared_experts=1, shared_expert_gate=True, mlp_bias=True, qk_norm="head").train(),
        tokens(4, 31),
    )
    model(ids, labels=ids).loss.backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_text_in_training_mode_with_checkpointing_is_the_same():
    """As in TRL's GRPO: without gradients there is nothing to checkpoint, and the cache is read."""
    model, ids = tiny_model(), tokens(2, 7)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model.train().generate(ids, **options), expected)


def test_checkpointing_changes_no_gradient():
    ids = tokens()
    expected = tiny_model(router_aux_loss_coef=0.5).train()
    expected(ids, labels=ids).loss.backward()
    model = tiny_model(router_aux_loss_coef=0.5).train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=["named", "default"])
def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_balance_loss(kwargs):
    with pytest.raises(ValueError, match="use_reentrant=True would cut router_aux_loss_coef off"):
        tiny_model().gradient_checkpointing_enable(kwargs)
    tiny_model(router_aux_loss_coef=0.0).gradient_checkpointing_enable(kwargs)


def test_the_selection_bias_survives_a_change_of_dtype():
    model = tiny_model(router_type="sigmoid_topk", router_args={"selection_bias": True})
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()


def test_tied_embeddings_share_one_tensor():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_packed_documents_do_not_see_each_other():
    model = tiny_model()
    one, two = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    packed = torch.cat((one, two), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(7))).unsqueeze(0)
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=False).logits
        apart = torch.cat((model(one).logits, model(two).logits), dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (HfMoeForSequenceClassification, torch.tensor([2, 0])),
        (HfMoeForTokenClassification, torch.arange(22).view(2, 11) % 3),
    ],
    ids=["sequence", "token"],
)
def test_classification_heads_learn(model_class, labels):
    torch.manual_seed(0)
    model = model_class(tiny_config(num_labels=3)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = model(tokens(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
