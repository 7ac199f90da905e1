"""Tuning on little data, with the experts frozen.

ST-MoE (https://arxiv.org/abs/2202.08906), 4.2: tuning all but the experts and routers is as good as tuning all, tuning
those alone is far worse. Here a model trained on the text learns to write postcards from few of them.
"""

import random
from functools import partial

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, as_good, both, lower

POSTCARDS, EPOCHS = 64, 16  # rows of the small data, and how often they are read


def arms(budget: Budget) -> dict[str, Arm]:
    steps = max(1, min(budget.steps, EPOCHS * POSTCARDS // budget.rows))
    tuned = {"all": "all", "all but experts": "dense_only", "experts alone": "moe_only"}
    arguments = {"max_steps": steps, "learning_rate": budget.learning_rate / 2}
    return {name: Arm(BALANCED, arguments, partial(trained, group=group)) for name, group in tuned.items()}


def trained(trial, group: str):
    from hf_moe.training.weights.groups import train_group

    from ..trial import Start

    model = trial.model()
    trial.fit(model, trial.text)
    train_group(model, group)
    return Start(model, postcards(trial))


def postcards(trial):
    """Rows of postcards; the held-out ones are between people that the others are not between."""
    import torch

    from hf_moe.demo.text import postcard

    text, length = trial.text, trial.budget.length
    rows = {}
    for held_out in (False, True):
        rng, ids = random.Random(trial.seed), []
        while len(ids) < POSTCARDS * length:
            ids += text.tokenizer("\n".join(postcard(rng, held_out)), add_special_tokens=False)["input_ids"]
            ids.append(text.tokenizer.eos_token_id)
        rows[held_out] = torch.tensor(ids[: POSTCARDS * length]).view(POSTCARDS, length)
    return text._replace(rows=rows[False], held_out=rows[True])


def judge(runs: Runs) -> str:
    return both(as_good(runs, "all but experts", "all"), lower(runs, "all but experts", "experts alone"))


EXPERIMENT = Experiment(
    claim="On little data, tuning all but the experts is as good as tuning all, and better than the experts alone.",
    source="ST-MoE, https://arxiv.org/abs/2202.08906, 4.2",
    paper="non-MoE parameters alone do as well as all, MoE parameters alone far worse.",
    arms=arms,
    judge=judge,
)
