"""The families that hf_moe reads and writes: one table each."""

from .arcee import ARCEE
from .aria import ARIA_TEXT
from .axk1 import AXK1
from .dbrx import DBRX
from .deepseek import DEEPSEEK
from .deepseek_v2 import DEEPSEEK_V2
from .deepseek_v3 import DEEPSEEK_V3
from .dots1 import DOTS1
from .ernie4_5_moe import ERNIE4_5_MOE
from .exaone_moe import EXAONE_MOE
from .family import Computed, Family
from .flex_olmo import FLEX_OLMO
from .flint import FLINT
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3_TEXT
from .glm import GLM, GLM4
from .glm4_moe import GLM4_MOE
from .glm4_moe_lite import GLM4_MOE_LITE
from .gpt_oss import GPT_OSS
from .granite import GRANITE
from .granitemoe import GRANITEMOE, GRANITEMOESHARED
from .granitemoe_swa import GRANITEMOE_SWA
from .hunyuan_v1_moe import HUNYUAN_V1_MOE
from .hy_v3 import HY_V3
from .jetmoe import JETMOE
from .kimi_k2 import KIMI_K2
from .llama import LLAMA
from .llama4 import LLAMA4_TEXT
from .mellum import MELLUM
from .minimax_m2 import MINIMAX_M2
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .olmo3 import OLMO3
from .olmoe import OLMOE
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .qwen3_vl_moe import QWEN3_VL_MOE_TEXT
from .sarvam import SARVAM_MLA, SARVAM_MOE
from .smollm3 import SMOLLM3
from .solar_open import SOLAR_OPEN

# Mixtures of experts, for `import_checkpoint` and `export_checkpoint`.
TABLES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "flex_olmo": FLEX_OLMO,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "mellum": MELLUM,
    "flint": FLINT,
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": KIMI_K2,
    "axk1": AXK1,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "solar_open": SOLAR_OPEN,
    "dots1": DOTS1,
    "exaone_moe": EXAONE_MOE,
    "hy_v3": HY_V3,
    "sarvam_moe": SARVAM_MOE,
    "sarvam_mla": SARVAM_MLA,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "minimax_m2": MINIMAX_M2,
    "granitemoe": GRANITEMOE,
    "granitemoeshared": GRANITEMOESHARED,
    "granitemoe_swa": GRANITEMOE_SWA,
    "dbrx": DBRX,
    "llama4_text": LLAMA4_TEXT,
    "gpt_oss": GPT_OSS,
    "aria_text": ARIA_TEXT,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "jetmoe": JETMOE,
}
FAMILIES = {name: family for name, family in TABLES.items() if family.known}  # older hosts have fewer

# The same, and those that Transformers has only within a model that sees pictures: they are exported as others.
IMPORTED = {**FAMILIES, "qwen3_vl_moe_text": QWEN3_VL_MOE_TEXT}

# Dense models, for `upcycle`.
DENSE_FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "glm": GLM,
    "glm4": GLM4,
    "arcee": ARCEE,
}

# Mixtures of experts that no decoder can hold.
ENCODER_DECODERS = frozenset({"switch_transformers", "nllb_moe"})

__all__ = ["DENSE_FAMILIES", "ENCODER_DECODERS", "FAMILIES", "IMPORTED", "Computed", "Family"]
