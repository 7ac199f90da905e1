"""The stages of training: what a recipe's `stage` names.

A stage's module has `ARGUMENTS`, the dataclasses that its recipes fill, and `run`, which takes one instance of each
and returns the trainer and the metrics.
"""

STAGES = {
    "sft": "hf_moe.training.stages.sft",
    "pretrain": "hf_moe.training.stages.pretrain",
    "distil": "hf_moe.training.stages.distil",
    "dpo": "hf_moe.training.stages.dpo",
    "grpo": "hf_moe.training.stages.grpo",
}
