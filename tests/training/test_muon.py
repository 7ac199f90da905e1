"""Muon on fused experts: what torch.optim.Muon makes of their matrices one by one; in recipes, and resumed."""

import pytest
import torch
from hf_moe.training.trainers.muon import Muon, is_stacked, orthogonal
from safetensors.torch import load_file
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from hf_moe import MoeTrainingArguments
from tests.training.balance_worker import train_one_step
from tests.training.models import hf_moe, olmoe

ARGUMENTS = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (3, 6, 9), (2, 3, 11, 4)])
def test_singular_values_are_about_one(shape):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    found = orthogonal(x).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4 and values.max() < 1.4
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    # In the basis of the singular vectors the matrix is diagonal.
    inside = U.mT @ found @ V.mT
    off = inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))
    assert off.abs().max() < 0.05
    for one, of in zip(found.reshape(-1, *shape[-2:]), x.reshape(-1, *shape[-2:]), strict=True):
        assert torch.allclose(one, orthogonal(of).float(), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "halves"), [((3, 10, 8), True), ((3, 8, 5), False), ((6, 9), False)])
def test_experts_move_as_matrices_one_by_one(shape, halves, dtype):
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(*shape).to(dtype))
    start = fused.detach().clone()
    cut = start.unflatten(-2, (2, -1)) if halves else start
    single = [torch.nn.Parameter(x.clone()) for x in cut.reshape(-1, *cut.shape[-2:])]
    mine = Muon([{"params": [fused], "muon": True, "halves": halves, "weight_decay": 0.1}], lr=0.02)
    torchs = torch.optim.Muon(single, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn_like(fused)
        fused.grad = gradient
        cut = gradient.unflatten(-2, (2, -1)) if halves else gradient
        for one, x in zip(single, cut.reshape(-1, *cut.shape[-2:]), strict=True):
            one.grad = x.clone()
        mine.step()
        torchs.step()
    expected = torch.stack([x.detach() for x in single]).reshape(shape)
    moved, apart = (fused - start).float().norm(), (fused - expected).float().norm()
    assert apart < (0.01 if dtype == torch.float32 else 0.1) * moved


def run(folder, **arguments):
    given = ARGUMENTS | {"optim": "muon", "max_steps": 3, "save_strategy": "steps", "save_steps": 1} | arguments
    _, trainer = train_one_step(hf_moe(), 1, 1, keep_folder=folder, **given)
    trainer.save_model(str(folder / "final"))
    return trainer


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    trainer = run(tmp_path / "whole")
    run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    whole, again = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(again[name], x) for name, x in whole.items())
    names = {id(x): name for name, x in trainer.model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    by_muon = {names[id(x)]: group for group in optimizer.param_groups if group["muon"] for x in group["params"]}
    assert {name.split(".")[-2] for name in by_muon if not name.endswith("gate.weight")} >= {"q_proj", "experts"}
    assert all(group["halves"] == name.endswith("gate_up_proj") for name, group in by_muon.items())
    for parameter, state in optimizer.state.items():
        moments = {"exp_avg", "exp_avg_sq"} if names[id(parameter)] not in by_muon else {"momentum_buffer"}
        assert set(state) == moments | {"step"}
    others = set(names.values()) - set(by_muon)
    assert "model.embed_tokens.weight" in others and "lm_head.weight" not in by_muon
    assert all("norm" in name or "embed" in name or "head" in name for name in others)


def test_optim_is_its_name(tmp_path):
    assert MoeTrainingArguments(output_dir=str(tmp_path), optim="muon").muon
    assert not MoeTrainingArguments(output_dir=str(tmp_path)).muon


def test_interleaved_experts_are_not_cut_in_halves():
    assert is_stacked(hf_moe().model.layers[1].mlp.experts) and is_stacked(olmoe().model.layers[0].mlp.experts)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    assert not is_stacked(GptOssExperts(GptOssConfig(**sizes)))
