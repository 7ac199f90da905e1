"""Kimi K2: arXiv 2507.20534. DeepSeek-V3's shape and classes under another name, which Transformers does not know."""

from dataclasses import replace

from transformers import DeepseekV3Config

from .deepseek_v3 import DEEPSEEK_V3


class KimiK2Config(DeepseekV3Config):
    model_type = "kimi_k2"


KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2", own_config=(KimiK2Config, "DeepseekV3ForCausalLM"))
