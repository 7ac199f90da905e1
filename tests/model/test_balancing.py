"""Each loss against its paper's formula, one token and one expert at a time."""

from types import SimpleNamespace

import pytest
import torch

from hf_moe.model.balancing import (
    LOSSES,
    Statistics,
    policy_loss,
    quantile_bias,
    routed,
    statistics,
    update_selection_bias,
)


def per_token(batch):
    """The batch as plain numbers: for each token that counts its sequence, scores, chosen experts and logits."""
    length = len(batch.mask_T) // batch.sequences
    return [
        SimpleNamespace(
            sequence=t // length,
            s=batch.affinity_TE[t].double().tolist(),
            chosen=batch.chosen_TE[t].nonzero().flatten().tolist(),
            x=batch.logits_TE[t].double().tolist(),
        )
        for t in range(len(batch.mask_T))
        if batch.mask_T[t]
    ]


def expert_formula(tokens, E, K):
    """DeepSeekMoE, equations 12-14."""
    f = [E / (K * len(tokens)) * sum(e in t.chosen for t in tokens) for e in range(E)]
    P = [sum(t.s[e] for t in tokens) / len(tokens) for e in range(E)]
    return f, P


def slow_expert(tokens, E, K, G, M):
    f, P = expert_formula(tokens, E, K)
    return sum(a * b for a, b in zip(f, P, strict=True))


