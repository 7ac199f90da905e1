"""Strategies on one layer: what happens to which weights, against slow independent computations."""

import itertools

import pytest
import torch
from hf_moe.conversion.files.writer import Output
from hf_moe.conversion.upcycling import UPCYCLERS
from hf_moe.conversion.upcycling.clusters import balanced_assignment, balanced_clusters
from hf_moe.conversion.upcycling.layers import parse_layers
from hf_moe.conversion.upcycling.options import complete
from hf_moe.conversion.upcycling.router_init import ROUTER_INITS
from hf_moe.conversion.upcycling.strategy import FeedForward, Layer, Request, mean_and_std
from torch.nn.functional import gelu, linear, silu

D, WIDTH, T = 15, 72, 130  # 72 = 9 x 8
PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
ACTIVATIONS = {"silu": silu, "gelu": gelu}


class Texts:
    """Calibration inputs without a model."""

    def __init__(self, inputs: torch.Tensor):
        self._inputs = inputs

    def inputs(self, layer: int) -> torch.Tensor:
        return self._inputs


def network(gated: bool = True, bias: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"gate_proj.weight": (WIDTH, D), "up_proj.weight": (WIDTH, D), "down_proj.weight": (D, WIDTH)}
    if bias:
        shapes |= {"gate_proj.bias": (WIDTH,), "up_proj.bias": (WIDTH,), "down_proj.bias": (D,)}
    shapes = {name: shape for name, shape in shapes.items() if gated or not name.startswith("gate")}
    return {name: (torch.randn(shape) * 0.3 + 0.1).to(dtype) for name, shape in shapes.items()}


def strategy(
    name: str, tensors: dict, experts: int = 3, top_k: int = 2, act=silu, layer: int = 4, seed: int = 0, **options
):
    outputs = {part: Output(part, t.dtype, tuple(t.shape), lambda t=t: iter([t])) for part, t in tensors.items()}
    made, dtype = UPCYCLERS[name], tensors["down_proj.weight"].dtype
    request = Request(experts, top_k, WIDTH, dtype, 1, complete(made.options, options, name))
    evidence = Texts(torch.randn(T, D, generator=torch.Generator().manual_seed(5)))
    return made(request, Layer(layer, [FeedForward(outputs)], act, evidence, 0, D))


def experts_of(made, parts=PARTS) -> list[dict[str, torch.Tensor]]:
    pieces = list(made.experts(parts))
    return [dict(zip(parts, pieces[i : i + len(parts)], strict=True)) for i in range(0, len(pieces), len(parts))]


def feed_forward(ffn: dict, x: torch.Tensor, act) -> torch.Tensor:
    ffn = {name: tensor.double() for name, tensor in ffn.items()}
    up = linear(x, ffn["up_proj.weight"], ffn.get("up_proj.bias"))
    gate = linear(x, ffn["gate_proj.weight"], ffn.get("gate_proj.bias")) if "gate_proj.weight" in ffn else None
    hidden = act(up) if gate is None else act(gate) * up
    return linear(hidden, ffn["down_proj.weight"], ffn.get("down_proj.bias"))


def mixture(made, x: torch.Tensor, act, parts) -> torch.Tensor:
    """The layer token by token in float64: top-k of the router's logits, softmax over the chosen, shared experts."""
    sizes, name = made.sizes(made.request), made.router_init(made.request)
    start = ROUTER_INITS[name]
    rows = start.rows(made, complete(start.options, {"calibration": "text"}, name)).double()
    rows = rows.repeat_interleave(sizes.tied, dim=0)
    experts = experts_of(made, parts)
    assert len(experts) == sizes.num_experts
    assert all(expert["up_proj.weight"].shape == (sizes.moe_intermediate_size, D) for expert in experts)
    out = []
    for token in x:
        values, chosen = (rows @ token).topk(sizes.num_experts_per_tok)
        weights = values.softmax(dim=-1)
        out.append(
            sum(w * feed_forward(experts[e], token, act) for w, e in zip(weights, chosen.tolist(), strict=True))
        )
    if sizes.n_shared_experts:
        shared = {part: made.shared(part) for part in parts}
        width = sizes.n_shared_experts * (sizes.shared_expert_intermediate_size or sizes.moe_intermediate_size)
        assert shared["up_proj.weight"].shape == (width, D)
        out = [y + feed_forward(shared, token, act) for y, token in zip(out, x, strict=True)]
    return torch.stack(out)


