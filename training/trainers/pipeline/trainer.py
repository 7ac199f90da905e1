"""A trainer whose model is cut into the stages of a pipeline: what changes of a step, an evaluation and a checkpoint.

A step's forwards and backwards are the schedule's, over all of its micro-batches at once. The balance losses of a
stage's routers join the graph in that stage; all else of the loss is the last stage's. What is counted is counted over
the processes that have the same stage and other rows; what is logged is put together from all stages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, TrainingArguments

from hf_moe.reading import whole_model
from hf_moe.routers import captured, find_routers

from ...balance.counts import count_tokens, summed
from ...balance.metrics import FIRST_LOSS
from ...balance.multi_token import looking_ahead
from ...balance.step import RandomState, Step, add_all
from ...host import OPTIMIZER_NAME, SCHEDULER_NAME, bare_optimizer, leave_whole, prepared_inputs, share_rows
from ..sft_trainer import MoeSFTTrainer
from .gathering import names_by_group, on_first, own_state, own_tensors, whole_state
from .parts import Part, cut
from .passes import Passes
from .schedules import SCHEDULES, process_of


class WithLoss(torch.autograd.Function):
    """Hidden states as they are; backward, the loss beside them gets a gradient of 1."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return hidden_states.clone()  # a view could not be detached in place, as the schedules do

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, ctx.saved_tensors[0]


class Whole(NamedTuple):
    """Of a model, before it is cut: its routers' names, and its weights without what is in them."""

    routers: list[str]
    weights: dict[str, nn.Parameter]


