"""What a saved folder says about the model in it: its kind, weights, origin, training and results."""

import json
import math
import re
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..model import modeling_hf_moe, modeling_hf_moe_graft
from ..model.configuration_hf_moe import HfMoeConfig
from ..model.configuration_hf_moe_graft import HfMoeGraftConfig
from ..reading import PROCESSOR_FILES, auto_config, built
from ..routers import routed_experts
from ..sizes.counts import sizes

# model_type of hf_moe's own -> the module of its classes.
CODE = {HfMoeConfig.model_type: modeling_hf_moe, HfMoeGraftConfig.model_type: modeling_hf_moe_graft}

CONFIG, ADAPTER, RECORD, STATE = "config.json", "adapter_config.json", "training.json", "trainer_state.json"
INDEX = "model.safetensors.index.json"
RUN_FILE, METRICS = "run.json", "metrics.jsonl"  # what a run was told, and what it logged
MARKER = "<!-- Written by `hf-moe card`; without this line the file is yours and stays as it is. -->"
# What a checkpoint of each kind keeps its weights in.
WEIGHTS = {"adapter": "adapter_model.safetensors", "expert_rows": "expert_rows.safetensors"}
# Of a card's metadata, what holds for a model that is made of the model which it describes.
INHERITED = ("license", "license_name", "license_link", "datasets", "language")
# Routed experts in the names of tensors: hf_moe's and most families', without JetMoE's router; GraniteMoE's, JetMoE's.
ROUTED = re.compile(r"\.experts\.(?!router\.)|\.(block_sparse_moe|mlp)\.(input|output)_linear\.")
LAYER = re.compile(r"^(?!.*\.mtp_layers\.).*?\.\d+(?=\.)")  # what a name says of its layer

# Tensors that nobody trains by gradient: the selection bias; in expert rows, which rows they are.
BUFFERS = ("e_score_correction_bias", ".experts")


VARIES = 0.01  # experts a token


@dataclass(frozen=True)
class SavedModel:
    """A folder that `read_folder` has read. Sizes and tables are worked out from it, nothing else is looked at."""

    folder: Path
    kind: str  # "model", "adapter" (PEFT) or "expert_rows" (ESFT)
    shapes: dict[str, tuple[int, ...]]  # of the tensors in the safetensors files
    config: PreTrainedConfig | None = None  # of a model
    adapter: dict[str, Any] = field(default_factory=dict)  # adapter_config.json
    provenance: dict[str, Any] = field(default_factory=dict)  # of a converted model
    stages: list[dict[str, Any]] = field(default_factory=list)  # of training, the first one first
    results: dict[str, Any] = field(default_factory=dict)  # of the last stage
    log_history: list[dict[str, Any]] = field(default_factory=list)  # of the last stage

    @property
    def is_hf_moe(self) -> bool:
        return getattr(self.config, "model_type", None) in CODE

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer_config.json").is_file()

    @property
    def has_processor(self) -> bool:
        return any((self.folder / name).is_file() for name in PROCESSOR_FILES)

    @property
    def has_chat_template(self) -> bool:
        return (self.folder / "chat_template.jinja").is_file()

    @property
    def has_router_bias(self) -> bool:
        """Selection biases beside an adapter or expert rows, without which its router would choose otherwise."""
        return (self.folder / "router_bias.safetensors").is_file()

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter: of Transformers' own models, whose files may hold more than those."""
        architecture = getattr(transformers, (getattr(self.config, "architectures", None) or [""])[0], None)
        is_class = isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
        if not is_class or type(self.config) is PreTrainedConfig:  # another family's class under its own model_type
            return {name: shape for name, shape in self.shapes.items() if not name.endswith(BUFFERS)}
        with torch.device("meta"):
            model = built(architecture, f"{self.folder / CONFIG} describes no model", deepcopy(self.config))
        return {name: tuple(x.shape) for name, x in model.named_parameters()}

    @cached_property
    def sparse_layers(self) -> int:
        """How many layers have routed experts."""
        layers = (LAYER.match(name) for name in self.tensors if ROUTED.search(name))
        return len({layer[0] for layer in layers if layer})

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Total parameters, and how many of them one token meets: K of the E routed experts, and all the rest."""
        computed = self.is_hf_moe and self.config.architectures == ["HfMoeForCausalLM"]
        if computed and not self.config.needs_router_code:
            said = sizes(self.config, experts=self.measured_k and self.measured_k[0])
            return said["total_params"], said["active_params"]
        counts = {name: math.prod(shape) for name, shape in self.tensors.items()}
        total = sum(counts.values())
        if self.config is None:
            return total, total
        routed = sum(count for name, count in counts.items() if ROUTED.search(name))
        experts, top_k = routed_experts(self.config)
        if self.measured_k:
            top_k = self.measured_k[0]
        return total, total - routed + int(routed * top_k / experts)

    @cached_property
    def measured_k(self) -> tuple[float, float] | None:
        """Mean and standard deviation of a token's number of experts, if its router varies that and it was trained."""
        found = measured_k(self.log_history) if self.is_hf_moe else None
        if found is None or (self.config.fills_slots and not self.config.needs_router_code):
            return None
        # Of a router that was not run, the log alone tells; rounding leaves a little of a spread of 0.
        return found if found[1] > VARIES or abs(found[0] - self.config.num_experts_per_tok) > VARIES else None


