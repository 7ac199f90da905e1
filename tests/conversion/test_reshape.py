"""Mixtures in another shape: experts pruned, grown and exchanged, beside what slow loops over the weights give."""

import itertools
import json
import shutil
import subprocess
import sys
from operator import truediv

import psutil
import pytest
import torch
from hf_moe.conversion import import_checkpoint
from hf_moe.conversion.reshape import exchange_experts, grow, prune
from hf_moe.conversion.reshape.model import open_mixture
from hf_moe.conversion.reshape.prune import best
from hf_moe.conversion.reshape.scores import SCORES, Seen, memory, windows_of
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.demo import DEMO_MODEL
from hf_moe.routers import captured, find_routers
from tests.conversion.conftest import DEEPSEEK_V3, GPT_OSS, LLAMA4, MOE, QWEN_MOE, SIZES, build

TEXT = "Once upon a time there was a dog named Ben. He ran to the river and was glad. The end.\n" * 12
V3 = {**DEEPSEEK_V3, "n_group": 1, "topk_group": 1, "n_routed_experts": 6}
CASES = {
    "olmoe": ("olmoe", {**MOE, "num_experts": 6}),
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE, "num_experts": 6, "head_dim": 10}),
    "deepseek_v3": ("deepseek_v3", V3),
    "gpt_oss": ("gpt_oss", {**GPT_OSS, "num_local_experts": 6}),
}
OURS = {"router_type": "softmax_topk", "router_args": {"selection_bias": True}, "n_shared_experts": 1}
QUIET = {"progress": False}


def ours(**changes) -> HfMoeForCausalLM:
    torch.manual_seed(3)
    fields = {**SIZES, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "vocab_size": 512}
    fields |= {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    model = HfMoeForCausalLM(HfMoeConfig(**{**fields, **OURS, **changes})).eval()
    for layer in model.model.layers[1:]:
        if layer.mlp.gate.e_score_correction_bias is not None:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    return model


def save(model, folder, dtype=None):
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["hf_moe", *CASES])
def source(request, tmp_path_factory):
    """A family's name and the folder of a tiny mixture of 6 experts, 3 a token."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "hf_moe":
        return request.param, save(ours(), folder)
    model_type, fields = CASES[request.param]
    return request.param, save(build(model_type, **{**fields, "vocab_size": 512}), folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def ids_of(folder) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[:, :60]


def by_hand(model, ids: torch.Tensor, experts: int = 6) -> dict[str, tuple]:
    """What each expert did with the text, token by token: every layer's experts called one at a time."""
    found, inputs = {}, {}
    routers = find_routers(model)
    for name, router in routers.items():
        router.layer.experts.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: inputs.update({name: (*args, *kwargs.values())}), with_kwargs=True
        )
    with torch.no_grad():
        model(ids)
        for name, router in routers.items():
            hidden, index, weights = inputs[name]
            tokens, norms, weighted = ([0] * experts for _ in range(3))
            for token in range(len(hidden)):
                for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                    one = torch.tensor([[expert]])
                    answer = router.layer.experts.forward(hidden[token : token + 1], one, torch.ones(1, 1))
                    tokens[expert] += 1
                    norms[expert] += answer.norm().item()
                    weighted[expert] += weight * answer.norm().item()
            found[f"model.layers.{name.split('.layers.')[1].split('.')[0]}"] = tokens, norms, weighted
    return found


def worth(by: str, tokens, norms, weighted) -> list[float]:
    if by == "frequency":
        return [float(x) for x in tokens]
    sums = weighted if by == "reap" else norms
    return [total / count if count else 0.0 for total, count in zip(sums, tokens, strict=True)]


