"""OLMo 3: arXiv 2512.13961. OLMo 2 with a sliding window in three of four layers, RoPE scaled in the fourth."""

from .family import Family, same
from .olmo2 import OLMO2
from .rope_rows import ROPE_BY_LAYER_TYPE

OLMO3 = Family(
    model_type="olmo3",
    fields={**OLMO2.fields, **same("layer_types", "sliding_window"), "rope_parameters": ROPE_BY_LAYER_TYPE},
    constants=OLMO2.constants,
    undeclared=OLMO2.undeclared,
)
