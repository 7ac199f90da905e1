"""The families that hf_moe reads and writes: one table each."""

from .deepseek import DEEPSEEK
from .deepseek_v2 import DEEPSEEK_V2
from .deepseek_v3 import DEEPSEEK_V3
from .family import Computed, Family
from .glm4_moe import GLM4_MOE
from .llama import LLAMA
from .minimax_m2 import MINIMAX_M2
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

# Mixtures of experts, for `import_checkpoint` and `export_checkpoint`.
FAMILIES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "minimax_m2": MINIMAX_M2,
}

# Dense models, for `upcycle`.
DENSE_FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}

__all__ = ["DENSE_FAMILIES", "FAMILIES", "Computed", "Family"]
