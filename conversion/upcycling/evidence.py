"""What the dense model makes of texts: the inputs of its feed-forward networks, from one forward pass.

Shapes: T tokens, D hidden size, E experts.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from ...texts import texts
from ..files.checkpoint import read_text
from ..files.texts import cut, encoded
from ..files.tokenizer import load_tokenizer
from .dense import GraftDense, NativeDense


class Evidence:
    """The dense model on the calibration text and on the prompts, computed where first asked for.

    It is in memory, in float32, only while it reads.
    """

    def __init__(self, dense: NativeDense | GraftDense, calibration: Any, prompts: Any):
        self._dense, self._config, self._outputs = dense, dense.config, dense.outputs
        folder = dense.source.checkpoint.folder
        needs_tokens = calibration is not None or prompts is not None
        self._tokenizer = load_tokenizer(folder) if needs_tokens else None
        if needs_tokens and self._tokenizer is None:
            raise ValueError(f"{folder.name} has no tokenizer to read {calibration or prompts} with.")
        self._windows = []
        if calibration is not None:
            self._windows = cut(texts(str(calibration), self._tokenizer), self._tokenizer, self._config)
        self.prompts = [] if prompts is None else read_prompts(Path(prompts))

    @property
    def memory(self) -> int:
        """Bytes of memory that the dense model takes while it reads."""
        reads = self._windows or self.prompts
        return sum(4 * math.prod(output.shape) for output in self._outputs.values()) if reads else 0

    def inputs(self, layer: int) -> torch.Tensor:
        """The inputs of the layer's feed-forward network at the calibration tokens: [T, D], float32."""
        return self._text_inputs[layer]

    def prompt_states(self, layer: int) -> torch.Tensor:
        """The mean input of the layer's feed-forward network over each expert's prompts: [E, D]."""
        return self._prompt_inputs[layer]

    def prompt_embeddings(self) -> torch.Tensor:
        """The mean token embedding of each expert's prompts: [E, D]."""
        (table,) = self._outputs[self._dense.embedding].pieces()
        return torch.stack([table[torch.cat(self._encode(prompts))].float().mean(dim=0) for prompts in self.prompts])

    @cached_property
    def _text_inputs(self) -> dict[int, torch.Tensor]:
        read = self._read(self._windows)
        return {layer: torch.cat([states[layer] for states in read]) for layer in self._dense.layers}

    @cached_property
    def _prompt_inputs(self) -> dict[int, torch.Tensor]:
        windows = [(expert, ids) for expert, prompts in enumerate(self.prompts) for ids in self._encode(prompts)]
        states = self._read([ids for _, ids in windows])
        return {
            layer: torch.stack(
                [
                    torch.cat([s[layer] for (e, _), s in zip(windows, states, strict=True) if e == expert]).mean(dim=0)
                    for expert in range(len(self.prompts))
                ]
            )
            for layer in self._dense.layers
        }

    @torch.no_grad()
    def _read(self, windows: Iterable[torch.Tensor]) -> list[dict[int, torch.Tensor]]:
        """For each window of token ids [T] the input of each layer's feed-forward network, [T, D]."""
        model, state = self._dense.model(), {}
        for name, output in self._outputs.items():
            state[name] = torch.cat([in_float32(piece) for piece in output.pieces()]).reshape(output.shape)
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        del state
        seen: dict[int, torch.Tensor] = {}
        for layer in self._dense.layers:
            module = model.get_submodule(self._dense.path(layer))
            module.register_forward_pre_hook(
                lambda module, args, layer=layer: seen.update({layer: args[0].reshape(-1, args[0].shape[-1])})
            )
        model.eval()
        read = []
        for ids in windows:
            model.base_model(input_ids=ids[None], use_cache=False)
            read.append(dict(seen))
            seen.clear()
        return read

    def _encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        return encoded(texts, self._tokenizer, self._config)


def in_float32(piece: torch.Tensor) -> torch.Tensor:
    return piece.float() if piece.is_floating_point() else piece


def read_prompts(path: Path) -> list[list[str]]:
    """The prompts of each expert from a YAML or JSON list: a text, or a list of texts, for each."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts {path}.")
    try:
        said = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    prompts = [[entry] if isinstance(entry, str) else entry for entry in said] if isinstance(said, list) else []
    if not prompts or not all(isinstance(e, list) and e and all(isinstance(p, str) for p in e) for e in prompts):
        raise ValueError(f"{path} must be a list with the prompts of each expert: a text, or a list of texts.")
    for expert, own in enumerate(prompts):
        if own in prompts[:expert]:
            raise ValueError(
                f"{path} gives experts {prompts.index(own)} and {expert} the same prompts, so the same router row."
            )
    return prompts