EXACT = {
    "copy": {},
    **{f"granular-{pieces}": {"granularity": pieces} for pieces in (2, 4, 8)},
    "split": {"experts": 4, "top_k": 4},
    "split-calibrated": {"experts": 4, "top_k": 4, "calibration": "text"},
    "carve": {"experts": 7, "top_k": 7, "shared": 2, "calibration": "text"},
    "shared": {"shared": 1},
    "shared-2-granular": {"shared": 2, "granularity": 4},
    "shared-carved": {"shared": 3, "granularity": 8, "carved": True},
    "shared-carved-calibrated": {"shared": 2, "granularity": 9, "carved": True, "calibration": "text"},
}


@pytest.mark.parametrize("kind", ["gated", "gated-bias", "plain", "plain-bias"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("case", EXACT)
def test_exact_for_any_network(case, act, kind):
    tensors = network(gated="gated" in kind, bias="bias" in kind)
    made = strategy(case.split("-")[0], tensors, act=ACTIVATIONS[act], **EXACT[case])
    assert made.sizes(made.request).exact
    x = torch.randn(9, D, dtype=torch.float64)
    expected = feed_forward(tensors, x, ACTIVATIONS[act])
    found = mixture(made, x, ACTIVATIONS[act], tuple(tensors))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("granular", {"granularity": 4}, True),
        ("granular", {"granularity": 3}, False),
        ("shared", {"shared": 1}, True),
        ("shared", {"shared": 2}, False),
        ("shared", {"shared": 1, "granularity": 4, "carved": True}, False),
        ("split", {"experts": 4, "top_k": 4}, True),
        ("split", {"experts": 4, "top_k": 3}, False),
    ],
)
def test_claims_nothing_that_rounding_breaks(name, options, exact):
    """In bfloat16 a factor that is no power of two rounds the weights."""
    made = strategy(name, network(dtype=torch.bfloat16), **options)
    assert made.sizes(made.request).exact == exact


def test_noise_has_the_size_that_was_asked_for():
    tensors = network(bias=True)
    first, second, third = experts_of(strategy("noise", tensors, noise_scale=0.25), tuple(tensors))
    for part, dense in tensors.items():
        noise = torch.stack([expert[part] - dense for expert in (first, second, third)]).flatten()
        assert noise.std().item() == pytest.approx(0.25 * dense.std(correction=0).item(), rel=4 / len(noise) ** 0.5)
        assert not torch.equal(first[part], second[part])
    again = experts_of(strategy("noise", tensors, noise_scale=0.25), ("down_proj.weight",))
    assert torch.equal(again[1]["down_proj.weight"], second["down_proj.weight"]), "depends on what else is written"
    elsewhere = experts_of(strategy("noise", tensors, noise_scale=0.25, layer=5), PARTS)
    assert not torch.equal(elsewhere[0]["up_proj.weight"], first["up_proj.weight"])


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_draws_the_same_neurons_anew_in_every_projection(ratio):
    tensors = {name: tensor + (3 if "gate" in name else 0) for name, tensor in network(bias=True).items()}
    sets = []
    for expert in experts_of(strategy("drop", tensors, drop_ratio=ratio), tuple(tensors)):
        changed = {part: expert[part] != tensors[part] for part in tensors}
        dropped = changed["gate_proj.bias"]
        assert dropped.sum() == round(ratio * WIDTH)
        assert torch.equal(changed["up_proj.bias"], dropped)
        for part in ("gate_proj.weight", "up_proj.weight"):
            assert torch.equal(changed[part], dropped[:, None].expand(WIDTH, D))
        assert torch.equal(changed["down_proj.weight"], dropped[None].expand(D, WIDTH))
        assert not changed["down_proj.bias"].any()
        for part, rows in (("gate_proj.weight", expert["gate_proj.weight"][dropped]),):
            replaced = tensors[part][dropped]
            error = 5 * replaced.std().item() / replaced.numel() ** 0.5
            assert rows.mean().item() == pytest.approx(replaced.mean().item(), abs=error)
            assert rows.std().item() == pytest.approx(replaced.std().item(), abs=error)
        sets.append(tuple(dropped.tolist()))
    assert len(set(sets)) == (1 if ratio == 1 else 3)


