"""FP8 experts and linear layers: the definition against float64, and the kernels against the definition."""

import pytest
import torch

from hf_moe.kernels.formula import Formula
from hf_moe.kernels.fp8 import eager, operators

from .. import reference

SWIGLU = Formula("silu")


def problem(T, K, D, inner, E, formula=SWIGLU, index=None):
    torch.manual_seed(1)
    U = 2 * inner if formula.gated else inner
    if index is None:
        index = torch.rand(T, E).argsort(-1)[:, :K]
    tensors = {"x": torch.randn(T, D), "weights": torch.rand(T, K)}
    tensors |= {"up": torch.randn(E, U, D) * D**-0.5, "down": torch.randn(E, D, inner) * inner**-0.5}
    return index, tensors


def run(function, index, tensors, device="cpu", dtype=torch.float32):
    """Output and gradients by name, for one random direction."""
    leaves = {name: tensor.detach().to(device, dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    output = function(index.to(device), **leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), direction)
    results = {"output": output} | dict(zip(leaves, gradients, strict=True))
    return {name: value.detach().cpu().double() for name, value in results.items()}


def by(function, formula):
    """With an adapter's part, if there is one, as experts.py adds it."""

    def experts(index, x, weights, up, down, low=None, widen=None, narrow=None, last=None):
        output, narrowed = function(x, index, weights, up, down, low, widen, narrow, formula)
        if narrow is None:
            return output
        return output + torch.einsum("tkr,tkdr->td", narrowed, last[index.clamp(max=len(last) - 1)])

    return experts


def in_float64(formula):
    """An adapter's part is added token by token."""

    def experts(index, x, weights, up, down, low=None, widen=None, narrow=None, last=None):
        if narrow is None:
            return reference.experts(x, index, weights, up, down, *[None] * 5, *formula)
        output = torch.zeros_like(x)
        for token, choice in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])).tolist():
            expert = index[token, choice]
            if expert < len(up):
                hidden = up[expert] @ x[token] + widen[expert] @ low[token, expert]
                activated = eager.activate(hidden, formula)
                change = (down[expert] + last[expert] @ narrow[expert]) @ activated
                output = output.index_add(0, torch.tensor(token), weights[token, choice] * change[None])
        return output

    return experts


def distances(one, other) -> dict[str, float]:
    """Relative errors; of what is all zero in `other`, absolute ones."""
    assert one.keys() == other.keys()
    return {name: ((one[name] - other[name]).norm() / (other[name].norm() or 1)).item() for name in one}


SHAPES = {  # T, K, D, I, E
    "odd": (37, 3, 256, 128, 5),
    "one-token": (1, 2, 128, 128, 3),
    "several-tiles": (150, 2, 128, 256, 2),
}
INDICES = {  # of 9 tokens, 2 choices, 4 experts
    "all-on-one": lambda: torch.full((9, 2), 2),
    "empty-experts": lambda: torch.randint(1, 3, (9, 2)),
    "some-elsewhere": lambda: torch.randint(0, 5, (9, 2)),
    "all-elsewhere": lambda: torch.full((9, 2), 4),
}
FORMULAS = {
    "plain": Formula("relu2", gated=False),
    "limit-shift": Formula("silu", limit=3.0, shift=1.0),
}


def check(index, tensors, formula, device):
    expected = run(in_float64(formula), index, tensors, dtype=torch.float64)
    defined = run(by(eager.Experts.apply, formula), index, tensors)
    # Each operand is off by some 2.5% of its norm.
    far = distances(defined, expected)
    assert all(0.01 < x < 0.13 or (x == 0 and not expected[name].any()) for name, x in far.items()), far
    near = distances(run(by(operators.experts, formula), index, tensors, device), defined)
    # A card sums FP8's products in 14 bits: of what is quantised next, some numbers become their neighbours.
    assert max(near.values()) < (2e-3 if device.type == "cpu" else 2e-2), near


@pytest.mark.parametrize("shape", SHAPES)
def test_experts(device, shape):
    check(*problem(*SHAPES[shape]), SWIGLU, device)


@pytest.mark.parametrize("name", INDICES)
def test_indices(device, name):
    check(*problem(9, 2, 128, 128, 4, index=INDICES[name]()), SWIGLU, device)


@pytest.mark.parametrize("name", ["some-elsewhere", "empty-experts"])
def test_an_adapter(device, name):
    """Of two ranks, whose part is not quantised: its gradients are as near as what they are made of."""
    index, tensors = problem(9, 2, 128, 128, 4, index=INDICES[name]())
    shapes = {"low": (9, 4, 3), "widen": (4, 256, 3), "narrow": (4, 5, 128), "last": (4, 128, 5)}
    check(index, tensors | {key: 0.3 * torch.randn(shape) for key, shape in shapes.items()}, SWIGLU, device)


