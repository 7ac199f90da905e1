"""`trace`: run text through a mixture of experts, count what its routers do, and write the report."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading import check_model, load, load_model
from ..reading import positions
from ..routers import captured, find_routers, routed_experts
from ..version import __version__
from .counts import RARE, RouterCounts, first_choice, followed_ids
from .experts import duplicates, expert_inputs, expert_tensors, output_similarity, weight_similarity
from .measures import favourite_tokens, router_numbers
from .pruning import plan, prune, token_losses
from .report import writing
from .saturation import saturation
from .texts import Batch, Domain, Rows, named_sources, padded, together

MAX_TOKENS = 100_000  # of each domain
WINDOW = 512  # tokens that are read together
BATCH_TOKENS = 1024
PASSAGES, PASSAGE_TOKENS = 4, 160  # domains that show a passage, and its length
FAVOURITES = 8  # token ids listed for each expert


def trace(
    model: str | Path | PreTrainedModel,
    data: str | Path | Sequence[str | Path] | Mapping[str, str | Path | Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    compare: Sequence[str | Path] = (),
    max_tokens: int | None = MAX_TOKENS,
    prune_tokens: int | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write report.html, figures/*.png and numbers.json on the routing of `model` to the new folder `out`.

    model: a folder, a Hub id, or a loaded causal language model with its `tokenizer`. data: text files, row files,
    folders or Hub data sets, each a domain; "NAME=SOURCE" gives a name, and so does a mapping of names to these, or to
    lists of texts. compare: checkpoints of the same model for router saturation. max_tokens: of each domain; None
    reads all. prune_tokens: how many tokens to spend on leaving out experts one by one, together; by default a quarter
    of those traced, 0 for none.

    Returns a summary: tokens, perplexity by domain, findings, files, seconds. Raises FileNotFoundError,
    FileExistsError, OSError or ValueError of one line: a dense model, a broken or empty text, a folder that is not
    empty, a full disk.
    """
    for name, value, least in (("max_tokens", max_tokens, 2), ("prune_tokens", prune_tokens, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    sources = named_sources([data] if isinstance(data, str | Path) else data)
    with writing(out) as write:
        watch, name = Stopwatch(), str(model)
        with watch("load"):
            for checkpoint in compare:  # a name that is wrong shows before the work, not after it
                check_model(checkpoint, trust_remote_code)
            if isinstance(model, PreTrainedModel):
                if tokenizer is None:
                    raise ValueError("A loaded model needs its tokenizer: give tokenizer=...")
                name = model.config._name_or_path or type(model).__name__
            else:
                model, tokenizer = load(model, trust_remote_code)
        with evaluating(model):
            run = Run(model, tokenizer, name, sources, max_tokens, progress)
            run.measure(watch, compare, prune_tokens, trust_remote_code)
        numbers = run.numbers() | {"seconds": watch.seconds}
        with watch("write"):
            findings = write(numbers)
    return summary(run, numbers, findings, Path(out).expanduser().resolve()) | {"seconds": watch.seconds}


def summary(run: "Run", numbers: dict[str, Any], findings: list, out: Path) -> dict[str, Any]:
    """What `trace` returns of the numbers."""
    layers = numbers["layers"]
    return {
        "model": run.name,
        "tokens": run.tokens,
        "perplexity": {domain["name"]: domain["perplexity"] for domain in numbers["domains"]},
        "layers": len(layers),
        "experts": sum(layer["experts"] for layer in layers),
        "dead_experts": sum(len(layer["dead"]) for layer in layers),
        "duplicate_experts": sum(len(group) for layer in layers for group in layer["duplicates"]),
        "pruning_trials": sum(len(layer["pruning"]) for layer in layers),
        "findings": findings,
        "report": str(out / "report.html"),
        "numbers": str(out / "numbers.json"),
        "figures": str(out / "figures"),
    }


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Stopwatch:
    """Seconds that each named part took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start, 3)


class Run:
    """One model and the texts it reads; each method adds to what is known."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        sources: dict[str, str | Rows],
        max_tokens: int | None,
        progress: bool,
    ):
        self.model, self.tokenizer, self.name, self.progress = model, tokenizer, name, progress
        self.config = model.config.get_text_config()
        self.routers = find_routers(model)
        if not self.routers:
            raise ValueError(
                f"{name} is a dense model ({self.config.model_type}): it has no router to trace. hf-moe upcycle makes "
                "a mixture of experts of it."
            )
        self.top_k = routed_experts(self.config)[1]
        window = positions(self.config, WINDOW)
        self.domains = [Domain(domain, source, tokenizer, window, max_tokens) for domain, source in sources.items()]
        self.counts: dict[str, RouterCounts] = {}
        self.logits: dict[str, int] = {}  # router -> how many it has: at times more than experts
        self.losses = [(0.0, 0)] * len(self.domains)  # sum and number
        self.passages: list[dict] = []
        self.found: dict[str, dict] = {}  # router -> similarities, duplicates, pruning
        self.saturations: list[dict] = []

    def measure(
        self, watch: "Stopwatch", compare: Sequence[str | Path], prune_tokens: int | None, trust_remote_code: bool
    ) -> None:
        """All that is to be known, part by part."""
        with watch("read"):
            self.count_tokens()
        with watch("compare"):  # first: a checkpoint of another model would be refused after all the work
            for checkpoint in compare:
                self.compare_routing(checkpoint, trust_remote_code)
        with watch("trace"):
            self.count_routing()
            self.show_passages()
        with watch("experts"):
            self.compare_experts()
        with watch("prune"):
            self.prune_experts(self.tokens // 4 if prune_tokens is None else prune_tokens)

    def bar(self, what: str, tokens: int) -> tqdm:
        return tqdm(total=tokens, desc=what, unit="tok", unit_scale=True, disable=not self.progress)

    # ---- reading ----

    def count_tokens(self) -> None:
        """Read all texts once, so that their faults show before the model runs, and choose the token ids to follow."""
        self.counts_NV = torch.stack([domain.count(self.config.vocab_size) for domain in self.domains])
        self.tokens = int(self.counts_NV.sum())
        self.followed = followed_ids(self.counts_NV.sum(dim=0))
        place_V = torch.full((self.config.vocab_size,), -1)
        place_V[self.followed] = torch.arange(len(self.followed))
        self.place_V = place_V.to(self.model.device)

    @torch.inference_mode()
    def count_routing(self) -> None:
        """One forward over everything: what each router does, and how well the model predicts each domain."""
        with self.bar("trace", self.tokens) as bar:
            for number, domain in enumerate(self.domains):
                for batch in domain.batches(BATCH_TOKENS):
                    with captured(self.routers, self.top_k) as routings:
                        logits = self.forward(batch).logits
                    self.add(number, batch, logits, routings)
                    bar.update(int(batch.mask.sum()))
        self.routers = {name: self.routers[name] for name in self.counts}  # those that a forward uses

    def forward(self, batch: Batch):
        ids, mask = (x.to(self.model.device) for x in batch)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def add(self, domain: int, batch: Batch, logits: torch.Tensor, routings: dict) -> None:
        kept_T = batch.mask.flatten().nonzero().flatten().to(logits.device)
        read_T = self.place_V[batch.ids.to(logits.device).flatten()[kept_T]]
        predicted_T = self.place_V[logits.argmax(dim=-1).flatten()[kept_T]]
        losses = token_losses(logits, batch)
        total, number = self.losses[domain]
        self.losses[domain] = (total + losses.double().sum().item(), number + len(losses))
        for name, routing in routings.items():
            if name not in self.counts:
                self.logits[name] = routing.logits_TE.shape[-1]
                sizes = routing.experts, len(self.domains), len(self.followed)
                self.counts[name] = RouterCounts(*sizes, routing.logits_TE.device)
            self.counts[name].add(routing, self.routers[name], domain, kept_T, read_T, predicted_T)

    @torch.inference_mode()
    def show_passages(self) -> None:
        """The first tokens of the first domains, each with its first expert in every layer."""
        for domain in self.domains[:PASSAGES]:
            ids = next(iter(domain.windows()))[:PASSAGE_TOKENS]
            with captured(self.routers, self.top_k) as routings:
                self.forward(padded([ids]))
            experts = [first_choice(routing).tolist() for routing in routings.values()]
            texts = [self.tokenizer.decode([token]) for token in ids]
            self.passages.append({"domain": domain.name, "tokens": texts, "experts": experts})

    # ---- experts ----

    def sample(self, tokens: int) -> list[Batch]:
        """About so many tokens, as many of each domain."""
        rows, share = [], -(-tokens // len(self.domains))
        for domain in self.domains:
            left = share
            for ids in domain.windows():
                rows.append(ids[:left])
                left -= len(rows[-1])
                if left <= 0:
                    break
        return list(together(rows, BATCH_TOKENS))

    def compare_experts(self) -> None:
        inputs = expert_inputs(self.model, self.routers, self.sample(WINDOW)[-1])
        bar = tqdm(self.counts.items(), desc="experts", unit="layer", disable=not self.progress)
        for name, counts in bar:
            experts = counts.chosen_NE.shape[-1]
            tensors = expert_tensors(self.model, name, experts)
            weights = weight_similarity(tensors) if tensors else None
            outputs = None
            if name in inputs:
                module = self.model.get_submodule(name.rpartition(".")[0]).experts
                outputs = output_similarity(module, inputs[name], experts)
            self.found[name] = {
                "weight_similarity": None if weights is None else weights.tolist(),
                "output_similarity": None if outputs is None else outputs.tolist(),
                "duplicates": duplicates((weights, outputs)),
                "pruning": [],
            }

    def prune_experts(self, budget: int) -> None:
        experts = {name: counts.chosen_NE.shape[-1] for name, counts in self.counts.items()}
        chosen = {
            name: counts.chosen_NE.sum(dim=0).cpu()
            for name, counts in self.counts.items()
            if counts.mean_k < experts[name]  # where every expert is chosen nothing can take its place
        }
        if not chosen or not budget:
            return
        tokens, tried = plan(budget, chosen)
        if not tried:  # the budget is less than one expert takes
            return
        batches = self.sample(tokens)
        tokens = sum(int(batch.mask.sum()) for batch in batches)
        if sum(int(batch.mask[:, 1:].sum()) for batch in batches) < 2:  # predictions, for a mean and its error
            return
        with self.bar("prune", tokens * len(tried)) as bar:
            costs = prune(self.model, self.routers, self.logits, tried, batches, bar.update)
        for (name, expert), cost in costs.items():
            entry = {"expert": expert, "loss_change": cost.mean, "standard_error": cost.error}
            self.found[name]["pruning"].append(entry)
        self.prune_sample = tokens

    # ---- checkpoints ----

    def compare_routing(self, checkpoint: str | Path, trust_remote_code: bool) -> None:
        other = load_model(checkpoint, trust_remote_code)
        batches = (batch for domain in self.domains for batch in domain.batches(BATCH_TOKENS))
        try:
            with self.bar(f"compare {Path(checkpoint).name}", self.tokens) as bar:
                shares = saturation(self.model, other, self.top_k, batches, bar.update)
        except ValueError as error:
            raise ValueError(f"{checkpoint} cannot be compared with {self.name}: {error}.") from error
        self.saturations.append({"checkpoint": str(checkpoint), "layers": list(shares.values())})

    # ---- the result ----

    def numbers(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        labels = layer_labels(self.counts)
        layers = []
        for name, counts in self.counts.items():
            favourites = [
                [(self.tokenizer.decode([int(self.followed[place])]), share, times) for place, share, times in found]
                for found in favourite_tokens(counts.read_VE.cpu(), RARE, FAVOURITES)
            ]
            layers.append(
                {"router": name, "label": labels[name]}
                | router_numbers(counts, RARE)
                | {"favourite_tokens": favourites}
                | self.found[name]
            )
        domains = [
            {
                "name": domain.name,
                "source": domain.said,
                "tokens": int(counts_V.sum()),
                "perplexity": torch.tensor(total / number).exp().item() if number else None,
            }
            for domain, counts_V, (total, number) in zip(self.domains, self.counts_NV, self.losses, strict=True)
        ]
        return {
            "hf_moe_version": __version__,
            "model": self.name,
            "model_type": self.config.model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens": self.tokens,
            "followed_token_ids": len(self.followed),
            "pruning_tokens": getattr(self, "prune_sample", 0),
            "domains": domains,
            "layers": layers,
            "saturation": self.saturations,
            "passages": self.passages,
        }


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Router -> the number of its layer, with the part of the layer that it routes where there are several."""
    numbers = {name: next(iter(re.findall(r"\.(\d+)(?=\.)", name)), name) for name in names}
    return {
        name: number if list(numbers.values()).count(number) == 1 else f"{number} {name.split('.')[-2]}"
        for name, number in numbers.items()
    }
