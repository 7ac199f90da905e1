"""The experts operator against float32 PyTorch: output and every gradient."""

import pytest
import torch

from hf_moe.kernels import operators
from hf_moe.kernels.formula import Formula
from hf_moe.kernels.operators import NAMES
from hf_moe.kernels.operators import experts as operator

from . import reference

SWIGLU = Formula("silu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(device, T, K, D, inner, E, *, index=None, bias=False, formula=SWIGLU, dtype=torch.float32):
    """Inputs of the operator; an index of E is "no expert"."""
    U = 2 * inner if formula.gated else inner
    shapes = {"x": (T, D), "weights": (T, K), "up": (E, U, D), "down": (E, D, inner)}
    if formula.transposed:
        shapes |= {"up": (E, D, U), "down": (E, inner, D)}
    if bias:
        shapes |= {"up_bias": (E, U), "down_bias": (E, D)}
    scale = {"up": D**-0.5, "down": inner**-0.5}
    tensors = {name: (torch.randn(shape) * scale.get(name, 1)).to(device, dtype) for name, shape in shapes.items()}
    if index is None:
        index = torch.rand(T, E).argsort(-1)[:, :K] if K <= E else torch.randint(0, E, (T, K))
    return tensors | {"index": index.to(device)}


def run(function, inputs, *options, dtype=None):
    """Output and gradients by name, for one random direction."""
    leaves = {
        name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in inputs.items()
        if name != "index"
    }
    arguments = [leaves.get(name) for name in NAMES]
    output = function(arguments[0], inputs["index"], *arguments[1:], *options)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device, output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), direction)
    return {"output": output} | dict(zip(leaves, gradients, strict=True))


def compare(inputs, formula=SWIGLU):
    dtype = inputs["x"].dtype
    actual = run(operator, inputs, *formula, True)
    expected = run(reference.experts, inputs, *formula, dtype=torch.float32)
    for name, value in expected.items():
        assert actual[name].dtype == inputs.get(name, inputs["x"]).dtype, name
        error = (actual[name].float() - value).norm() / value.norm().clamp(min=1e-6)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"
    return actual


SHAPES = {  # T, K, D, I, E
    "odd": (13, 3, 35, 37, 3),
    "aligned": (12, 2, 64, 32, 2),
    "one-token": (1, 2, 33, 17, 5),
    "one-expert": (21, 1, 24, 16, 1),
    "every-expert": (5, 4, 20, 12, 4),
    "many-experts": (6, 2, 16, 16, 19),
}
INDICES = {  # of 9 tokens, 2 choices, 4 experts
    "all-on-one": lambda: torch.full((9, 2), 2),
    "empty-experts": lambda: torch.randint(1, 3, (9, 2)),
    "some-elsewhere": lambda: torch.randint(0, 5, (9, 2)),
    "all-elsewhere": lambda: torch.full((9, 2), 4),
    "last-alone": lambda: torch.tensor([[4, 4]] * 8 + [[4, 3]]),
}
FORMULAS = {  # and whether the products have a bias
    "gated": (Formula("silu"), False),
    "gated-bias": (Formula("silu"), True),
    "gated-transposed": (Formula("silu", transposed=True), False),
    "plain": (Formula("silu", gated=False), False),
    "plain-bias-transposed": (Formula("silu", gated=False, transposed=True), True),
    "limit": (Formula("silu", limit=0.5), False),
    "limit-shift-bias": (Formula("quick_gelu", limit=0.5, shift=1.0), True),
    "shift": (Formula("silu", shift=1.0), False),
    "interleaved-bias": (Formula("silu", interleaved=True), True),
    "interleaved-transposed": (Formula("gelu", interleaved=True, transposed=True), False),
    "gpt-oss": (Formula("quick_gelu", True, True, True, 0.5, 1.0), True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device, shape):
    compare(problem(device, *SHAPES[shape]))


@pytest.mark.parametrize("index", INDICES)
def test_indices(device, index):
    compare(problem(device, 9, 2, 20, 12, 4, index=INDICES[index](), bias=index == "some-elsewhere"))


@pytest.mark.parametrize("size", [17, 24], ids=["odd", "aligned"])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(device, name, size):
    formula, bias = FORMULAS[name]
    compare(problem(device, 9, 2, size, size + 4, 2, formula=formula, bias=bias), formula)


def test_a_clamp_keeps_nan(device):
    """What is not a number stays one, so that training sees it."""
    inputs = problem(device, 3, 1, 16, 16, 2)
    inputs["x"][1] = torch.nan
    leaves = [inputs.get(name) for name in NAMES]
    output = operator(leaves[0], inputs["index"], *leaves[1:], *Formula("silu", limit=0.5), False)
    assert output.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(device, activation):
    compare(problem(device, 4, 1, 16, 16, 1), Formula(activation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [33, 40], ids=["odd", "aligned"])
def test_sixteen_bits(device, dtype, size):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot multiply matrices of bfloat16")
    inputs = problem(device, 9, 2, size, size, 2, dtype=dtype)
    compare(inputs | {"weights": inputs["weights"].float().softmax(-1)})


def test_no_tokens(device):
    compare(problem(device, 0, 2, 16, 16, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [320, 333], ids=["aligned", "odd"])
@pytest.mark.parametrize("tokens", [40, 150, 3000])
def test_tiles_of_every_size(device, tokens, size, dtype):
    """Mean rows an expert of 16 to 1200: each tile that row_tile chooses, several on every axis."""
    compare(problem(device, tokens, 2, size, size - 64, 5, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("index", [[2], [1, 4], [0, 5]], ids=str)
def test_experts_without_rows_beside_large_tiles(device, index):
    index = torch.tensor(index)[torch.randint(0, len(index), (3000, 1))]
    compare(problem(device, 3000, 1, 320, 256, 6, index=index, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_tiles_of_a_smaller_card(device, dtype, monkeypatch):
    monkeypatch.setattr("hf_moe.kernels.tiles.shared_memory", lambda device: 99 * 1024)
    compare(problem(device, 3000, 2, 320, 256, 5, dtype=dtype))


def test_operators_say_the_shapes_they_return(device):
    """Their fakes, their schemas and their gradients under AOT dispatch, with sizes as symbols."""
    inputs = problem(device, 5, 2, 12, 8, 2)
    x, weights, up, down = (inputs[name].requires_grad_() for name in ("x", "weights", "up", "down"))
    narrow = torch.randn(2, 3, 8, device=device, requires_grad=True)
    given = (x, inputs["index"], weights, up, down, None, None, None, None, narrow, *SWIGLU, True)
    # Not what AOT dispatch returns: rows of filling hold anything. The layer compiles in test_interface.py.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.experts_up, given, test_utils=checks)
    place, place_narrow, activated, _, *routing = (tensor.detach() for tensor in operators.experts_up(*given))
    shared = (activated, inputs["index"], weights, down)
    place, place_narrow = (tensor.clone().requires_grad_() for tensor in (place, place_narrow))
    torch.library.opcheck(operators.experts_narrow, (place_narrow, *shared, narrow, routing, False))
    torch.library.opcheck(operators.experts_down, (place, *shared, None, routing, False))