@pytest.mark.parametrize("by", ["reap", "frequency", "output"])
def test_pruned_are_the_experts_that_are_worth_least(source, text, by, tmp_path):
    folder = source[1]
    report = prune(folder, tmp_path / "out", experts=4, by=by, calibration=text, calibration_tokens=60, **QUIET)
    model, pruned = load(folder), load(tmp_path / "out")
    assert type(pruned) is type(model) and pruned.config.model_type == model.config.model_type
    for layer, seen in by_hand(model, ids_of(folder)).items():
        scores = worth(by, *seen)
        assert report["scores"][layer] == pytest.approx(scores, rel=1e-4, abs=1e-6)
        ranked = sorted(range(6), key=lambda expert: (-scores[expert], expert))
        assert report["kept"][layer] == [[expert] for expert in sorted(ranked[:4])]
        assert report["load"]["before"][layer] == seen[0]
    # The result is the model whose routers cannot choose the others, with its weights where they were.
    close_experts(model, {layer: [x for (x,) in kept] for layer, kept in report["kept"].items()})
    ids = ids_of(folder)
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert_rest_is_bitwise(folder, tmp_path / "out")
    after = {layer: tokens for layer, (tokens, *_) in by_hand(pruned, ids, 4).items()}
    assert report["load"]["after"] == after
    card = (tmp_path / "out" / "README.md").read_text()
    for layer, kept in report["kept"].items():
        busy = [max(x) * len(x) / sum(x) for x in (report["load"]["before"][layer], after[layer])]
        numbers = " ".join(str(x) for (x,) in kept)
        assert f"| {layer.split('.')[-1]} | {numbers} | {busy[0]:.3g} | {busy[1]:.3g} |" in card
        scores = report["scores"][layer]
        ranked = sorted(range(6), key=lambda expert: (-scores[expert], expert))
        each = (f"**{x}**: {scores[x]:.4g}" if [x] in kept else f"{x}: {scores[x]:.4g}" for x in ranked)
        assert f"| {layer.split('.')[-1]} | {', '.join(each)} |" in card
    assert f"<summary>What each was worth, by {by}</summary>" in card
    assert "](figures/expert_load.png)" in card and (tmp_path / "out" / "figures/expert_load.png").exists()
    assert "no origin" not in card and "fewer experts" in card


@pytest.mark.parametrize("router_type", ["top_p", "expert_threshold", "relu", "null_experts"])
def test_what_a_router_adds_is_an_experts_or_stays_whole(router_type, text, tmp_path):
    folder = save(ours(router_type=router_type, router_args={}), tmp_path / "model")
    report = prune(folder, tmp_path / "out", experts=4, calibration=text, calibration_tokens=60, **QUIET)
    source, pruned = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for layer, kept in report["kept"].items():
        rows = [expert for (expert,) in kept]
        gate = {name: x for name, x in source.items() if name.startswith(f"{layer}.mlp.gate.")}
        assert gate.keys() == {name for name in pruned if name.startswith(f"{layer}.mlp.gate.")}
        for name, tensor in gate.items():
            whole = name.rpartition(".")[2] in ("l1_coef", "null_weight", "null_bias")
            assert torch.equal(pruned[name], tensor if whole else tensor[rows]), name
    assert torch.isfinite(load(tmp_path / "out")(ids_of(folder)).logits).all()


def test_merged_are_the_weights_of_near_experts(source, text, tmp_path):
    folder = source[1]
    report = prune(
        folder, tmp_path / "out", experts=4, merge=True, calibration=text, calibration_tokens=60, verify=False, **QUIET
    )
    model, result = load(folder), load(tmp_path / "out")
    logits = {}
    for name, router in find_routers(model).items():
        router.module.register_forward_hook(
            lambda module, args, out, name=name, router=router: logits.update({name: router.logits_of(out)})
        )
    seen = by_hand(model, ids_of(folder))
    for (name, before), after in zip(find_routers(model).items(), find_routers(result).values(), strict=True):
        layer = f"model.layers.{name.split('.layers.')[1].split('.')[0]}"
        scores = worth("reap", *seen[layer])
        leads = sorted(sorted(range(6), key=lambda expert: (-scores[expert], expert))[:4])
        made = {lead: [lead] for lead in leads}
        for expert in range(6):
            if expert not in leads:
                own = logits[name][:, expert]
                near = {lead: torch.cosine_similarity(own, logits[name][:, lead], dim=0).item() for lead in leads}
                made[max(near, key=near.get)].append(expert)
        assert report["kept"][layer] == [made[lead] for lead in leads]
        old, new = (dict(x.layer.experts.named_parameters()) for x in (before, after))
        for number, members in enumerate(made.values()):
            total = sum(scores[expert] for expert in members)
            row = sum(scores[expert] / total * before.module.weight[expert] for expert in members)
            torch.testing.assert_close(after.module.weight[number], row, rtol=1e-4, atol=1e-5)
            if len(members) == 1:
                assert all(torch.equal(new[key][number], old[key][members[0]]) for key in old)
            # An average of matched neurons: of each tensor the sum over all of them does not depend on the match.
            for key in old:
                expected = sum(scores[expert] / total * old[key][expert] for expert in members)
                torch.testing.assert_close(new[key][number].sum(), expected.sum(), rtol=1e-3, atol=1e-3)
    assert_rest_is_bitwise(folder, tmp_path / "out")


