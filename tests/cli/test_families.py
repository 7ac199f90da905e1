"""`hf-moe inspect` and `hf-moe plan` on the config of every mixture of experts in Transformers: right, or refused."""

import json

import pytest
import torch
from hf_moe.conversion.known_config import folder_config

from hf_moe.routers import captured, find_routers, routed_experts

from ..conversion.conftest import count
from ..families import FAMILIES, tiny


@pytest.mark.parametrize("model_type", FAMILIES)
def test_inspect_and_plan_of_every_family(model_type, command, tmp_path):
    model = tiny(model_type)
    model.config.save_pretrained(tmp_path)
    answers = [command(*words, "--json") for words in (["inspect", tmp_path], ["plan", tmp_path, "--length", 16])]
    assert len({code for code, _, _ in answers}) == 1
    if answers[0].code:
        for code, out, err in answers:
            assert (code, out) == (2, "") and len(err.splitlines()) == 1
            assert f"has model_type '{model_type}', which hf_moe does not read" in err and "`hf-moe card`" in err
        return
    inspected, planned = (json.loads(out) for _, out, _ in answers)
    routers = find_routers(model)
    with captured(routers, routed_experts(model.config)[1]) as routings, torch.no_grad():
        model(input_ids=torch.arange(3, 12).unsqueeze(0), use_cache=False)
    done = {(routing.experts, routing.index_SK.shape[-1]) for routing in routings.values()}
    assert done == {(inspected["num_experts"], inspected["num_experts_per_tok"])}
    assert inspected["sparse_layers"] == sum("attention" not in name for name in routers)
    assert inspected["total_params"] == planned["total_params"]
    if not folder_config(tmp_path).num_mtp_layers:  # Transformers leaves out those that a config says
        assert inspected["total_params"] == count(model)
