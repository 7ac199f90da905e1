"""Gemma 3 (text): arXiv 2503.19786. Gemma 2 with norms over each head of q and k instead of caps on their product."""

from .family import Family
from .gemma2 import GEMMA2
from .rope_rows import ROPE_BY_LAYER_TYPE

CARRIED = {name: source for name, source in GEMMA2.fields.items() if name != "attn_logit_softcapping"}

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    fields={**CARRIED, "rope_parameters": ROPE_BY_LAYER_TYPE},
    constants={**GEMMA2.constants, "qk_norm": "head"},
    required={"use_bidirectional_attention": False},
    neutral=frozenset({"attn_logit_softcapping"}),  # its code does not read it
    undeclared=frozenset({"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"}),
)
