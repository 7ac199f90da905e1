"""Tiny models, and their steps of decoding with the kernels and without."""

import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.kernels.decode import fused
from hf_moe.model.decoding import HfMoeReservedCache
from hf_moe.model.rms_norm import HfMoeRMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny(**fields) -> HfMoeConfig:
    base = {"vocab_size": 37, "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24}
    base |= {"num_hidden_layers": 1, "num_attention_heads": 3, "num_experts": 6, "num_experts_per_tok": 2}
    return HfMoeConfig(**(base | {"max_position_embeddings": 64, "pad_token_id": 0} | fields))


LATENT = {"attention_type": "mla", "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9}
LATENT |= {"hidden_size": 40}


def model_of(fields: dict, dtype: torch.dtype) -> HfMoeForCausalLM:
    torch.manual_seed(0)
    model = HfMoeForCausalLM(tiny(initializer_range=0.2, **fields)).to(DEVICE, dtype).eval()
    for module in model.modules():
        if isinstance(module, HfMoeRMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            bias.uniform_(-0.2, 0.2)
    return model


@torch.no_grad()
def steps_of(model: HfMoeForCausalLM, padding: int, rows: int, steps: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Logits of so many tokens in two steps behind a prompt: as the modules compute them at once, and the kernels."""
    length = 11
    end = length + sum(steps)
    ids = torch.randint(1, 37, (rows, end), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[rows // 2, :padding] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, length:]

    cache = HfMoeReservedCache(model.config.num_hidden_layers, 20)
    model(
        ids[:, :length], attention_mask=mask[:, :length], position_ids=position_ids[:, :length], past_key_values=cache
    )
    whole = torch.ones(rows, cache.layers[0].max_cache_len, dtype=torch.bool, device=DEVICE)
    whole[:, :end] = mask.bool()
    with fused(model, rows * max(steps)):
        for layer in cache.layers:
            layer.recorded = True
            layer.cumulative_length.fill_(length)
            # Nothing may read what isn't written.
            layer.keys[:, :, length:] = layer.values[:, :, length:] = float("nan")
        logits = [
            model(
                ids[:, place : place + tokens],
                attention_mask=whole if padding else None,
                position_ids=position_ids[:, place : place + tokens],
                past_key_values=cache,
            ).logits
            for place, tokens in zip((length, length + steps[0]), steps, strict=True)
        ]
        assert all(int(layer.cumulative_length) == end for layer in cache.layers)
    return expected, torch.cat(logits, dim=1)