def test_several_blocks_of_columns(device):
    check(*problem(9, 2, 384, 384, 2), SWIGLU, device)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(device, name):
    check(*problem(9, 2, 128, 128, 2, FORMULAS[name]), FORMULAS[name], device)


def test_no_tokens(device):
    index, tensors = problem(0, 2, 128, 128, 3)
    results = run(by(operators.experts, SWIGLU), index, tensors, device)
    assert not any(x.any() for x in results.values())


def test_without_a_backward_nothing_is_kept(device):
    index, tensors = problem(9, 2, 128, 128, 2)
    x, weights, up, down = (tensor.to(device) for tensor in tensors.values())
    given = (x, index.to(device), weights, up, down, None, None, None, "silu", True, None, 0.0)
    _, _, _, _, hidden, scales, *_ = operators.experts_up(*given, False)
    assert hidden.numel() == scales.numel() == 0


@pytest.mark.parametrize(("T", "K", "N"), [(5, 128, 48), (133, 272, 144), (128, 128, 256), (1, 16, 16)])
def test_linear(device, T, K, N):
    tensors = {"x": torch.randn(T, K), "weight": torch.randn(N, K)}
    none = torch.empty(0)
    expected = run(lambda _, x, weight: x @ weight.T, none, tensors, dtype=torch.float64)
    defined = run(lambda _, x, weight: eager.Linear.apply(x, weight), none, tensors)
    far = distances(defined, expected)
    assert all(0.005 < far[name] < 0.06 for name in ("output", "x")) and far["weight"] < 1e-6, far
    near = distances(run(lambda _, x, weight: operators.linear(x, weight), none, tensors, device), defined)
    assert max(near.values()) < 2e-3, near


def test_the_definition_computes_in_float32_under_autocast():
    index, tensors = problem(9, 2, 128, 128, 2)
    x, weights, up, down = tensors.values()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, _ = eager.Experts.apply(x, index, weights, up, down, None, None, None, SWIGLU)
            results.append((eager.Linear.apply(x, down[0]), output))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_nothing(device):
    x = torch.empty(0, 128, device=device, requires_grad=True)
    weight = torch.randn(16, 128, device=device, requires_grad=True)
    operators.linear(x, weight).sum().backward()
    assert x.grad.shape == (0, 128) and not weight.grad.any()


def test_operators_say_the_shapes_they_return(device):
    checks = ("test_autograd_registration", "test_faketensor")  # that of schemas cannot compare float8
    for tokens in (5, 0):
        index, tensors = problem(tokens, 2, 128, 128, 2)
        narrow = torch.randn(2, 3, 128, device=device, requires_grad=True)
        index, tensors = index.to(device), {key: x.to(device).requires_grad_() for key, x in tensors.items()}
        x, weights, up, down = tensors.values()
        given = (x, index, weights, up, down, None, None, narrow, "silu", True, None, 0.0, True)
        torch.library.opcheck(operators.experts_up, given, test_utils=checks)
        place, place_narrow, codes, scales, _, _, plain, a, b, c, d = (
            tensor.detach() for tensor in operators.experts_up(*given)
        )
        place, place_narrow = (tensor.clone().requires_grad_() for tensor in (place, place_narrow))
        given = (place, codes, scales, index, weights, down, [a, b, c, d])
        torch.library.opcheck(operators.experts_down, given, test_utils=checks)
        given = (place_narrow, plain, index, weights, down, narrow, [a, b, c, d])
        torch.library.opcheck(operators.experts_narrow, given, test_utils=checks)
        torch.library.opcheck(operators.linear, (x, down[0].detach().requires_grad_()), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [None, [2], [0, 4]], ids=["all", "one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_large_experts_are_near_float32(device, dtype, index):
    """Several tiles on every axis; each gradient by its relative error."""
    chosen = None if index is None else torch.tensor(index)[torch.randint(0, len(index), (3000, 1))].expand(-1, 2)
    index, tensors = problem(3000, 2, 640, 384, 5, index=chosen)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    expected = run(in_float64(SWIGLU), index, tensors, device)
    actual = run(by(operators.experts, SWIGLU), index, tensors, device, dtype)
    far = distances(actual, expected)
    assert all(0.01 < x < 0.09 for x in far.values()), far


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(3000, 640, 1152), (127, 2048, 576), (1, 576, 48)], ids=str)
def test_large_linear_layers_are_near_float32(device, size):
    T, K, N = size
    tensors, none = {"x": torch.randn(T, K), "weight": torch.randn(N, K)}, torch.empty(0)
    expected = run(lambda _, x, weight: x @ weight.T, none, tensors, device)
    actual = run(lambda _, x, weight: operators.linear(x, weight), none, tensors, device, torch.bfloat16)
    far = distances(actual, expected)
    assert all(0.01 < far[name] < 0.06 for name in ("output", "x")) and far["weight"] < 0.01, far
