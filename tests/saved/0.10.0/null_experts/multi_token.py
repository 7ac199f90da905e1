"""Multi-token prediction (MTP): modules that predict tokens further ahead, one after the other.

DeepSeek-V3, https://arxiv.org/abs/2412.19437, 2.2. Shapes: B batch, S sequence, D hidden size, M modules.
Module k (from 1) has an entry for each position i; there it reads token i + k and predicts token i + k + 1.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .configuration_hf_moe import HfMoeConfig
from .host import CACHE, record
from .norms import make_norm
from .router import HfMoeRouter
from .speculation import check_batches, check_lengths, check_processors, check_speculation, speculative_decoding


class HfMoeMultiTokenLayer(nn.Module):
    """h^k_i = norm(block(W [RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1}_i)])) (eq. 21-22); h^0 is the decoder's output.

    `block` is a decoder layer like the model's last one. The embedding is that of the model, and so is the head that
    reads h^k. Where the paper leaves it open, this is what DeepSeek-V3's released weights and Transformers do: the
    embedding comes first in the projection, and `norm`, the one before the head, also precedes the next module.
    """

    def __init__(self, config: HfMoeConfig, block_class: type[nn.Module], depth: int):
        super().__init__()
        block = block_class(config, config.num_hidden_layers - 1)
        self.enorm = make_norm(config, config.hidden_size)
        self.hnorm = make_norm(config, config.hidden_size)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = make_norm(config, config.hidden_size)
        block.self_attn.layer_idx = depth - 1  # in a cache of the modules alone
        for router in routers_of(block):
            router.layer_idx += depth  # hashes unlike the last layer

    def forward(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, S, D] from h^{k-1} and the embeddings of the tokens k places on, both [B, S, D]."""
        joined = torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1)
        return self.norm(self.block(self.eh_proj(joined), **kwargs))


def shifted(x: torch.Tensor, places: int, dim: int = 1, fill: int = 0) -> torch.Tensor:
    """y_i = x_{i + places} along `dim`; `fill` where that is beyond the end."""
    end = [*x.shape]
    end[dim] = places
    return torch.cat((x, x.new_full(end, fill)), dim=dim).narrow(dim, places, x.shape[dim])


def reach(position_ids: torch.Tensor, token_mask: torch.Tensor | None, places: int) -> torch.Tensor:
    """[B, S] True where the token `places` on exists, belongs to the same document, and neither is padding.

    A document begins where position_ids [B, S] do not count on; `token_mask` [B, S] is 0 on padding.
    """
    document = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=1)
    reached = shifted(document, places, fill=-1) == document
    if token_mask is not None:
        reached = reached & token_mask.bool() & shifted(token_mask, places).bool()
    return reached


