"""`prune --merge` of experts that have nothing in common, beside neurons matched and averaged one by one."""

import pytest
import torch
from hf_moe.conversion import prune
from scipy.optimize import linear_sum_assignment

from hf_moe.routers import find_routers
from tests.conversion.test_reshape import (
    CASES,
    QUIET,
    TEXT,
    build,
    by_hand,
    ids_of,
    load,
    ours,
    save,
    worth,
)


@pytest.fixture(scope="module", params=["hf_moe", *CASES])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    (folder.parent / "text.txt").write_text(TEXT)
    if request.param == "hf_moe":
        return save(ours(), folder)
    model_type, fields = CASES[request.param]
    return save(build(model_type, **{**fields, "vocab_size": 512}), folder)


def neurons(experts, expert: int, gpt_oss: bool) -> torch.Tensor:
    """All weights that belong to each neuron: [I, .]."""
    of = {name: x[expert].detach() for name, x in experts.named_parameters()}
    found = []
    for i in range(len(of["down_proj"]) if gpt_oss else of["down_proj"].shape[1]):
        if gpt_oss:  # transposed, gate and up columns alternate
            one = [of["gate_up_proj"][:, 2 * i], of["gate_up_proj"][:, 2 * i + 1], of["down_proj"][i]]
            one += [of["gate_up_proj_bias"][2 * i : 2 * i + 2]]
        else:
            width = of["down_proj"].shape[1]
            one = [of["gate_up_proj"][i], of["gate_up_proj"][width + i], of["down_proj"][:, i]]
        found.append(torch.cat(one))
    return torch.stack(found)


@pytest.mark.parametrize("by", ["reap", "frequency"])
def test_neurons_are_matched_and_averaged(folder, by, tmp_path):
    calibration = folder.parent / "text.txt"
    report = prune(
        folder,
        tmp_path / "out",
        experts=3,
        by=by,
        merge=True,
        calibration=calibration,
        calibration_tokens=60,
        verify=False,
        **QUIET,
    )
    source, merged = load(folder), load(tmp_path / "out")
    gpt_oss, moved = source.config.model_type == "gpt_oss", 0
    seen = by_hand(source, ids_of(folder))
    for (name, old), new in zip(find_routers(source).items(), find_routers(merged).values(), strict=True):
        layer = f"model.layers.{name.split('.layers.')[1].split('.')[0]}"
        scores = worth(by, *seen[layer])
        leads = sorted(sorted(range(6), key=lambda expert: (-scores[expert], expert))[:3])
        assert [members[0] for members in report["kept"][layer]] == leads
        for number, members in enumerate(report["kept"][layer]):
            shares = [scores[x] / sum(scores[x] for x in members) for x in members]
            lead, *others = (neurons(old.layer.experts, x, gpt_oss) for x in members)
            expected = shares[0] * lead
            for share, other in zip(shares[1:], others, strict=True):
                cost = [[(a * b).sum().item() for b in other.double()] for a in lead.double()]
                _, places = linear_sum_assignment(cost, maximize=True)
                expected += share * other[places]
                moved += sum(int(place) != i for i, place in enumerate(places))
            torch.testing.assert_close(neurons(new.layer.experts, number, gpt_oss), expected, rtol=1e-4, atol=1e-5)
            if gpt_oss:
                bias = sum(
                    share * old.layer.experts.down_proj_bias[x] for share, x in zip(shares, members, strict=True)
                )
                torch.testing.assert_close(new.layer.experts.down_proj_bias[number], bias, rtol=1e-4, atol=1e-5)
            row = sum(share * old.module.weight[x] for share, x in zip(shares, members, strict=True))
            torch.testing.assert_close(new.module.weight[number], row, rtol=1e-4, atol=1e-5)
    assert moved
