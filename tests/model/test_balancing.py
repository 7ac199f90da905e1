import pytest
import torch

from hf_moe.model.balancing import expert_counts, load_balancing_loss, router_z_loss


def loops(affinity, index, mask):
    """DeepSeekMoE's equations 12-14, one token and one expert at a time."""
    num_experts, top_k = affinity.shape[1], index.shape[1]
    counted = [t for t in range(len(index)) if mask[t]]
    loss = 0.0
    for e in range(num_experts):
        f = num_experts / (top_k * len(counted)) * sum(e in index[t] for t in counted)
        p = sum((affinity[t, e] / affinity[t].sum()).item() for t in counted) / len(counted)
        loss += f * p
    return loss


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 3, 1), (17, 5, 2), (33, 12, 7)])
def test_load_balancing_loss_is_the_formula(score, masked, T, E, K):
    logits = torch.randn(T, E)
    affinity = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    index = affinity.topk(K).indices
    mask = torch.rand(T) > 0.4 if masked else torch.ones(T, dtype=torch.bool)
    mask[0] = True
    loss = load_balancing_loss(affinity, index, mask if masked else None)
    assert loss.item() == pytest.approx(loops(affinity, index, mask), rel=1e-5)


@pytest.mark.parametrize(("E", "K"), [(6, 1), (6, 2), (6, 3)])
def test_one_at_perfect_balance_and_E_over_K_at_collapse(E, K):
    index = torch.arange(E * K).view(-1, K) % E
    assert load_balancing_loss(torch.full((E, E), 1 / E), index).item() == pytest.approx(1.0)
    collapsed = torch.zeros(E, E)
    collapsed[:, :K] = 1 / K
    assert load_balancing_loss(collapsed, torch.arange(K).expand(E, K)).item() == pytest.approx(E / K)


def test_gradient_of_the_switch_loss():
    """d loss / d p_{i,t} = N / T^2 count_i where the p are free of each other (Switch, 2.2)."""
    T, E = 9, 4
    p = torch.rand(T, E, requires_grad=True)
    index = torch.randint(E, (T, 1))
    f = expert_counts(index, E) * E / T
    (f * p.mean(0)).sum().backward()
    torch.testing.assert_close(p.grad, (E / T**2 * index.flatten().bincount(minlength=E)).float().expand(T, E))


def test_padding_changes_nothing():
    logits = torch.randn(10, 6)
    index = logits.topk(2).indices
    mask = torch.tensor([1] * 7 + [0] * 3)
    for loss in (
        lambda x, i, m: load_balancing_loss(x.softmax(-1), i, m),
        lambda x, i, m: router_z_loss(x, m),
    ):
        torch.testing.assert_close(loss(logits, index, mask), loss(logits[:7], index[:7], None))


def test_all_padding_is_zero():
    logits = torch.randn(4, 6)
    mask = torch.zeros(4)
    assert load_balancing_loss(logits.softmax(-1), logits.topk(2).indices, mask) == 0
    assert router_z_loss(logits, mask) == 0


def test_z_loss_is_the_formula():
    logits = torch.randn(7, 5)
    expected = sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / 7
    torch.testing.assert_close(router_z_loss(logits), expected)


def test_counts_leave_out_experts_on_other_ranks():
    index = torch.tensor([[0, 4], [2, 4], [4, 4]])
    assert expert_counts(index, 4).tolist() == [1, 0, 1, 0]