@pytest.mark.parametrize("name", ["split", "split-calibrated", "carve", "shared-carved-calibrated"])
def test_each_neuron_is_kept_once(name):
    tensors = network()
    tensors["down_proj.weight"] = torch.arange(D * WIDTH).view(D, WIDTH).float()  # a column names its neuron
    made = strategy(name.split("-")[0], tensors, **EXACT[name])
    sizes = made.sizes(made.request)
    scale = sizes.tied if "shared" in name else sizes.num_experts_per_tok
    experts = experts_of(made)[: sizes.tied if "shared" in name else None]
    downs = [expert["down_proj.weight"][0] / scale for expert in experts]
    if sizes.n_shared_experts:
        downs.append(made.shared("down_proj.weight")[0])
    assert torch.cat(downs).sort().values.tolist() == list(range(WIDTH))
    for expert in experts:
        neurons = (expert["down_proj.weight"][0] / scale).long()
        assert torch.equal(expert["up_proj.weight"], tensors["up_proj.weight"][neurons])
        assert torch.equal(expert["gate_proj.weight"], tensors["gate_proj.weight"][neurons])


def test_balanced_assignment_is_stable_and_full():
    scores = torch.randn(21, 3)
    group = balanced_assignment(scores, 7)
    assert torch.bincount(group).tolist() == [7, 7, 7]
    for row, other in itertools.product(range(21), range(3)):
        if scores[row, other] > scores[row, group[row]]:  # it would rather be there: all who are score higher
            assert scores[group == other, other].min() > scores[row, other]


def test_clusters_find_the_neurons_that_work_together():
    planted = torch.randperm(24) % 4
    features = torch.nn.functional.one_hot(planted, 4).float() @ torch.rand(4, 50) + 0.05 * torch.rand(24, 50)
    found = balanced_clusters(features, 4, torch.Generator().manual_seed(1))
    assert found.shape == (4, 6)
    assert all(len(planted[neurons].unique()) == 1 for neurons in found)


def test_centroid_router_sends_tokens_to_the_expert_that_works_on_them():
    """Neurons of four kinds, each answering to one direction; tokens along these directions find their neurons."""
    directions = torch.linalg.qr(torch.randn(D, D)).Q[:4]
    kind = torch.randperm(WIDTH) % 4
    tensors = {"up_proj.weight": directions[kind] * 3, "down_proj.weight": torch.randn(D, WIDTH)}
    made = strategy("split", tensors, experts=4, top_k=1, act=torch.relu, calibration="text")
    tokens = directions[torch.arange(T) % 4] + 0.05 * torch.randn(T, D)
    made.layer.evidence._inputs = tokens
    start = ROUTER_INITS["centroids"]
    chosen = (tokens @ start.rows(made, {"router_std": 0.02}).T).argmax(dim=-1)
    kinds = torch.stack([kind[neurons].mode().values for neurons in made.neurons])
    assert torch.equal(kinds[chosen], torch.arange(T) % 4)


def test_mean_and_std_in_pieces(monkeypatch):
    monkeypatch.setattr("hf_moe.conversion.upcycling.strategy.CHUNK", 40)
    for tensor in (torch.randn(23, 17) + 3, torch.randn(101)):
        mean, std = mean_and_std(tensor)
        assert mean == pytest.approx(tensor.mean().item(), rel=1e-5)
        assert std == pytest.approx(tensor.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("spec", "expected"),
    {
        "all": "ccccccc",
        "all/3": "c--c--c",
        "1-5/2": "-c-c-c-",
        "0, 2-3 ,6": "c-cc--c",
        "0-1=drop,4": "dd--c--",
        "all/2=noise,1": "ncn-n-n",
    }.items(),
)
def test_layers(spec, expected):
    found = parse_layers(spec, range(7), "copy")
    assert "".join(found[layer][0] if layer in found else "-" for layer in range(7)) == expected


def test_layers_without_a_network_are_passed_over():
    assert list(parse_layers("all/2", [1, 3, 4, 7], "copy")) == [1, 4]
    assert list(parse_layers("0-4", [1, 3, 4, 7], "copy")) == [1, 3, 4]
    with pytest.raises(ValueError, match="2 has no dense feed-forward network; these layers have one: 1, 3, 4, 7"):
        parse_layers("2", [1, 3, 4, 7], "copy")


@pytest.mark.parametrize("spec", ["", "1..2", "all/0", "a", "2-5/", "1=", "7", "5-2", "3,3", "all,2"])
def test_refuses_layers(spec):
    with pytest.raises(ValueError, match="layers") as raised:
        parse_layers(spec, range(7), "copy")
    assert "\n" not in str(raised.value)
