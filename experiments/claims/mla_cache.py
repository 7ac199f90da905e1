"""What attention caches, and what the loss is, at equal parameters.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434), D.1 and D.2: MHA is better than GQA and MQA at 7B; latent attention is
better than MHA, with a cache of 4 to 14% of its. Here experts are as much wider as attention is smaller.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, as_good


def arms(budget: Budget) -> dict[str, Arm]:
    heads = budget.fields["num_attention_heads"]
    size = budget.fields["hidden_size"] // heads
    rope = size // 4 * 2
    latent = {"attention_type": "mla", "num_key_value_heads": heads, "kv_lora_rank": 2 * size, "q_lora_rank": None}
    latent |= {"qk_nope_head_dim": size, "qk_rope_head_dim": rope, "v_head_dim": size}
    kinds = {
        "MHA": {"num_key_value_heads": heads},
        "GQA": {"num_key_value_heads": heads // 2},
        "MQA": {"num_key_value_heads": 1},
        "MLA": latent,
    }
    return {name: as_large(BALANCED | fields, BALANCED | kinds["MHA"], budget) for name, fields in kinds.items()}


def as_large(fields: dict, other: dict, budget: Budget) -> Arm:
    """Experts of the width that brings these fields' parameters nearest to those of others."""
    from ..trial import size_of

    def parameters(given: dict) -> int:
        return size_of(Arm(given), budget)["total_params"]

    width = budget.fields["moe_intermediate_size"]
    step, target = max(1, width // 32), parameters(other)
    widths = range(width - 6 * step, width + 7 * step, step)
    candidates = [{**fields, "moe_intermediate_size": x} for x in widths]
    return Arm(min(candidates, key=lambda x: abs(parameters(x) - target)))


def judge(runs: Runs) -> str:
    return as_good(runs, "MLA", "MHA")


EXPERIMENT = Experiment(
    claim="Latent attention is as good as multi-head attention of as many parameters, with a smaller cache.",
    source="DeepSeek-V2, https://arxiv.org/abs/2405.04434, tables 8 and 9",
    paper="MHA before GQA before MQA; MLA before MHA, with 4 to 14% of its cache.",
    arms=arms,
    judge=judge,
    equal="total_params",
)
