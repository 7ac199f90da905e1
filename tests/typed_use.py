"""What users write with the public names (tests/test_public.py), for a type checker to read: nothing runs this.

pip install --no-deps --target typed . && MYPYPATH=typed mypy
"""

from pathlib import Path
from typing import Any

import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint, nearest_families, upcycle, verify
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

import hf_moe
from hf_moe import (
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    MoeDPOConfig,
    MoeDPOTrainer,
    MoeGRPOConfig,
    MoeGRPOTrainer,
    MoeSFTConfig,
    MoeSFTTrainer,
    MoeTrainer,
    MoeTrainingArguments,
    load_router_bias,
    load_rows,
    quantize_experts,
)
from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import postcard_rows
from hf_moe.generation.guided import GuidedLogitsProcessor
from hf_moe.model.balancing import expert_loss, routed, statistics, update_selection_bias
from hf_moe.model.routing import ROUTERS, Assignment, RouterState, choose, normalized, softmax_affinity
from hf_moe.sizes import sizes
from hf_moe.telemetry import trace
from hf_moe.telemetry.live import RoutingFigures


def models() -> list[torch.nn.Module]:
    config: HfMoeConfig = HfMoeConfig.from_preset("mixtral-8x7b", num_hidden_layers=2)
    experts: int = HfMoeConfig(num_experts=4).num_experts
    counted: dict[str, Any] = sizes(config, context=experts)
    kinds = (HfMoeModel, HfMoeForCausalLM, HfMoeForSequenceClassification, HfMoeForTokenClassification)
    return [kind(config) for kind in kinds] if counted else []


def conversions(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = upcycle(DEMO_MODEL, folder / "moe", experts=8, top_k=2)
    report |= import_checkpoint(folder / "released", folder / "imported")
    report |= export_checkpoint(folder / "moe", folder / "exported", to="mixtral")
    report |= nearest_families(folder / "moe")
    return report | verify(folder / "moe", folder / "exported", data=folder / "text.txt")


def top_two(logits: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    scores = softmax_affinity(logits)
    index = choose(scores, config, state)
    return Assignment(normalized(scores.gather(-1, index), config), index)


def balanced(model: HfMoeForCausalLM, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    batch = routed(logits, softmax_affinity(logits), index)
    counts = statistics(batch)
    update_selection_bias(torch.zeros(4), counts.counts_E, 1e-3)
    assert "topk_softmax" in ROUTERS
    return expert_loss(batch, counts, model.config)


def trained(model: HfMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, out: str) -> None:
    rows = postcard_rows(4, held_out=False, seed=0)
    trainer = MoeTrainer(model=model, args=MoeTrainingArguments(out, router_aux_loss_coef=0.01), train_dataset=rows)
    trainer.add_callback(RoutingFigures(trainer))
    trainer.train()
    MoeSFTTrainer(model=model, args=MoeSFTConfig(out), train_dataset=rows, processing_class=tokenizer).train()
    MoeDPOTrainer(model=model, args=MoeDPOConfig(out), train_dataset=rows, processing_class=tokenizer).train()
    MoeGRPOTrainer(model=model, reward_funcs=[], args=MoeGRPOConfig(out), train_dataset=rows).train()
    load_rows(model, out)
    load_router_bias(model, out)
    quantize_experts(model)


def looked_at(model: HfMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, text: Path, out: Path) -> str:
    summary: dict[str, Any] = trace(model, text, out, tokenizer=tokenizer)
    GuidedLogitsProcessor(tokenizer, regex="[0-9]+")
    return f"{hf_moe.__version__}: {summary['tokens']}"