def slow_device(tokens, E, K, G, M):
    """DeepSeekMoE, equations 15-17."""
    f, P = expert_formula(tokens, E, K)
    devices = [range(d * E // G, (d + 1) * E // G) for d in range(G)]
    return sum(sum(f[e] for e in d) / len(d) * sum(P[e] for e in d) for d in devices)


def slow_communication(tokens, E, K, G, M):
    """DeepSeek-V2, equations 29-31."""
    _, P = expert_formula(tokens, E, K)
    total = 0.0
    for d in range(G):
        members = set(range(d * E // G, (d + 1) * E // G))
        sent = sum(bool(members & set(t.chosen)) for t in tokens)
        total += G / (M * len(tokens)) * sent * sum(P[e] for e in members)
    return total


def slow_sequence(tokens, E, K, G, M):
    """DeepSeek-V3, equations 17-20, averaged over the sequences."""
    groups = [[t for t in tokens if t.sequence == b] for b in sorted({t.sequence for t in tokens})]
    return sum(slow_expert(group, E, K, G, M) for group in groups) / len(groups)


def slow_z(tokens, E, K, G, M):
    """ST-MoE, equation 5."""
    return sum(torch.tensor(t.x, dtype=torch.float64).logsumexp(0).item() ** 2 for t in tokens) / len(tokens)


SLOW = {
    "router_aux_loss_coef": slow_expert,
    "device_aux_loss_coef": slow_device,
    "comm_aux_loss_coef": slow_communication,
    "seq_aux_loss_coef": slow_sequence,
    "router_z_loss_coef": slow_z,
}


def random_batch(B=3, S=7, E=12, K=3, score="softmax", masked=False, dtype=torch.float32):
    logits = torch.randn(B * S, E).to(dtype)
    affinity = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    mask = (torch.rand(B, S) > 0.4).float() if masked else None
    if masked:
        mask[0], mask[1, 0] = 0, 1  # one sequence is all padding
        mask = mask.reshape(-1)
    return routed(logits, affinity, affinity.topk(K).indices, mask, sequences=B)


CONFIG = SimpleNamespace(topk_group=2)


def test_every_loss_has_its_formula_here():
    assert set(SLOW) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("E", "K", "G"), [(12, 3, 4), (6, 1, 3), (5, 2, 5)])
def test_formula(name, score, masked, dtype, E, K, G):
    batch = random_batch(E=E, K=K, score=score, masked=masked, dtype=dtype)
    loss = LOSSES[name](batch, statistics(batch, G), CONFIG)
    assert loss.item() == pytest.approx(SLOW[name](per_token(batch), E, K, G, 2), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gradient_is_the_formulas(name, score, masked):
    """Finite differences of the slow formula in float64, the choice held still, at every logit."""
    B, S, E, K, G = 2, 3, 6, 2, 3
    logits = torch.randn(B * S, E, dtype=torch.float64)
    index = logits.topk(K).indices
    mask = torch.tensor([1, 1, 0, 1, 1, 1]) if masked else torch.ones(B * S)

    def slow(x):
        affinity = x.softmax(-1) if score == "softmax" else x.sigmoid()
        s = (affinity / affinity.sum(-1, keepdim=True)).tolist()
        rows = [t for t in range(B * S) if mask[t]]
        tokens = [SimpleNamespace(sequence=t // S, s=s[t], chosen=index[t].tolist(), x=x[t].tolist()) for t in rows]
        return SLOW[name](tokens, E, K, G, 2)

    expected, eps = torch.zeros_like(logits), 1e-3
    for t in range(B * S):
        for e in range(E):
            step = torch.zeros_like(logits)
            step[t, e] = eps
            expected[t, e] = (slow(logits + step) - slow(logits - step)) / (2 * eps)

    x = logits.float().requires_grad_()
    batch = routed(x, x.softmax(-1) if score == "softmax" else x.sigmoid(), index, mask, sequences=B)
    LOSSES[name](batch, statistics(batch, G), CONFIG).backward()
    torch.testing.assert_close(x.grad, expected.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_large_batch(name):
    """Loss and gradient, with unequal micro-batches, one of them half padding."""
    logits = torch.randn(5, 7, 12, requires_grad=True)
    mask = torch.ones(5, 7)
    mask[3, 2:] = 0

    def batch(rows):
        flat = logits[rows].reshape(-1, 12)
        affinity = flat.softmax(-1)
        return routed(flat, affinity, affinity.topk(3).indices, mask[rows].reshape(-1), sequences=len(logits[rows]))

    whole = batch(slice(0, 5))
    loss = LOSSES[name](whole, statistics(whole, 4), CONFIG)
    (expected,) = torch.autograd.grad(loss, logits)
    parts = [batch(slice(0, 1)), batch(slice(1, 3)), batch(slice(3, 5))]
    step = Statistics(*(sum(values) for values in zip(*(statistics(part, 4) for part in parts), strict=True)))
    shares = [LOSSES[name](part, step, CONFIG) for part in parts]
    (actual,) = torch.autograd.grad(sum(shares), logits)
    torch.testing.assert_close(sum(shares), loss)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "router_z_loss_coef"])
@pytest.mark.parametrize("K", [2, 6])
def test_one_at_perfect_balance(name, K):
    """12 tokens, 12 experts in 4 groups; every token reaches 2 groups."""
    index = torch.stack([(3 * (t // 3) + torch.arange(3)) % 12 for t in range(12)])
    index = torch.cat((index, (index + 3) % 12), dim=1)[:, [0, 3] if K == 2 else slice(None)]
    index = index if K == 6 else torch.stack((torch.arange(12), (torch.arange(12) + 3) % 12), dim=1)
    batch = routed(torch.zeros(12, 12), torch.full((12, 12), 1 / 12), index)
    assert LOSSES[name](batch, statistics(batch, 4), CONFIG).item() == pytest.approx(1.0)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_collapse_is_E_over_K(K):
    affinity = torch.zeros(6, 6)
    affinity[:, :K] = 1 / K
    batch = routed(affinity, affinity, torch.arange(K).expand(6, K))
    assert LOSSES["router_aux_loss_coef"](batch, statistics(batch), CONFIG).item() == pytest.approx(6 / K)


def test_gradient_of_the_switch_loss():
    """d loss / d p_{i,t} = N / T^2 count_i where the p are free of each other (Switch, 2.2)."""
    T, E = 9, 4
    p = torch.rand(T, E, requires_grad=True)
    index = torch.randint(E, (T, 1))
    batch = routed(torch.zeros(T, E), torch.ones(T, E), index)._replace(affinity_TE=p)
    LOSSES["router_aux_loss_coef"](batch, statistics(batch), CONFIG).backward()
    torch.testing.assert_close(p.grad, (E / T**2 * index.flatten().bincount(minlength=E)).float().expand(T, E))


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    logits = torch.randn(2, 10, 6)
    mask = torch.ones(2, 10)
    mask[:, 7:] = 0

    def loss(x, m):
        flat = x.reshape(-1, 6)
        batch = routed(flat, flat.softmax(-1), flat.topk(2).indices, m.reshape(-1), sequences=2)
        return LOSSES[name](batch, statistics(batch, 3), CONFIG)

    torch.testing.assert_close(loss(logits, mask), loss(logits[:, :7], mask[:, :7]))


@pytest.mark.parametrize("name", LOSSES)
def test_all_padding_is_zero(name):
    logits = torch.randn(4, 6)
    batch = routed(logits, logits.softmax(-1), logits.topk(2).indices, torch.zeros(4))
    assert LOSSES[name](batch, statistics(batch, 3), CONFIG) == 0


def test_policy_gradient_is_the_expected_losss():
    """Averaged over all choices, the gradient is that of the expected loss, whatever the baseline."""
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    cost = torch.randn(5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits.softmax(-1)[0] * cost).sum(), logits)
    total = torch.zeros_like(logits)
    for expert in range(5):
        batch = routed(logits, logits.softmax(-1), torch.tensor([[expert]]))._replace(logits_TE=logits)
        policy, baseline = policy_loss(batch, torch.tensor([0.7]).double(), cost[expert : expert + 1], torch.ones(1))
        assert baseline.item() == pytest.approx((0.7 - cost[expert].item()) ** 2)
        (gradient,) = torch.autograd.grad(policy, logits)
        total += logits.softmax(-1)[0, expert].item() * gradient
    torch.testing.assert_close(total, expected)


def test_the_bias_steps_towards_the_mean_load():
    bias = torch.zeros(4)
    update_selection_bias(bias, torch.tensor([0, 5, 3, 4]), 1e-3)
    assert bias.tolist() == pytest.approx([1e-3, -1e-3, 0, -1e-3])


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_quantiles_balance_what_was_not(masked):
    """Some alternations on one batch: every expert is chosen as often as the others, within a few tokens."""
    scores = torch.sigmoid(torch.randn(401, 7) + torch.linspace(-2, 2, 7))
    mask = (torch.rand(401) > 0.2).float() if masked else torch.ones(401)
    bias = torch.zeros(7)

    def loads() -> torch.Tensor:
        chosen = (scores + bias)[mask.bool()].topk(3, dim=-1).indices
        return chosen.flatten().bincount(minlength=7) * 7 / (3 * mask.sum())

    assert loads().max() > 2 and loads().min() < 0.1
    for _ in range(30):
        bias = quantile_bias(scores, bias, 3, mask)
    assert loads().max() < 1.1 and loads().min() > 0.9
