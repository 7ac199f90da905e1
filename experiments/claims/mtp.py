"""A module that predicts one token more.

DeepSeek-V3 (https://arxiv.org/abs/2412.19437), 4.5.1 and table 4: most benchmarks are better with it; 5.4.3: its
second token is accepted for 85 to 90% of the texts' tokens, and decoding is 1.8 times as fast.
"""

import torch

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, as_good

PROMPTS = 8


def arms(budget: Budget) -> dict[str, Arm]:
    return {"with": Arm(BALANCED | {"num_mtp_layers": 1}), "without": Arm(BALANCED)}


@torch.no_grad()
def drafted(trial, model) -> dict[str, float]:
    """How many drafts are accepted, and tokens that a forward pass writes, one text at a time."""
    if not model.config.num_mtp_layers:
        return {"tokens_a_forward": 1.0}
    half, accepted, drafts, passes, written = trial.budget.length // 2, 0, 0, 0, 0
    model.eval()
    for row in trial.text.held_out[:PROMPTS, :half].to(model.device):
        options = {"max_new_tokens": half, "do_sample": False, "eos_token_id": None, "use_mtp": True}
        out = model.generate(row[None], return_dict_in_generate=True, **options)
        accepted, drafts = accepted + out.accepted_tokens, drafts + out.drafted_tokens
        passes, written = passes + out.forward_passes, written + out.sequences.shape[1] - half
    return {"accepted_drafts": accepted / drafts, "tokens_a_forward": written / passes}


def judge(runs: Runs) -> str:
    return as_good(runs, "with", "without")


EXPERIMENT = Experiment(
    claim="Predicting a second token costs the first one nothing, and its drafts make writing faster.",
    source="DeepSeek-V3, https://arxiv.org/abs/2412.19437, table 4 and 5.4.3",
    paper="better on most benchmarks; 85 to 90% of the drafts accepted, 1.8 times the tokens a second.",
    arms=arms,
    judge=judge,
    measure=drafted,
)