def read_folder(folder: str | Path, provenance: dict[str, Any] | None = None) -> SavedModel:
    """Read what `folder` says. provenance: of a converted model whose config has no place for it.

    Raises FileNotFoundError where there is no saved model, ValueError for a damaged one; each names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist.")
    kinds = [kind for kind, file in WEIGHTS.items() if (folder / file).is_file()]
    if (folder / CONFIG).is_file() or not kinds:
        kinds = ["model"]
    config = read_config(folder) if kinds == ["model"] else None
    known = getattr(config, "provenance", None) or provenance or own_metadata(folder).get("provenance") or {}
    return SavedModel(
        folder=folder,
        kind=kinds[0],
        shapes=read_shapes(folder, WEIGHTS.get(kinds[0])),
        config=config,
        adapter=read_json(folder / ADAPTER),
        provenance=known,
        stages=stages_of(folder),
        results={**read_json(folder / "train_results.json"), **read_json(folder / "eval_results.json")},
        log_history=read_log(folder),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises a ValueError that names a damaged one."""
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(said).__name__}.")
    return said


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """The stages of training that the model in `folder` has been through, the first one first."""
    return read_json(folder / RECORD).get("stages", [])


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a saved model, of its own class where Transformers has one."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} does not exist; a model card needs a saved model.")
    said = read_json(folder / CONFIG)
    if not isinstance(said.get("model_type"), str | None):
        raise ValueError(f"{folder / CONFIG} says model_type={said['model_type']!r}, which is no str.")
    names = said.get("architectures") or []  # which Transformers takes as it is
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / CONFIG} says architectures={names!r:.100}, which is no list of names.")
    if said.get("model_type") in CONFIG_MAPPING:
        return auto_config(folder, trust_remote_code=False)
    return built(PreTrainedConfig.from_dict, f"{folder / CONFIG} is no valid config", said)


def read_shapes(folder: Path, only: str | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the folder's safetensors files, or in the file `only`, from their headers.

    Raises FileNotFoundError where there is none, and a ValueError that names the file which is cut short, is missing
    from a set of shards, or holds what their index does not say.
    """
    index = read_json(folder / INDEX).get("weight_map", {}) if only is None else {}
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of names to files.")
    files = [folder / only] if only else sorted(folder.glob("*.safetensors"))
    missing = sorted(set(index.values()) - {file.name for file in files})
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} does not exist, but {INDEX} names it.")
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; a model card needs a saved model.")
    shapes, where = {}, {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (not a dict: it has no __iter__)
                    shapes[name], where[name] = tuple(weights.get_slice(name).get_shape()), file.name
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or no safetensors file: {error}.") from None
    wrong = sorted(name for name in index.keys() | where.keys() if index.get(name) != where.get(name))
    if index and wrong:
        said, found = index.get(wrong[0], "nowhere"), where.get(wrong[0], "nowhere")
        raise ValueError(f"{folder / INDEX} says that {wrong[0]} is in {said}, but it is in {found}.")
    return shapes


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What the Trainer logged: its state in the folder, or else in the newest checkpoint."""
    checkpoints = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
    )
    states = (path / STATE for path in (folder, *reversed(checkpoints)))
    return read_json(next((state for state in states if state.is_file()), folder / STATE)).get("log_history", [])


def measured_k(log: list[dict[str, Any]]) -> tuple[float, float] | None:
    """What the Trainer logged of it last: on held-out text, or else in training."""
    for prefix in ("eval_", ""):
        names = [f"{prefix}router_experts_per_token", f"{prefix}router_experts_per_token_spread"]
        found = [entry for entry in log if names[0] in entry]
        if found:
            return tuple(found[-1][name] for name in names)
    return None


def card_of(folder: Path) -> ModelCard | None:
    """The folder's model card, None where it has none. Raises a ValueError where its metadata cannot be read."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except Exception as error:  # YAML's own, or huggingface_hub's
        raise ValueError(f"{path} has metadata that cannot be read: {error}") from None


def own_metadata(folder: Path) -> dict[str, Any]:
    """What a card that hf_moe wrote keeps for the next one."""
    card = card_of(folder)
    return card.data.get("hf_moe") or {} if card is not None and MARKER in card.text else {}


def inherited(folder: Path) -> dict[str, dict[str, Any]]:
    """Licence, data sets and languages that the model card in `folder` names, as {"source_card": ...}, or nothing."""
    try:
        card = card_of(folder)
    except ValueError as error:
        print(f"nothing is taken from the model card: {' '.join(str(error).split())}", file=sys.stderr)
        return {}
    said = {} if card is None else {name: texts_in(card.data.get(name)) for name in INHERITED}
    said = {name: value for name, value in said.items() if value}
    return {"source_card": said} if said else {}


def texts_in(value: Any) -> str | list[str] | None:
    """A text, or those in a list; not what YAML reads as something else, such as the language `no`, or a date."""
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    return value if isinstance(value, str) else None