def test_experts_that_differ_in_the_order_of_neurons_merge_into_themselves(source, text, tmp_path):
    folder = source[1]
    model = load(folder)
    order = torch.randperm(20 if source[0] != "olmoe" and source[0] != "gpt_oss" else 36)
    with torch.no_grad():
        for router in find_routers(model).values():
            experts = router.layer.experts
            stacked = model.config.model_type == "gpt_oss"  # transposed, gate and up rows alternate
            for expert in (1, 2, 3, 4, 5):
                for key, x in experts.named_parameters():
                    one = x[0]
                    if stacked and key.startswith("gate_up"):
                        pairs = one.unflatten(-1, (-1, 2))
                        moved = pairs[..., order, :].flatten(-2)
                    elif stacked:
                        moved = one if key.endswith("bias") else one[order]
                    elif key == "down_proj":
                        moved = one[:, order]
                    else:
                        moved = torch.cat([half[order] for half in one.chunk(2)])
                    x[expert] = moved
    save(model, tmp_path / "same")
    prune(tmp_path / "same", tmp_path / "out", experts=3, merge=True, calibration=text, verify=False, **QUIET)
    merged = load(tmp_path / "out")
    reference = load(tmp_path / "same")
    x = torch.randn(7, 24)
    for before, after in zip(find_routers(reference).values(), find_routers(merged).values(), strict=True):
        for expert in range(3):
            index, one = torch.full((7, 1), expert), torch.ones(7, 1)
            with torch.no_grad():
                expected = before.layer.experts.forward(x, torch.zeros_like(index), one)
                torch.testing.assert_close(after.layer.experts.forward(x, index, one), expected, rtol=1e-4, atol=1e-4)


def close_experts(model, kept) -> None:
    """Let the routers choose among `kept` alone."""
    for name, router in find_routers(model).items():
        number = name.split(".layers.")[1].split(".")[0]
        closed = [e for e in range(6) if e not in kept[f"model.layers.{number}"]]
        gate = router.module
        if hasattr(gate, "assigned"):  # hf_moe's
            gate.e_score_correction_bias.data[closed] = -1e30
            logits = gate.logits
            gate.logits = lambda state, logits=logits, closed=closed: logits(state).index_fill(
                -1, torch.tensor(closed), -1e30
            )
        elif model.config.model_type == "deepseek_v3":
            gate.e_score_correction_bias.data[closed] = -1e30
        elif getattr(gate, "bias", None) is not None:
            gate.bias.data[closed] = -1e30
        else:
            linear = torch.nn.functional.linear

            def forward(hidden, gate=gate, closed=closed, linear=linear):
                logits = linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight).index_fill(
                    -1, torch.tensor(closed), -1e30
                )
                weights, index = logits.float().softmax(-1).topk(gate.top_k, dim=-1)
                if gate.norm_topk_prob:
                    weights = weights / weights.sum(-1, keepdim=True)
                return logits, weights, index

            gate.forward = forward


def assert_rest_is_bitwise(before, after) -> None:
    """What has no experts is as it was, and there is as much of it."""

    def rest(folder):
        state = {}
        for path in sorted(folder.glob("*.safetensors")):
            state |= load_file(path)
        return {k: x for k, x in state.items() if ".experts." not in k and ".gate." not in k and ".router." not in k}

    old, new = rest(before), rest(after)
    assert old.keys() == new.keys() and old
    assert all(torch.equal(x, new[name]) for name, x in old.items())


def test_the_family_of_the_result_is_the_sources(source, text, tmp_path):
    folder = source[1]
    prune(folder, tmp_path / "out", ratio=0.5, by="random", seed=2, verify=False, **QUIET)
    before, after = (json.loads((x / "config.json").read_text()) for x in (folder, tmp_path / "out"))
    count = next(x for x in ("num_local_experts", "n_routed_experts", "num_experts") if x in before)
    assert before[count] == 6 and after[count] == 3
    same = before.keys() - {count, "transformers_version", "provenance", "router_aux_loss_coef", "num_local_experts"}
    assert {key: after.get(key) for key in same} == {key: before[key] for key in same}
    names = [set(safe_open(x / "model.safetensors", "pt").keys()) for x in (folder, tmp_path / "out")]
    assert names[1] <= names[0]


