"""The table of published models says what the presets say; every field of the configuration has its row."""

from hf_moe import HfMoeConfig
from hf_moe.sizes.presets import PRESETS, preset_config
from tests.docs.conftest import DOCS

PAGE = (DOCS / "models.md").read_text(encoding="utf-8")


def row(name: str) -> str:
    """Preset, experts routed, active and shared, their width by the dense MLP's of the family, router, attention."""
    config = preset_config(name)
    sparse = f"{config.mlp_layer_types.count('sparse')} of {config.num_hidden_layers}"
    experts = f"{config.num_experts} | {config.num_experts_per_tok} | {config.n_shared_experts}"
    arguments = "".join(f", `{key}: {value}`" for key, value in sorted(config.router_args.items()))
    router = f"`{config.router_type}`{arguments}" + (", `norm_topk_prob`" if config.norm_topk_prob else "")
    heads = {"gqa": f"{config.num_attention_heads} / {config.num_key_value_heads}"}
    attention = f"`{config.attention_type}` {heads.get(config.attention_type, config.num_attention_heads)}"
    link = f"[{PRESETS[name]['title']}]({PRESETS[name]['source'][0]})"
    return f"| `{name}` | {link} | {experts} | {config.moe_intermediate_size} | {sparse} | {router} | {attention} |"


def test_every_preset_has_its_row():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and line.count(" | ") == 8]
    assert rows == [row(name) for name in PRESETS]


def test_every_field_of_the_configuration_is_named():
    fields = set(HfMoeConfig.__annotations__) - {"vocab_size", "model_type"}
    assert {name for name in fields if f"`{name}`" not in PAGE} == set()
