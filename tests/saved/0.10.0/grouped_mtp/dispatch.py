"""What of Transformers' implementations of attention and of experts a configuration rules out, and why."""

import torch

from .grouped import ROW_BYTES, takes_rows


class HfMoeDispatch:
    """The checks that a pretrained model runs before it takes an implementation."""

    @property
    def _compatible_flash_implementations(self) -> list[str] | None:
        # The flash kernels that know attention sinks; others would leave them out without a word.
        return ["kernels-community/vllm-flash-attn3", "flash_attention_4"] if self.config.attention_sinks else None

    @property
    def _supports_context_parallel(self) -> bool:
        return not self.config.attention_sinks  # its attention is sdpa's

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        config = self.config
        if config.attn_logit_softcapping is not None:
            raise ValueError(
                f"attn_logit_softcapping ({config.attn_logit_softcapping}) needs attn_implementation eager, "
                "flex_attention or flash_attention_2: sdpa cannot cap logits."
            )
        if config.attention_sinks:
            raise ValueError(
                "attention_sinks (True) needs attn_implementation eager, flex_attention (on a GPU) or "
                "kernels-community/vllm-flash-attn3: sdpa has no sinks."
            )
        return super()._sdpa_can_dispatch(is_init_check)

    def _flash_attn_can_dispatch(self, flash_attn_version: int, is_init_check: bool = False) -> bool:
        if "chunked_attention" in self.config.layer_types:
            raise ValueError(
                "layer_types has chunked_attention, which needs attn_implementation eager, sdpa or flex_attention: "
                "flash attention has no chunks."
            )
        return super()._flash_attn_can_dispatch(flash_attn_version, is_init_check)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if attn_implementation in ("vllm", "vllm_mla"):
            self.check_vllm()
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def check_vllm(self) -> None:
        """Raise ValueError for what vLLM would leave out without a word: it brings its own attention and experts.

        Its experts are down(silu(gate(x)) * up(x)), its attention is full or has a sliding window.
        """
        config = self.config
        experts = "sparse" in config.mlp_layer_types and not config.mlp_bias  # with a bias it keeps ours
        unknown = {
            "attention_sinks": config.attention_sinks,
            "layer_types chunked_attention": "chunked_attention" in config.layer_types,
            f"hidden_act {config.hidden_act!r}": experts and config.hidden_act not in ("silu", "swish"),
            "gated_mlp False": experts and not config.gated_mlp,
            "experts_swiglu_limit": experts and config.experts_swiglu_limit is not None,
            "expert_input_scaling": experts and config.expert_input_scaling,
            "num_hash_layers": experts and config.num_hash_layers > 0,
            "moe_latent_size": experts and config.moe_latent_size is not None,
            "router_type 'dense'": experts and config.router_type == "dense",
            f"empty slots, which router_type {config.router_type!r} may leave": experts and not config.fills_slots,
            "eval_capacity_factor": experts and config.limits_experts,
        }
        if any(unknown.values()):
            names = ", ".join(name for name, needed in unknown.items() if needed)
            raise ValueError(
                f"vLLM's Transformers backend has no {names}: export the model to the family it came from, or serve "
                "it with Transformers."
            )

    def _grouped_mm_can_dispatch(self) -> bool:
        # Where it raises, eager is the default.
        dtype = torch.get_default_dtype()
        if dtype == torch.float64:
            raise ValueError(
                'grouped_mm computes no torch.float64: use experts_implementation="eager" or "batched_mm".'
            )
        read = "hidden_size" if self.config.moe_latent_size is None else "moe_latent_size"
        sizes = {name: getattr(self.config, name) for name in (read, "moe_intermediate_size")}
        if self.config.attention_type == "moa":
            sizes["num_key_value_heads times head_dim"] = self.config.num_key_value_heads * self.config.head_dim
        for name, size in sizes.items():
            if not takes_rows(size, dtype):
                raise ValueError(
                    f"{name} ({size}) in {dtype} is no multiple of {ROW_BYTES} bytes: use "
                    'experts_implementation="eager" or "batched_mm".'
                )
        return super()._grouped_mm_can_dispatch()

    def init_continuous_batching(self, *args, **kwargs):
        config, capped = self.config, self.config.attn_logit_softcapping
        lacks = {
            "no paged cache for latents (attention_type 'mla')": config.attention_type == "mla",
            "no chunks (layer_types has chunked_attention)": "chunked_attention" in config.layer_types,
            f"no cap on logits (attn_logit_softcapping {capped}) without flash attention": capped is not None
            and "flash" not in config._attn_implementation,
            "no batch of one request's own for eval_capacity_factor to count in": config.limits_experts,
        }
        for what, needed in lacks.items():
            if needed:
                raise ValueError(f"Continuous batching has {what}: use generate().")
        return super().init_continuous_batching(*args, **kwargs)
