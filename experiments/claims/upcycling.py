"""A dense model made a mixture of experts, beside going on with it.

Sparse upcycling (https://arxiv.org/abs/2212.05055), figures 2 and 3: with the FLOPs of going on the upcycled model is
better. Drop-upcycling (https://arxiv.org/abs/2502.19261) starts higher and ends lower than copies; granular upcycling:
https://arxiv.org/abs/2410.07524, 4.2. The dense model is trained for half of the steps at first, in every arm.
"""

import tempfile
from functools import partial
from pathlib import Path

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower

EXPERTS, TOP_K, PIECES = 8, 2, 2
WAYS = {"copy": {}, "noise": {}, "drop": {}, "granular": {"granularity": PIECES}}


def arms(budget: Budget) -> dict[str, Arm]:
    from ..trial import size_of

    width, steps = budget.fields["moe_intermediate_size"], budget.steps // 2
    dense = budget.dense | {"intermediate_size": width}
    found = {"dense": Arm(dense, {"max_steps": steps}, going_on)}
    of_dense = size_of(found["dense"], budget)["flops_per_token"]
    for name, options in WAYS.items():
        pieces = options.get("granularity", 1)
        fields = {"num_experts": EXPERTS * pieces, "num_experts_per_tok": TOP_K * pieces}
        fields |= BALANCED | {"moe_intermediate_size": width // pieces}
        share = of_dense / size_of(Arm(fields), budget)["flops_per_token"]
        begin = partial(upcycled, strategy=name, **options)
        found[name] = Arm(fields, {"max_steps": max(1, round(steps * share))}, begin)
    return found


def trained_dense(trial):
    """A Llama with as many layers, trained for half of the steps."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from ..text import IDS

    budget, fields = trial.budget, trial.budget.fields
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "initializer_range")
    config = LlamaConfig(
        **{name: fields[name] for name in (*names, "tie_word_embeddings")},
        **IDS,
        intermediate_size=fields["moe_intermediate_size"],
        vocab_size=budget.vocabulary,
        max_position_embeddings=budget.length,
    )
    set_seed(trial.seed)
    model = LlamaForCausalLM(config)
    trial.fit(model, trial.text, max_steps=max(1, budget.steps // 2))
    return model


def second_half(trial):
    """The text without the rows that the dense model has seen."""
    seen = trial.budget.rows * (trial.budget.steps // 2)
    return trial.text._replace(rows=trial.text.rows[seen:])


def going_on(trial):
    from ..trial import Start

    return Start(trained_dense(trial), second_half(trial))


def upcycled(trial, strategy: str, **options):
    from hf_moe.conversion import upcycle

    from hf_moe.model.modeling_hf_moe import HfMoeForCausalLM

    from ..trial import Start

    with tempfile.TemporaryDirectory() as folder:
        dense, mixture = Path(folder, "dense"), Path(folder, "mixture")
        trained_dense(trial).save_pretrained(dense)
        trial.text.tokenizer.save_pretrained(dense)
        settings = {
            "experts": EXPERTS,
            "top_k": TOP_K,
            "strategy": strategy,
            "seed": trial.seed,
            "verify": False,
            "progress": False,
        }
        upcycle(dense, mixture, **settings, **options)
        model = HfMoeForCausalLM.from_pretrained(mixture, dtype="float32")
    model.config.name_or_path = model.name_or_path = ""  # a folder that is gone
    model.config.router_aux_loss_coef = BALANCED["router_aux_loss_coef"]
    return Start(model, second_half(trial))


def judge(runs: Runs) -> str:
    return lower(runs, "copy", "dense")


EXPERIMENT = Experiment(
    claim="For the same FLOPs an upcycled model is better than going on with the dense one.",
    source="Sparse upcycling, https://arxiv.org/abs/2212.05055, figures 2 and 3",
    paper="better than going on, by more the longer both train; Drop-upcycling starts higher and ends lower.",
    arms=arms,
    judge=judge,
    equal=None,  # but for a part of a step
)