class Pipeline:
    """The pipeline of this process, which has `parts`: `stages` are its processes, `rows` those with its stages."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments):
        size, name = args.pipeline_parallel_size, args.pipeline_schedule
        schedule, processes = SCHEDULES[name], args.world_size
        check_model(model)
        self.size = size
        # Accelerate's names for processes with other rows, and with the same.
        names = ("dp_replicate", "tp")
        self.mesh = init_device_mesh(args.device.type, (processes // size, size), mesh_dim_names=names)
        self.rows, self.stages = (self.mesh[name].get_group() for name in names)
        self.place, stages = dist.get_rank(self.stages), size * schedule.stages
        self.last = process_of(stages - 1, size, schedule.folded)
        weights = {name: nn.Parameter(x.detach().to("meta"), x.requires_grad) for name, x in model.named_parameters()}
        self.whole = Whole(list(find_routers(model)), weights)
        own = [stage for stage in range(stages) if process_of(stage, size, schedule.folded) == self.place]
        states = model.config.get_text_config().hidden_size, next(model.base_model.parameters()).dtype
        self.parts = cut(model, stages, own)
        back = self.group([0, self.size - 1])
        self.passes = Passes(self.parts, schedule, *states, args.device, self.stages, back)
        self.embeddings = self.with_embedding(model)
        self.check_routers(model)

    def group(self, places: list[int]) -> Any:
        """The processes at these places of this pipeline. To be called by all processes of all pipelines."""
        groups = [dist.new_group([row[place] for place in places]) for row in self.mesh.mesh.tolist()]
        return groups[dist.get_rank(self.rows)]

    def with_embedding(self, model: PreTrainedModel) -> tuple[nn.Parameter, Any] | None:
        """The embedding's weight, and the two processes that have it, of the first stage and the last; else None."""
        has_it = isinstance(model.get_input_embeddings(), nn.Embedding)
        both = [None] * self.size
        dist.all_gather_object(both, has_it, group=self.stages)
        if sum(both) < 2:
            return None
        group = self.group([0, self.last])
        return (model.get_input_embeddings().weight, group) if has_it else None

    def check_routers(self, model: PreTrainedModel) -> None:
        """Raises ValueError, on all processes, where one has no router and another has: they are balanced at once."""
        have = [None] * self.size
        dist.all_gather_object(have, bool(find_routers(model)), group=self.stages)
        if any(have) and not all(have):
            raise ValueError(
                f"pipeline_parallel_size is {self.size}, and process {have.index(False)} of a pipeline would have no "
                "router, only dense layers: give a smaller size, or another schedule."
            )

    @property
    def has_embedding_first(self) -> bool:
        """Whether this process is the one whose embedding counts, where two have it."""
        return self.embeddings is None or self.place == 0

    @property
    def many_rows(self) -> int:
        return dist.get_world_size(self.rows)

    def sum_over_rows(self, x: torch.Tensor) -> torch.Tensor:
        if self.many_rows > 1:
            dist.all_reduce(x, group=self.rows)
        return x

    def gathered_over_rows(self, x: torch.Tensor) -> torch.Tensor:
        """As Accelerate's gather: one after the other, of scalars a vector."""
        if self.many_rows == 1:
            return x
        x = x.reshape(1) if x.dim() == 0 else x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.many_rows)]
        dist.all_gather(parts, x, group=self.rows)
        return torch.cat(parts)

    def from_last(self, value: Any) -> Any:
        """What the process with the last stage has, on all."""
        held = [value]
        dist.broadcast_object_list(held, group_src=self.last, group=self.stages)
        return held[0]

    def of_all_stages(self, own: dict) -> dict:
        every = [None] * self.size
        dist.all_gather_object(every, own, group=self.stages)
        return {name: value for part in every for name, value in part.items()}


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError for routers that a pipeline cannot train."""
    for name, router in find_routers(model).items():
        if router.policy:
            raise ValueError(
                f"pipeline_parallel_size is above 1, but {name} is a policy (reinforce), which learns from a loss "
                "that only the last stage knows: train with --accelerate fsdp2."
            )


class PipelineMixin:
    """Before a class with MoeTrainerMixin: its model is cut, and `args` say in how many stages."""

    def __init__(self, *, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any) -> None:
        self.pipeline = Pipeline(model, args)
        self.taken: list[torch.Tensor] = []  # losses of the step's micro-batches, for the host to add up
        self.part: Part | None = None  # at work
        self.batches: list[dict] = []
        self.items = None
        self.steps: dict[int, Step] = {}  # stage -> what is known of it
        self.of_all: dict[bool, dict[str, int]] = {}  # training or not: router -> E, of those that a forward uses
        super().__init__(model=model, args=args, **kwargs)
        share_rows(self.accelerator, self.pipeline.mesh)
        leave_whole(self.accelerator, self.clip)
        for part in self.pipeline.parts:
            part.run = self.run_part

    # ---- who has which rows ----

    def get_tp_size(self) -> int:
        """How many processes see the same rows: what the host divides by."""
        return self.pipeline.size

    @property
    def row_processes(self) -> int:
        return self.pipeline.many_rows

    def sum_over_rows(self, x: torch.Tensor) -> torch.Tensor:
        return self.pipeline.sum_over_rows(x)

    @contextmanager
    def among_rows(self) -> Iterator[None]:
        """What is gathered meanwhile is gathered from the processes that have this one's stages, and other rows."""
        gather, self.accelerator.gather = self.accelerator.gather, self.pipeline.gathered_over_rows
        try:
            yield
        finally:
            self.accelerator.gather = gather

    def share_scale(self, num_items_in_batch) -> float:
        """Of the routers of one stage, whose mean counts as their number."""
        routers = self.routers_of[self.part.stage], self.pipeline.whole.routers
        here, everywhere = (len(self.running(names)) for names in routers)
        return super().share_scale(num_items_in_batch) * here / everywhere

    def running(self, routers: list[str]) -> list[str]:
        """Those of a forward in training, in which MTP modules may stand still."""
        return [name for name in routers if self.balance.multi_token is not None or ".mtp_layers." not in name]

    def find_routing(self) -> None:
        super().find_routing()
        modules = {part.stage: set(part.modules()) for part in self.pipeline.parts}
        self.routers_of = {
            stage: [name for name, router in self.routers.items() if router.module in own]
            for stage, own in modules.items()
        }

    # ---- the step ----

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """A micro-batch's loss; with the first, all of the step go forward and back."""
        if not self.taken:
            self.taken = self.run_step(model, num_items_in_batch)
        return self.taken.pop(0)

    def run_step(self, model: nn.Module, num_items_in_batch) -> list[torch.Tensor]:
        model.train()
        self.selection_bias.restore()
        self.begin_batches(self.step_batches(), num_items_in_batch)
        if self.balances_step:
            self.count_stages()
        self.pipeline.passes.forward_and_back(self.shapes)
        self.sum_gradients()
        dist.all_reduce(self.losses, group=self.pipeline.stages)
        self.step = self.assembled()
        self.batches, self.steps = [], {}
        return list(self.losses.unbind())

    def begin_batches(self, batches: list[dict], num_items_in_batch) -> None:
        self.batches, self.items = batches, num_items_in_batch
        inputs = [self.model_inputs(batch) for batch in batches]
        self.steps = {part.stage: Step(inputs) for part in self.pipeline.parts}
        self.states: dict[tuple[int, int], RandomState] = {}
        self.counting = False
        self.losses = torch.zeros(len(batches), device=self.args.device)
        self.experts_here: dict[int, dict[str, int]] = {}
        self.sizes_here: dict[int, dict] = {}
        self.shapes = [tuple(batch["input_ids"].shape) for batch in batches]

    def count_stages(self) -> None:
        """Before a step: who is chosen in all of its micro-batches, of all processes with these stages."""
        if self.balance.needs_forward:
            self.counting, self.counts = True, {part.stage: [] for part in self.pipeline.parts}
            self.pipeline.passes.forward(self.shapes)
            self.counting = False
            counted = {stage: add_by_router(counts) for stage, counts in self.counts.items()}
        else:
            tokens = add_all([count_tokens(self.model_inputs(batch)) for batch in self.batches])
            counted = {stage: dict.fromkeys(self.running(names), tokens) for stage, names in self.routers_of.items()}
        for stage, counts in counted.items():
            if counts:
                self.steps[stage].counted = summed(counts, self.args.device, self.sum_over_rows)

    def run_part(self, part: Part, received: torch.Tensor, number: int) -> torch.Tensor:
        """One stage's forward of a micro-batch: hidden states, or of the last stage the loss."""
        batch = self.batches[number]
        self.part, self.step = part, self.steps[part.stage]
        weights = list(part.parameters())[:1]
        if self.counting:
            self.states[part.stage, number] = RandomState(weights)
        elif (state := self.states.pop((part.stage, number), None)) is not None:
            state.restore()
        with part.in_place(received, batch["input_ids"]), self.among_rows():
            if self.counting:
                return self.count_part(part, batch)
            output = self.last_part(batch, number) if part.last else self.middle_part(batch, number)
        if self.routers_of[part.stage]:
            self.experts_here[part.stage] = self.experts[self.model.training]
            self.sizes_here[part.stage] = self.selection_bias.sizes
        return output

    def decoder_inputs(self, batch: dict) -> dict:
        return {**self.model_inputs(batch), "use_cache": False}

    def count_part(self, part: Part, batch: dict) -> torch.Tensor:
        ahead = self.balance.multi_token if part.last else None
        with (
            captured(self.routers, self.balance.top_k) as routings,
            looking_ahead(ahead),
            self.accelerator.autocast(),
        ):
            states = self.moe.base_model(**self.decoder_inputs(batch)).last_hidden_state
        if routings:
            layers = self.balance.read(routings, self.model_inputs(batch))
            self.counts[part.stage].append(self.balance.count(layers))
        return states.to(self.pipeline.passes.dtype).contiguous()

    def middle_part(self, batch: dict, number: int) -> torch.Tensor:
        with captured(self.routers, self.balance.top_k) as routings, self.accelerator.autocast():
            states = self.moe.base_model(**self.decoder_inputs(batch)).last_hidden_state
        states = states.to(self.pipeline.passes.dtype).contiguous()
        losses = self.see_routing(routings, self.model_inputs(batch))
        if not (self.model.training and losses):
            return states
        loss = self.share_scale(self.items) * self.balance.weighted(losses) / self.loss_parts
        self.losses[number] += loss.detach()
        return WithLoss.apply(states, loss)

    def last_part(self, batch: dict, number: int) -> torch.Tensor:
        if not self.model.training:
            loss, _, _ = super().prediction_step(self.model_wrapped, dict(batch), prediction_loss_only=True)
            self.losses[number] += loss.detach()
            return loss
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, dict(batch), num_items_in_batch=self.items) / self.loss_parts
        self.losses[number] += loss.detach()
        return loss

    def count_step(self, model, forward) -> None:
        """The stages have been counted."""

    @property
    def loss_parts(self) -> int:
        """What the host divides a micro-batch's loss by."""
        return 1 if self.scales_loss(self.items) else len(self.batches)

    def assembled(self) -> Step:
        """What is known of all stages: rows of all routers, in the whole model's order, 0 for those elsewhere."""
        step = Step([])
        step.losses = list(self.losses.unbind())
        step.mtp_loss = sum(x.mtp_loss for x in self.steps.values())
        observed = [x.observed for x in self.steps.values() if x.observed is not None]
        if observed:
            step.observed = torch.cat(observed)
            self.selection_bias.sizes = {kind: size for x in self.sizes_here.values() for kind, size in x.items()}
        step.rows = self.rows_of_all({stage: x.rows for stage, x in self.steps.items()}, training=True)
        return step

    def rows_of_all(self, rows: dict[int, torch.Tensor | None], training: bool) -> torch.Tensor | None:
        """From the rows of each stage here."""
        if not self.pipeline.whole.routers:
            return None
        if training not in self.of_all:
            here = {name: count for experts in self.experts_here.values() for name, count in experts.items()}
            ran = self.pipeline.of_all_stages(here)
            self.of_all[training] = {name: ran[name] for name in self.pipeline.whole.routers if name in ran}
        every, width = self.of_all[training], FIRST_LOSS + len(self.balance.coefficients)
        found = {}
        for stage, experts in self.experts_here.items():
            pieces = rows[stage].split([width + count for count in experts.values()])
            found |= dict(zip(experts, pieces, strict=True))
        self.experts[training] = every
        zeros = {name: self.losses.new_zeros(width + count) for name, count in every.items() if name not in found}
        return torch.cat([(found | zeros)[name] for name in every])

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Over the two stages that have the embedding, then the mean over processes with other rows."""
        if self.pipeline.embeddings is not None:
            weight, group = self.pipeline.embeddings
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad, group=group)
        if self.row_processes == 1:
            return
        for x in self.model.parameters():
            if x.requires_grad:
                x.grad = torch.zeros_like(x) if x.grad is None else x.grad
                self.pipeline.sum_over_rows(x.grad.div_(self.row_processes))

    @torch.no_grad()
    def clip(self, parameters, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """By the norm of the gradients of all stages, in which an embedding that two have counts once."""
        trained = [x for x in parameters if x.grad is not None]
        twice = None if self.pipeline.has_embedding_first else self.pipeline.embeddings[0]
        norm = nn.utils.get_total_norm([x.grad for x in trained if x is not twice])
        squared = norm.to(self.args.device).square()
        dist.all_reduce(squared, group=self.pipeline.stages)
        nn.utils.clip_grads_with_norm_(trained, max_norm, squared.sqrt())
        return squared.sqrt()

    def begin_routing(self) -> None:
        super().begin_routing()
        # A zero bubble schedule takes gradients of inputs and of weights apart, which copies know nothing of.
        self.copies = None

    # ---- evaluation and logs ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone, through all stages."""
        self.begin_batches([prepared_inputs(self, inputs)], None)
        kept, self.evaluated = self.evaluated, []
        self.pipeline.passes.forward(self.shapes)
        rows = dict(zip(self.experts_here, self.evaluated, strict=True))
        whole = self.rows_of_all(rows, training=False)
        self.evaluated = kept if whole is None else [*kept, whole]
        dist.all_reduce(self.losses, group=self.pipeline.stages)
        return self.losses[0], None, None

    def evaluation_loop(self, *args, **kwargs):
        with self.among_rows():
            return super().evaluation_loop(*args, **kwargs)

    def present_biases(self) -> dict[str, torch.Tensor]:
        return self.pipeline.of_all_stages({name: x.cpu() for name, x in super().present_biases().items()})

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        self._metrics, self._total_train_tokens = self.pipeline.from_last((self._metrics, self._total_train_tokens))
        super().log(logs, *args, **kwargs)

    # ---- checkpoints: those of one process ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self.groups = names_by_group(optimizer, self.model, list(self.pipeline.whole.weights), self.pipeline.stages)
        return optimizer

    def weights_to_save(self) -> list[nn.Parameter]:
        return list(self.pipeline.whole.weights.values())

    def save_all(self, folder: str, state_dict: dict | None) -> None:
        self.selection_bias.restore()
        whole = on_first(own_tensors(self.moe), self.pipeline.stages, self.args.device)
        if self.args.should_save:
            super().save_all(folder, whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        given = (self.groups, self.pipeline.stages, self.args.device)
        state = whole_state(bare_optimizer(self), self.model, *given)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def restore_state(self, checkpoint: str) -> None:
        folder, optimizer = Path(checkpoint), bare_optimizer(self)
        whole = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(own_state(whole, optimizer, self.model, self.groups))
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of this process's stages, of a checkpoint of any number of stages."""
        saved = whole_model(resume_from_checkpoint, type(self.moe), config=self.moe.config, dtype=self.moe.dtype)
        state = saved.state_dict()
        self.moe.load_state_dict({name: state[name] for name in self.moe.state_dict()})
        self.selection_bias.remember()


def add_by_router(counts: list[dict]) -> dict:
    """Of micro-batches together, router by router."""
    return {name: add_all([count[name] for count in counts]) for name in (counts[0] if counts else ())}


class PipelineSFTTrainer(PipelineMixin, MoeSFTTrainer):
    """MoeSFTTrainer over the stages of a pipeline."""


def trainer_for(args: TrainingArguments) -> type[MoeSFTTrainer]:
    """The trainer of a run whose arguments say how many stages its model is cut into."""
    return PipelineSFTTrainer if args.pipeline_parallel_size > 1 else MoeSFTTrainer