def predict_ahead(
    layers: nn.ModuleList,
    hidden_states: torch.Tensor,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    token_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    **kwargs,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Every module over whole sequences: their outputs, M times [B, S, D], and M + 1 masks [B, S].

    Mask k (from 1) tells which entries of module k count: those whose token i + k is in the same document. Mask k + 1
    tells which of them have a target. The others are computed and read by none of these: attention looks backward.
    """
    position_ids = position_ids.expand(len(hidden_states), -1)
    masks = tuple(reach(position_ids, token_mask, places) for places in range(1, len(layers) + 2))
    outputs = []
    for depth, (layer, mask) in enumerate(zip(layers, masks, strict=False), start=1):
        hidden_states = layer(
            hidden_states,
            shifted(inputs_embeds, depth),
            position_ids=position_ids,
            token_mask=mask,
            input_ids=None if input_ids is None else shifted(input_ids, depth),
            **kwargs,
        )
        outputs.append(hidden_states)
    return tuple(outputs), masks


class HfMoeMultiToken:
    """What multi-token prediction adds to a causal language model: the loss, new modules, self-speculation."""

    def mtp_targets(self, outputs, labels: torch.Tensor) -> list[torch.Tensor]:
        """For each module the label [B, S] that each of its entries predicts, -100 where there is none to count."""
        masks = enumerate(outputs.mtp_masks[1:], start=2)
        return [
            shifted(labels, places, fill=-100).masked_fill(~mask.to(labels.device), -100) for places, mask in masks
        ]

    def mtp_token_losses(self, outputs, labels: torch.Tensor) -> list[torch.Tensor]:
        """Cross-entropy of each module's entries with their targets, M times [B, S]; 0 where there is no target."""
        losses = []
        for hidden_states, targets in zip(outputs.mtp_hidden_states, self.mtp_targets(outputs, labels), strict=True):
            logits = self.project(hidden_states).float()
            losses.append(nn.functional.cross_entropy(logits.mT, targets.to(logits.device), reduction="none"))
        return losses

    def mtp_loss(
        self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """1 / M sum_k 1 / N sum_i CE^k_i, not yet weighted by mtp_loss_coef (eq. 24-25), from the decoder's outputs.

        The decoder gives them if asked with `output_mtp_hidden_states`. N is the number of targets of the main loss:
        `num_items_in_batch`, or without it those in `labels` [B, S], where -100 is ignored.
        """
        items = (labels[:, 1:] != -100).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        total = torch.stack([losses.sum() for losses in self.mtp_token_losses(outputs, labels)]).mean()
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing = sorted(key for key in loading_info.missing_keys if ".mtp_layers." in key)
        if missing:
            raise ValueError(
                f"num_mtp_layers is {self.config.num_mtp_layers}, but the checkpoint lacks {len(missing)} of their "
                f"weights, such as {missing[0]}: load it with fewer, and add new ones with model.add_mtp_layers()."
            )

    def recorded_drafts(self, generation_config) -> int:
        return len(self.model.mtp_layers) if generation_config.use_mtp else 0

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        check_batches(self.config, generation_mode, generation_config)
        if generation_config.use_mtp:
            check_speculation(self, generation_mode, generation_config, generation_mode_kwargs)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _assisted_decoding(self, input_ids, generation_config, inputs_tensor=None, **kwargs):
        check_lengths(self.config, input_ids.shape[1], generation_config.max_length)
        if not generation_config.use_mtp:
            check_processors(kwargs["logits_processor"], kwargs["stopping_criteria"])
            kwargs["inputs_tensor"] = inputs_tensor
            return super()._assisted_decoding(input_ids, generation_config=generation_config, **kwargs)
        names = ("assistant_model", "assistant_tokenizer", "tokenizer", "synced_gpus")
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
        kwargs["cache"] = kwargs.pop(CACHE)
        return speculative_decoding(self, input_ids, generation_config=generation_config, **kwargs)

    def per_mtp_router(self, items: Iterable) -> list:
        """The items, one for each module, each as often as that module has routers."""
        return [item for layer, item in zip(self.model.mtp_layers, items, strict=False) for _ in routers_of(layer)]

    @torch.no_grad()
    def add_mtp_layers(self, count: int = 1) -> None:
        """Append `count` modules to a loaded model: blocks and norms copied from its last ones, new projections.

        Train them: until then they foresee little. mtp_loss_coef in the configuration weighs their loss. Raises
        ValueError where the last layer can't be copied: quantised, on the meta device, with adapters.
        """
        if count < 1:
            raise ValueError(f"add_mtp_layers takes a count of at least 1, not {count}.")
        decoder, last = self.model, self.model.layers[-1]
        if getattr(self, "hf_quantizer", None) is not None or any(x.is_meta for x in last.parameters()):
            raise ValueError("add_mtp_layers copies the last layer, which is quantised or not in memory.")
        if hasattr(self, "peft_config"):
            raise ValueError("add_mtp_layers copies the last layer, which has adapters: call it before adapters come.")
        like = torch.zeros_like if self.config.rms_norm_unit_offset else torch.ones_like
        neutral, hidden_size = like(decoder.norm.weight), self.config.hidden_size
        for depth in range(len(decoder.mtp_layers) + 1, len(decoder.mtp_layers) + count + 1):
            projection = neutral.new_empty(hidden_size, 2 * hidden_size).normal_(std=self.config.initializer_range)
            state = {"enorm.weight": neutral.clone(), "hnorm.weight": neutral.clone(), "eh_proj.weight": projection}
            state |= {"norm.weight": decoder.norm.weight.clone()}
            state |= {f"block.{name}": tensor.clone() for name, tensor in last.state_dict().items()}
            with torch.device("meta"):
                layer = HfMoeMultiTokenLayer(self.config, type(last), depth)
            layer.load_state_dict(state, assign=True)
            record(decoder, routers_of(layer), "router_")
            decoder.mtp_layers.append(layer.train(self.training))
        self.config.num_mtp_layers = len(decoder.mtp_layers)
        self._no_split_modules.add("HfMoeMultiTokenLayer")


def routers_of(module: nn.Module) -> list[HfMoeRouter]:
    return [part for part in module.modules() if isinstance(part, HfMoeRouter)]