def test_grown_with_as_many_more_experts_a_token_it_computes_the_same(source, tmp_path):
    folder = source[1]
    report = grow(folder, tmp_path / "out", experts=12, top_k=6, **QUIET)
    assert report["equal_at_step_0"] and report["max_abs_diff"] < 1e-4
    assert "| `noise` | `3e-07` |" in (tmp_path / "out" / "README.md").read_text()
    model, grown, ids = load(folder), load(tmp_path / "out"), ids_of(folder)
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with captured(find_routers(grown), 6) as routings, torch.no_grad():
        grown(ids)
    for routing in routings.values():  # all copies of three experts
        assert all(len({e // 2 for e in row}) == 3 for row in routing.index_SK.tolist())
    assert_rest_is_bitwise(folder, tmp_path / "out")


def test_grown_with_as_many_experts_a_token_it_computes_the_same(source, tmp_path):
    name, folder = source
    if name not in ("hf_moe", "deepseek_v3"):
        with pytest.raises(ValueError, match=rf"{name} cannot hold the result's .*: hf-moe import the model first"):
            grow(folder, tmp_path / "out", experts=18, **QUIET)
        assert not list(tmp_path.iterdir())
        return
    report = grow(folder, tmp_path / "out", experts=18, **QUIET)
    assert report["top_k"] == 3 and report["max_abs_diff"] < 1e-4
    model, grown, ids = load(folder), load(tmp_path / "out"), ids_of(folder)
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with captured(find_routers(grown), 3) as routings, torch.no_grad():
        grown(ids)
    groups = [{e // 6 for e in row} for routing in routings.values() for row in routing.index_SK.tolist()]
    assert all(len(x) == 1 for x in groups)
    assert len(set.union(*groups)) > 1  # tokens go to several groups, so that copies will differ


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_imported_it_grows_with_as_many_experts_a_token(family, tmp_path):
    model_type, fields = CASES[family]
    folder = save(build(model_type, **{**fields, "vocab_size": 512}), tmp_path / "model")
    import_checkpoint(folder, tmp_path / "imported", verify=False, **QUIET)
    report = grow(tmp_path / "imported", tmp_path / "out", experts=18, verify=False, **QUIET)
    assert report["top_k"] == 3 and report["equal_at_step_0"]
    model, grown, ids = load(folder), load(tmp_path / "out"), ids_of(folder)
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def alone(family: str):
    """A mixture that sends a token to one expert, of a weight that no other moves."""
    one = {"num_experts_per_tok": 1, "vocab_size": 512}
    if family == "hf_moe":
        return ours(router_type="sigmoid_topk", **one)
    model_type, fields = CASES[family]
    return build(model_type, **{**fields, **one, **({"norm_topk_prob": True} if "gpt" not in family else {})})


def copies_by_load(tokens: list[int], experts: int) -> list[int]:
    """Of all ways to share out the copies the one whose busiest copy has the fewest tokens, by trying them."""
    ways = itertools.product(range(1, experts - len(tokens) + 2), repeat=len(tokens))
    busiest = {way: max(map(truediv, tokens, way)) for way in ways if sum(way) == experts}
    return min(busiest.values())


@pytest.mark.parametrize("family", ["hf_moe", *CASES])
def test_the_busiest_experts_of_single_choice_get_the_most_copies(family, text, tmp_path):
    folder = save(alone(family), tmp_path / "model")
    report = grow(folder, tmp_path / "out", experts=9, calibration=text, calibration_tokens=60, **QUIET)
    assert report["equal_at_step_0"] and report["max_abs_diff"] < 1e-4 and report["top_k"] == 1
    model, grown, ids = load(folder), load(tmp_path / "out"), ids_of(folder)
    assert type(grown) is type(model)
    seen = by_hand(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for (name, before), after in zip(find_routers(model).items(), find_routers(grown).values(), strict=True):
        layer = f"model.layers.{name.split('.layers.')[1].split('.')[0]}"
        copies = report["copies"][layer]
        assert set(copies) == set(range(6)) and copies == sorted(copies) and len(copies) == 9
        tokens = seen[layer][0]
        assert max(tokens[e] / copies.count(e) for e in range(6)) == copies_by_load(tokens, 9)
        old, new = (dict(x.layer.experts.named_parameters()) for x in (before, after))
        assert all(torch.equal(new[key], x[copies]) for key, x in old.items())
        torch.testing.assert_close(after.module.weight, before.module.weight[copies], rtol=1e-4, atol=1e-6)
    with captured(find_routers(model), 1) as then, captured(find_routers(grown), 1) as now, torch.no_grad():
        model(ids), grown(ids)
    parted = []
    for copies, old, new in zip(report["copies"].values(), then.values(), now.values(), strict=True):
        old, new = (routing.index_SK.flatten().tolist() for routing in (old, new))
        assert [copies[expert] for expert in new] == old
        parted.append(len(set(new)) > len(set(old)))
    assert any(parted)  # tokens of one expert go to several copies, so that these will differ


def test_llama_4_grows_by_load(text, tmp_path):
    """Whose experts scale what they read, and are called for all tokens: only the router says who is busy."""
    fields = LLAMA4 | {"num_local_experts": 5, "num_experts_per_tok": 1, "vocab_size": 512}
    folder = save(build("llama4_text", **fields), tmp_path / "model")
    report = grow(folder, tmp_path / "out", experts=8, calibration=text, calibration_tokens=60, **QUIET)
    model, grown, ids = load(folder), load(tmp_path / "out"), ids_of(folder)
    with captured(find_routers(model), 1) as routings, torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert type(grown) is type(model)
    for copies, routing in zip(report["copies"].values(), routings.values(), strict=True):
        tokens = [routing.index_SK.flatten().tolist().count(expert) for expert in range(5)]
        assert len(copies) == 8
        assert max(tokens[e] / copies.count(e) for e in range(5)) == copies_by_load(tokens, 8)


def test_copies_of_a_single_choice_need_no_groups(tmp_path):
    folder = save(alone("olmoe"), tmp_path / "model")
    assert grow(folder, tmp_path / "out", experts=12, **QUIET)["max_abs_diff"] < 1e-4
    with pytest.raises(
        ValueError, match="experts is 9, no multiple of 6: give a text that says which are the busiest"
    ):
        grow(folder, tmp_path / "none", experts=9, **QUIET)


@pytest.mark.parametrize(
    "changes",
    [
        {"router_type": "softmax_topk", "norm_topk_prob": False},
        {"router_type": "softmax_topk", "norm_topk_prob": True, "router_args": {"selection_bias": True}},
        {"router_type": "sigmoid_topk", "n_group": 3, "topk_group": 1},
        {"router_type": "sigmoid_topk", "router_args": {"eval_capacity_factor": 1.0}},
    ],
    ids=["softmax", "bias", "groups", "capacity"],
)
def test_a_single_choice_that_other_experts_move_keeps_its_numbers(changes, text, tmp_path):
    folder = save(ours(num_experts_per_tok=1, **{"router_args": {}, **changes}), tmp_path / "model")
    with pytest.raises(ValueError, match="experts is 9; it must be a multiple of 6"):
        grow(folder, tmp_path / "out", experts=9, calibration=text, **QUIET)
    assert not (tmp_path / "out").exists()


def test_noise_that_bfloat16_shows_is_reported(tmp_path):
    folder = save(ours(), tmp_path / "model", torch.bfloat16)
    report = grow(folder, tmp_path / "out", experts=12, top_k=6, **QUIET)
    assert not report["equal_at_step_0"] and report["max_abs_diff"] > 1e-4
    grown = load(tmp_path / "out").model.layers[1].mlp.gate.weight
    assert not any(torch.equal(grown[2 * e], grown[2 * e + 1]) for e in range(6))
    report = grow(folder, tmp_path / "still", experts=12, top_k=6, noise=0.0, **QUIET)
    assert report["equal_at_step_0"] and report["max_abs_diff"] < 1e-4


def test_an_expert_added_and_taken_away_leaves_the_bytes(source, tmp_path):
    folder = source[1]
    exchange_experts(folder, tmp_path / "more", add=[f"{folder}:2"], verify=False, **QUIET)
    exchange_experts(tmp_path / "more", tmp_path / "back", remove=[6], verify=False, **QUIET)
    exchange_experts(folder, tmp_path / "same", swap=[(1, folder)], verify=False, **QUIET)
    for other in ("back", "same"):
        for path in folder.glob("*.safetensors"):
            old, new = load_file(path), load_file(tmp_path / other / path.name)
            assert old.keys() == new.keys()
            assert all(torch.equal(x, new[key]) and x.dtype == new[key].dtype for key, x in old.items())
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
    model, more, ids = load(folder), load(tmp_path / "more"), ids_of(folder)
    for (_, a), (_, b) in zip(find_routers(model).items(), find_routers(more).items(), strict=True):
        assert torch.equal(b.module.weight[:6], a.module.weight) and torch.equal(
            b.module.weight[6], a.module.weight[2]
        )
        for key, x in a.layer.experts.named_parameters():
            y = dict(b.layer.experts.named_parameters())[key]
            assert torch.equal(y[:6], x) and torch.equal(y[6], x[2])
    assert more(ids).logits.isfinite().all()


def test_a_sibling_gives_its_expert(source, tmp_path):
    folder = source[1]
    other = load(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    save(other, tmp_path / "sibling")
    exchange_experts(folder, tmp_path / "out", swap=[(4, tmp_path / "sibling")], verify=False, **QUIET)
    a, b, c = load(folder), load(tmp_path / "sibling"), load(tmp_path / "out")
    for ours, theirs, new in zip(*(find_routers(x).values() for x in (a, b, c)), strict=True):
        for key, x in new.layer.experts.named_parameters():
            mine, its = (dict(y.layer.experts.named_parameters())[key] for y in (ours, theirs))
            expected = torch.stack([its[e] if e == 4 else mine[e] for e in range(6)])
            assert torch.equal(x, expected), key
        assert torch.equal(new.module.weight[4], theirs.module.weight[4])
        assert torch.equal(new.module.weight[3], ours.module.weight[3])
    assert_rest_is_bitwise(folder, tmp_path / "out")


def test_a_sibling_with_another_tokenizer_is_none(tmp_path):
    folder, sibling = save(ours(), tmp_path / "model"), save(ours(), tmp_path / "sibling")
    said = json.loads((sibling / "tokenizer.json").read_text())
    (a, first), (b, second) = list(said["model"]["vocab"].items())[-2:]
    said["model"]["vocab"] |= {a: second, b: first}
    (sibling / "tokenizer.json").write_text(json.dumps(said))
    for how in ({"add": [sibling]}, {"swap": [(1, sibling)]}):
        with pytest.raises(ValueError, match="an expert of one knows nothing of the other's") as error:
            exchange_experts(folder, tmp_path / "out", **how, **QUIET)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_are_refused(tmp_path, text):
    folder = save(ours(n_group=3, topk_group=2, num_experts_per_tok=2), tmp_path / "model")
    for function, arguments, said in (
        (prune, {"experts": 4, "calibration": text}, "4 experts cannot be kept alike in 3 groups"),
        (prune, {"ratio": 0.3, "calibration": text}, "4 experts cannot be kept alike in 3 groups"),
        (exchange_experts, {"add": [folder]}, r"num_experts \(7\) must be a multiple of n_group \(3\)"),
        (exchange_experts, {"remove": [0]}, r"num_experts \(5\) must be a multiple of n_group \(3\)"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            function(folder, tmp_path / "out", **arguments, **QUIET)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_hash_table_follows(tmp_path):
    model = ours(router_type="hash", router_args={}, num_experts_per_tok=2)
    save(model, tmp_path / "model")
    before = model.model.layers[1].mlp.gate.hash_table
    report = prune(tmp_path / "model", tmp_path / "out", experts=4, by="random", verify=False, **QUIET)
    after = load(tmp_path / "out").model.layers[1].mlp.gate.hash_table
    kept = [x for (x,) in report["kept"]["model.layers.1"]]
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        assert len(set(new)) == 2 and all(0 <= x < 4 for x in new)
        assert {kept.index(x) for x in old if x in kept} <= set(new)
    assert set(after.flatten().tolist()) == set(range(4))


def test_groups_keep_as_many_each(tmp_path, text):
    model = ours(n_group=3, topk_group=2, num_experts_per_tok=2)
    save(model, tmp_path / "model")
    report = prune(tmp_path / "model", tmp_path / "out", experts=3, calibration=text, verify=False, **QUIET)
    assert all([e // 2 for (e,) in kept] == [0, 1, 2] for kept in report["kept"].values())
    assert best(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 5.0]), 3, 3) == [1, 2, 5]
    assert best(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 5.0]), 3, 1) == [1, 2, 5]


def test_prediction_of_several_tokens_goes_along(tmp_path, text):
    model = ours(num_mtp_layers=1)
    save(model, tmp_path / "model")
    prune(tmp_path / "model", tmp_path / "out", experts=4, calibration=text, verify=False, **QUIET)
    grow(tmp_path / "model", tmp_path / "grown", experts=12, top_k=6, verify=False, **QUIET)
    ids = ids_of(tmp_path / "model")[:, :9]
    grown, pruned = load(tmp_path / "grown"), load(tmp_path / "out")
    assert pruned.model.mtp_layers[0].block.mlp.experts.down_proj.shape[0] == 4
    with torch.no_grad():
        a, b = (x(ids, labels=ids, output_mtp_loss=True) for x in (model, grown))
    torch.testing.assert_close(a.mtp_loss, b.mtp_loss)


def test_texts_may_be_rows_and_conversations(text, tmp_path):
    folder = save(ours(), tmp_path / "model")
    chats = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "the dog ran"}]}] * 9
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": TEXT[:200]}) for _ in range(3)))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"is a conversation, and the model's tokenizer has no chat template"):
        prune(folder, tmp_path / "out", experts=4, calibration=tmp_path / "chats.jsonl", **QUIET)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    data = [tmp_path / "rows.jsonl", tmp_path / "chats.jsonl", text]
    report = prune(folder, tmp_path / "out", experts=4, calibration=data[1], data=data, **QUIET)
    model, pruned = load(folder), load(tmp_path / "out")
    for said, texts in zip(report["domains"], ([TEXT[:200]] * 3, ["a b the dog ran "] * 9, [TEXT]), strict=True):
        ids = torch.tensor([i for x in texts for i in tokenizer(x).input_ids][:512])
        for which, one in (("perplexity_a", model), ("perplexity_b", pruned)):
            losses = []
            for window in ids.split(64):  # all positions that the model has
                if len(window) > 1:
                    with torch.no_grad():
                        scores = one(window[None]).logits[0, :-1].log_softmax(-1)
                    losses += (-scores.gather(-1, window[1:, None])).flatten().tolist()
            assert said[which] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-3)


def test_nothing_is_written_by_a_dry_run(source, text, tmp_path):
    folder = source[1]
    report = prune(folder, tmp_path / "out", experts=4, calibration=text, dry_run=True, **QUIET)
    assert report["dry_run"] and report["disk_bytes"] > 0 and report["peak_memory_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_a_calibration_that_does_not_fit_the_memory_is_refused(source, text, tmp_path, monkeypatch):
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        ValueError, match=r"Reading the calibration text takes .* free; .*TMPDIR.*hf-moe import"
    ) as error:
        prune(source[1], tmp_path / "out", experts=4, calibration=text, **QUIET)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (prune, {"experts": 6}, "6 experts are to be kept of 6: it can be 1 to 5"),
        (prune, {"experts": 2}, "2 experts are fewer than the 3 that a token is sent to"),
        (prune, {}, "Say how many experts are kept"),
        (prune, {"experts": 4, "ratio": 0.5}, "Say how many experts are kept"),
        (prune, {"ratio": 1.5}, "ratio is 1.5; it must be above 0 and below 1"),
        (prune, {"experts": 4}, "by reap needs a text that the model reads"),
        (prune, {"experts": 4, "by": "taste"}, "by is 'taste'; it can be reap, frequency, output, random"),
        (prune, {"experts": 4, "calibration": "empty.txt"}, "The calibration text is empty"),
        (prune, {"experts": 4, "calibration": "missing.txt"}, "There is no file missing.txt"),
        (grow, {"experts": 6}, "experts is 6; it must be more than 6, as many as there are"),
        (
            grow,
            {"experts": 8},
            "experts is 8; it must be a multiple of 6, .*: with more copies of some, a token's best",
        ),
        (grow, {"experts": 12, "calibration": "empty.txt"}, "calibration is given, but here all experts get as many"),
        (grow, {"experts": 12, "top_k": 4}, "top_k is 4; it can be 3, as now, or 6"),
        (grow, {"experts": 12, "noise": -1.0}, "noise is -1.0"),
        (exchange_experts, {}, "Say what happens"),
        (exchange_experts, {"remove": [6]}, "There is no expert 6: they have the numbers 0 to 5"),
        (exchange_experts, {"remove": [0, 1, 2, 3]}, "2 experts are fewer than the 3"),
        (exchange_experts, {"add": ["wide"]}, "no siblings, whose experts stand in one model"),
        (exchange_experts, {"add": ["dense"]}, "is dense|a llama"),
        (exchange_experts, {"add": ["."]}, "config.json does not exist"),
    ],
)
def test_refused_in_one_line_with_no_output(function, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(ours(), tmp_path / "model")
    save(ours(moe_intermediate_size=28), tmp_path / "wide")
    shutil.copytree(DEMO_MODEL, tmp_path / "dense")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises((ValueError, OSError), match=said) as error:
        function("model", "out", **arguments, **QUIET)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(("data", "said"), [("empty.txt", "has 0 tokens"), ("missing.txt", "There is no file")])
def test_texts_to_compare_on_are_looked_at_before_the_calibration(data, said, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[prune.__module__], "watch", None)
    save(ours(), tmp_path / "model")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises((ValueError, OSError), match=said):
        prune("model", "out", experts=4, calibration=text, data=[text, data], **QUIET)
    assert not (tmp_path / "out").exists()


def test_scores_say_what_they_are():
    numbers = torch.tensor([[2.0, 0.0, 4.0], [3.0, 0.0, 2.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    seen = Seen(*numbers, torch.zeros(3, 3))
    generator = torch.Generator().manual_seed(0)
    found = {name: score(seen, generator).tolist() for name, score in SCORES.items() if name != "random"}
    assert found == {"reap": [0.5, 0.0, 0.25], "frequency": [2.0, 0.0, 4.0], "output": [1.5, 0.0, 0.5]}


# Of models, one after the other, the memory that pruning took beyond what was there before it.
MEASURE = """
import json, sys, threading, time
from pathlib import Path
from hf_moe.conversion import prune

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

text, *folders = sys.argv[1:]
found = []
for folder in folders:  # the first is for what the libraries need the first time
    before, peak, running = anonymous(), 0, True
    def watch():
        global peak
        while running:
            peak = max(peak, anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    prune(folder, folder + "-pruned", experts=4, calibration=text, calibration_tokens=60, verify=False, progress=False)
    running = False
    thread.join()
    found.append(peak - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["hf_moe", "olmoe"])
def test_memory_does_not_grow_with_the_layers(family, text, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.conversion.output.anonymous_memory", lambda: 0)
    layer = 0
    for name, layers, width in (("warm", 1, 32), ("few", 2, 2048), ("many", 16, 2048)):
        sizes = {"hidden_size": 256, "num_hidden_layers": layers, "num_experts_per_tok": 2, "vocab_size": 512}
        if family == "olmoe":
            model = build("olmoe", torch.bfloat16, **sizes, intermediate_size=width, num_experts=6)
        else:
            sizes |= {"moe_intermediate_size": width, "mlp_layer_types": ["sparse"] * layers}
            model = ours(**sizes, router_args={}).to(torch.bfloat16)
        save(model, tmp_path / name)
        layer = max(layer, 4 * sum(x.numel() for x in model.model.layers[0].parameters()))
    taken, planned = {}, {}
    for name in ("few", "many"):
        shutil.rmtree(tmp_path / "warm-pruned", ignore_errors=True)
        folders = [str(tmp_path / "warm"), str(tmp_path / name)]
        run = subprocess.run([sys.executable, "-c", MEASURE, str(text), *folders], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        taken[name] = json.loads(run.stdout.splitlines()[-1])[1] / layer
        mixture = open_mixture(folders[1])
        needed = memory(mixture, windows_of(mixture, text, 60))
        plan = prune(folders[1], tmp_path / "none", experts=4, calibration=text, calibration_tokens=60, dry_run=True)
        assert plan["peak_memory_bytes"] == needed  # and nothing beside
        planned[name] = needed / layer
    print(taken, planned)
    # One layer in float32 where the files hold it so; about three where Transformers puts it together, more or less as
    # its threads run. All sixteen would be eight in bfloat16.
    assert all(0.9 < layers < 5 for layers in taken.values())
    assert planned["few"] == planned["many"]
    assert all(0.5 < layers / planned[name] < 2 for name, layers in taken.items())
