"""What the dense model makes of texts: the inputs of its feed-forward networks, from one forward pass.

Shapes: T tokens, D hidden size, E experts.
"""

import math
import reprlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from ...reading import positions
from ..files.checkpoint import read_text
from ..files.tokenizer import load_tokenizer
from .dense import GraftDense, NativeDense

MAX_TOKENS = 4096  # of the calibration text
WINDOW = 256  # tokens that are read together
CHARACTERS = 32  # of a token at most, on average
# Suffixes of row files, and what `datasets` calls them. Any other file is plain text.
ROW_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
        self._windows = [] if calibration is None else self._cut(read_texts(Path(calibration)))
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
        read = [self._tokenizer(text, verbose=False).input_ids for text in texts]
        encoded = [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in read]
        for text, ids in zip(texts, encoded, strict=True):
            if not len(ids):
                raise ValueError(f"The prompt {text!r} has no tokens.")
            if ids.max() >= self._config.vocab_size:
                raise ValueError(f"The tokenizer gives token {ids.max()}, the model knows {self._config.vocab_size}.")
        return encoded

    def _cut(self, texts: Iterable[str]) -> list[torch.Tensor]:
        """The first MAX_TOKENS tokens, in windows that do not reach over the end of a text."""
        windows, left = [], MAX_TOKENS
        size = positions(self._config, WINDOW)
        for text in texts:
            for ids in self._encode([text])[0][:left].split(size) if text.strip() else ():
                windows.append(ids)
                left -= len(ids)
            if not left:
                break
        if not windows:
            raise ValueError("The calibration text is empty.")
        return windows


def in_float32(piece: torch.Tensor) -> torch.Tensor:
    return piece.float() if piece.is_floating_point() else piece


def read_texts(path: Path) -> list[str]:
    """The texts of a file: the column "text" of .jsonl, .json, .csv or .parquet, else the whole file as one."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no calibration text {path}.")
    if path.suffix not in ROW_FILES:
        return [read_text(path, MAX_TOKENS * CHARACTERS)]
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = load_dataset(ROW_FILES[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error).splitlines() or ["it has no rows"]  # StopIteration says nothing
        raise ValueError(f"{path} cannot be read as rows: {reason[0]}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"{path} has the columns {', '.join(rows.column_names)}; the calibration text is in text.")
    texts = rows[:MAX_TOKENS]["text"]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{path}: row {index} of the column text is {reprlib.repr(text)}, which is no text.")
    return texts


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
