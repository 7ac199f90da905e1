"""Trainers for mixture-of-experts models, hf_moe's and Transformers' own."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import IntervalStrategy, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_moe.chat import plain_template_errors
from hf_moe.kernels import liger
from hf_moe.kernels.recomputation import SELECTIVE, Selective
from hf_moe.routers import Routing, captured, find_routers

from ..balance.counts import Balance, over_processes
from ..balance.dense_mixer import add_dense_mixer, check_dense_mixer
from ..balance.metrics import FIRST_LOSS, rows, split, summarize
from ..balance.moe_arguments import moe_argument
from ..balance.multi_token import looking_ahead, mtp_coefficient
from ..balance.selection_bias import SelectionBias, base_model
from ..balance.step import Forward, Step
from ..balance.zero3 import gather_experts_whole
from ..host import keep_dtype_in_views, own_scheduler, prepared_inputs, shifts_labels, taking_shards
from ..output.log_files import LogFiles
from ..output.publishing import PublishingMixin
from ..output.record import facts_of
from ..output.saving import try_saving
from ..output.spread import leave_out_empty_groups
from ..weights.average import WeightAverage
from .callbacks import RoutingCallback
from .checkpointing import CheckpointMixin
from .copies import block_copies_of, copies_of
from .holding import held_forwards
from .label_smoothing import ShiftedLabelSmoother
from .lengths import lengths_of
from .multi_step import multi_step_schedule
from .muon import muon_of
from .precision import keep_precision
from .refusals import check_arguments, check_best_metric, check_checkpointing, check_finite, check_rows
from .rehearsal import check_schedule, schedule_arguments
from .sharded import gathered, shard_experts

LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")


class MoeTrainerMixin(CheckpointMixin, PublishingMixin):
    """Makes the routing of a Transformers Trainer's model right: put it before the trainer class.

    The balance losses are per layer and count the tokens of a whole optimizer step, over micro-batches and processes,
    so that their gradient is that of one large batch. They are added once, whatever computes the rest of the loss, and
    never to the evaluation loss, beside which they are logged. Selection biases move once per optimizer step. Routing
    metrics go wherever the Trainer reports. A checkpoint restores every weight. See `MoeArguments` for what can be
    set, in MoeTrainingArguments or MoeSFTConfig; with plain arguments the model's configuration decides.

    Raises ValueError for a coefficient or a bias speed that the model has no use for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with plain_template_errors(), taking_shards(self, super().__init__, *args, **kwargs):
            super().__init__(*args, **kwargs)
        if self.args.use_liger_kernel:
            liger.register()
        self.args.logging_nan_inf_filter = False  # such a loss stops training here; asking each costs time
        self.casts_under_fsdp2 = keep_precision(self.accelerator, self.model)
        self.balance_over = moe_argument(self.args, "balance_over")
        self.step = Step([])
        self.logged = []  # the rows of each optimizer step since the last log
        self.mtp_losses = []  # not weighted, of the same steps
        self.evaluated = []  # the rows of each evaluation batch
        self.experts = {True: {}, False: {}}  # training or not: router -> E, of the routers that a forward uses
        if self.label_smoother is not None and shifts_labels(self):
            self.label_smoother = ShiftedLabelSmoother(self.label_smoother.epsilon, self.label_smoother.ignore_index)
        self.saved_dtype = None  # of a whole model, where it is not the one that trains
        self.final_dtype = self.merged_dtype = None  # of what is saved in the end, for which there is to be room
        self.tried = False  # to save
        self.mixing = []  # hooks of the dense mixer, while training
        self.selective = Selective()  # recomputation, while training
        self.copies = None  # of the experts' weights, while training
        self.block_copies = None  # of all that is multiplied with in FP8, while training
        self.gathered = None  # what FSDP2 keeps whole for a step, while training
        self.lengths = None  # that processes agree on for a step, while training
        decay = moe_argument(self.args, "ema_decay")
        self.average = None if decay is None else WeightAverage(decay)
        self.find_routing()
        self.facts = facts_of(self.moe, self.args)
        self.add_callback(RoutingCallback(self))
        self.add_callback(LogFiles())
        if moe_argument(self.args, "log_routing_figures"):
            from hf_moe.telemetry.live import RoutingFigures  # draws with matplotlib, of the extra "plots"

            self.add_callback(RoutingFigures(self))

    def find_routing(self) -> None:
        """Look for the routers of the present model, and for what they are to be balanced by."""
        self.moe = base_model(self.accelerator.unwrap_model(self.model))
        self.routers = find_routers(self.moe)
        if is_deepspeed_zero3_enabled():
            gather_experts_whole(self.moe, self.routers)
        self.balance = Balance(self.moe, self.routers, self.args)
        rule = moe_argument(self.args, "router_bias_update")
        self.selection_bias = SelectionBias(self.routers, rule, self.balance.top_k)
        self.bias_speed = moe_argument(self.args, "router_bias_update_speed")
        if self.bias_speed is None:
            self.bias_speed = getattr(self.balance.config, "router_bias_update_speed", 0.0)
        check_arguments(self)
        if not self.routers:
            self.balance.coefficients = {}  # those that every configuration of the family has
        if moe_argument(self.args, "densemixer"):
            check_dense_mixer(self.moe, self.routers)

    @property
    def takes_model_loss(self) -> bool:
        """Whether the loss is the one that the model returns."""
        return self.label_smoother is None and self.compute_loss_func is None

    # ---- the step ----

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self.step = Step(batches)
        for standing in self.standing_for_step:
            standing.begin()
        coefficient = mtp_coefficient(self.args, self.state.global_step / self.state.max_steps)
        if coefficient is not None:
            self.balance.config.mtp_loss_coef = coefficient
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training and self.gathered is not None and self.accelerator.sync_gradients:
            self.gathered.last()
        self.selection_bias.restore()
        forward = partial(self.run_forward, model, return_outputs, num_items_in_batch)
        held = self.count_step(model, partial(forward, ahead=True)) if self.balances_step else None
        loss, outputs, routings, decoded, losses = held or forward(inputs)

        if losses is None:
            losses = self.see_routing(routings, self.model_inputs(inputs))
        if self.model.training:
            if losses:
                loss = loss + (self.share_scale(num_items_in_batch) * self.balance.weighted(losses)).to(loss.device)
            if self.model_adds_mtp_loss:
                self.keep_mtp_loss(outputs.mtp_loss, num_items_in_batch)
            elif decoded:
                mtp_loss = self.moe.mtp_loss(decoded[0], inputs["labels"], num_items_in_batch)
                weight = self.token_scale(num_items_in_batch) * self.balance.config.mtp_loss_coef
                loss = loss + (weight * mtp_loss).to(loss.device)
                self.keep_mtp_loss(mtp_loss, num_items_in_batch)
            self.step.losses.append(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def run_forward(self, model, return_outputs, num_items_in_batch, inputs, ahead: bool = False) -> Forward:
        """The host's own `compute_loss`, watched. `ahead` is before the step has been counted."""
        of_model = self.model_adds_mtp_loss
        watched = self.balance.multi_token if self.model.training and not of_model else None
        return_outputs, given = return_outputs or of_model, {**inputs, **self.balance.quiet}
        losses = []

        def see(routings: dict[str, Routing]) -> None:
            if not ahead:
                losses.append(self.see_routing(routings, self.model_inputs(inputs)))

        # A compiled forward would take what looks on into its graph.
        end = None if self.args.torch_compile else model
        with captured(self.routers, self.balance.top_k, end, see) as routings, looking_ahead(watched) as decoded:
            result = super().compute_loss(model, given, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        return Forward(loss, outputs, routings, decoded, losses[0] if losses else None)

    @property
    def model_adds_mtp_loss(self) -> bool:
        """Whether the model itself does, and gives it among its outputs."""
        return self.model.training and self.balance.multi_token is not None and self.takes_model_loss

    @property
    def row_processes(self) -> int:
        """How many processes have rows of their own."""
        return self.accelerator.num_processes

    def sum_over_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Of the processes that have the routers of this one, and other rows."""
        return self.accelerator.reduce(x, reduction="sum")

    def share_scale(self, num_items_in_batch) -> int:
        """By what a micro-batch's share of a loss over the whole step is multiplied, so that shares add up.

        Processes average their gradients, and the Trainer may divide by the micro-batches.
        """
        scaled = self.scales_loss(num_items_in_batch)
        return self.row_processes * (1 if scaled else len(self.step.batches) or 1)

    def averages_tokens(self, num_items_in_batch) -> bool:
        """Whether the tokens that a loss is divided by are those of all processes."""
        return self.args.average_tokens_across_devices and num_items_in_batch is not None

    def token_scale(self, num_items_in_batch) -> int:
        """By what the Trainer multiplies a sum over tokens that is divided by num_items_in_batch."""
        averaged = self.averages_tokens(num_items_in_batch)
        return self.accelerator.num_processes // self.get_tp_size() if averaged else 1

    def keep_mtp_loss(self, mtp_loss: torch.Tensor | None, num_items_in_batch) -> None:
        """Add a micro-batch's share to the step's MTP loss, for the log."""
        if mtp_loss is None:
            return
        parts = 1 if num_items_in_batch is not None else len(self.step.batches) or 1
        processes = 1 if self.averages_tokens(num_items_in_batch) else self.row_processes
        self.step.mtp_loss += mtp_loss.detach().to(self.args.device) / parts / processes

    def model_inputs(self, inputs: dict) -> dict:
        """What the model sees of a batch, without what only the loss needs."""
        return {name: value for name, value in inputs.items() if name not in LOSS_INPUTS}

    def step_batches(self) -> list[dict]:
        """The micro-batches of this step as `compute_loss` will get them."""
        return [prepared_inputs(self, batch) for batch in self.step.batches]

    def some_batches(self, count: int) -> list[dict]:
        """What the model sees of the first batches: held-out ones, or training ones where there are none."""
        loader = self.get_train_dataloader() if self.eval_dataset is None else self.get_eval_dataloader()
        return [self.model_inputs(batch) for batch in islice(loader, count)]

    @property
    def balances_step(self) -> bool:
        return self.model.training and bool(self.balance.coefficients) and self.balance_over == "step"

    def see_routing(self, routings: dict[str, Routing], inputs: dict) -> dict[str, torch.Tensor]:
        """Keep what the metrics need of a batch; returns its share of each loss, router by router, not weighted."""
        if not routings:
            return {}
        layers = self.balance.read(routings, inputs)
        counted = whole = self.balance.count(layers)
        if self.balances_step:
            whole = self.step.counted or over_processes(self.accelerator, counted)
        losses = self.balance.losses(layers, whole)
        if self.model.training and not self.balances_step:  # the mean over micro-batches
            parts = self.row_processes * (len(self.step.batches) or 1)
            losses = {name: value / parts for name, value in losses.items()}
        self.experts[self.model.training] = {name: len(counts.counts_E) for name, counts in counted.items()}
        row = rows(layers, counted, losses, self.args.device)
        if self.model.training:
            self.step.rows = row if self.step.rows is None else self.step.rows + row
            observed = self.selection_bias.observed(layers, self.args.device)
            if observed is not None:
                self.step.observed = observed if self.step.observed is None else self.step.observed + observed
        else:
            self.evaluated.append(row)
        return losses

    def count_step(self, model: nn.Module, forward: Callable[[dict], Forward]) -> Forward | None:
        """Before the first forward of a step, count all of it; before each, see that it takes the routes counted.

        Returns the forward where that has been run.
        """
        if self.step.counted is None:
            # Here rather than where the batches are fetched: a resumed run restores its random state in between.
            batches = self.step_batches()
            self.step.batches = [self.model_inputs(batch) for batch in batches]
            self.step.look_ahead(model, self.balance, held_forwards(self, model, forward, batches))
            if self.step.counted is not None:
                self.step.counted = over_processes(self.accelerator, self.step.counted)
        held = self.step.begin_forward()
        if held and getattr(model, "require_backward_grad_sync", False):
            # DistributedDataParallel decides in a forward whether its backward sums over processes; this one was run
            # with those that don't.
            with self.accelerator.trigger_sync_in_backward(model):
                pass
        return held

    def scales_loss(self, num_items_in_batch) -> bool:
        """Whether the Trainer takes the loss as one already divided by the whole step's tokens."""
        known = getattr(self, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        return self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )

    def weights_to_save(self) -> list[nn.Parameter]:
        """Those of the trained model, for what a save will take."""
        return list(self.model.parameters())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.casts_under_fsdp2 and self.optimizer is None:
            shard_experts(self)  # which Accelerate leaves as they are, when it shards the rest
        if moe_argument(self.args, "muon") and self.optimizer is None:
            self.optimizer = muon_of(self, model or self.model)
        optimizer = super().create_optimizer(model)
        if self.in_8_bits:
            keep_dtype_in_views()
        if self.spread:
            leave_out_empty_groups(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        milestones = moe_argument(self.args, "lr_milestones")
        if milestones and self.lr_scheduler is None:
            warmup, gamma = self.args.get_warmup_steps(num_training_steps), moe_argument(self.args, "lr_gamma")
            self.lr_scheduler = multi_step_schedule(
                optimizer or self.optimizer, warmup, num_training_steps, milestones, gamma
            )
            own_scheduler(self)
        self.args.lr_scheduler_kwargs = schedule_arguments(self.args, num_training_steps) or None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        check_schedule(schedule, self.args, num_training_steps)
        return schedule

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.tried:
            check_rows(self.moe, self.processing_class)
            try_saving(self)
            self.tried = True
        try:
            with plain_template_errors():
                return super().train(*args, **kwargs)
        finally:
            while self.mixing:
                self.mixing.pop().remove()
            self.selective.end()
            self.leave_held()
            self.copies = self.block_copies = self.gathered = self.lengths = None
            self.step.held.clear()  # of a step that was broken off

    def begin_routing(self) -> None:
        """Called when training begins."""
        if base_model(self.accelerator.unwrap_model(self.model)) is not self.moe:  # a new one, from model_init
            self.find_routing()
        # A resumed run would log, evaluate and save as often as the checkpoint's.
        self.state.compute_steps(self.args, self.state.max_steps)
        self.selection_bias.remember()
        self.logged.clear()
        self.mtp_losses.clear()
        if self.average is not None and self.state.global_step == 0:
            self.average.start(self.trained_model)
        check_checkpointing(self.moe, self.balance.coefficients)
        if self.args.gradient_checkpointing == SELECTIVE:
            self.selective.begin(self.model)
        if moe_argument(self.args, "densemixer"):
            self.mixing += add_dense_mixer(self.routers)
        self.copies, self.block_copies = copies_of(self), block_copies_of(self)
        self.gathered, self.lengths = gathered(self), lengths_of(self)

    def end_sums(self) -> None:
        """Called when a step's gradients are summed, before the optimizer moves the weights."""
        check_finite(self.step.losses, self.state.global_step)
        if self.average is not None:
            self.average.let_move()
        self.leave_held()

    @property
    def standing_for_step(self) -> list:
        """What holds from a step's begin until its weights move."""
        standing = (self.copies, self.block_copies, self.gathered, self.lengths)
        return [x for x in standing if x is not None]

    def leave_held(self) -> None:
        for standing in self.standing_for_step:
            standing.end()

    def end_routing_step(self) -> None:
        """Move the selection biases and keep the step's metrics; called after the optimizer moved."""
        if self.average is not None:
            self.average.update(self.trained_model)
        logs = self.args.logging_strategy != IntervalStrategy.NO
        if self.balance.multi_token is not None and logs:
            share = torch.as_tensor(self.step.mtp_loss, device=self.args.device)
            self.mtp_losses.append(self.accelerator.reduce(share, reduction="sum"))
        if self.step.rows is None:
            return
        flat = self.accelerator.reduce(self.step.rows, reduction="sum")
        if logs:
            self.logged.append(flat)
        speed = self.bias_speed
        if self.state.global_step >= moe_argument(self.args, "router_bias_update_until") * self.state.max_steps:
            speed = 0.0
        if speed:
            experts = self.experts[True]
            table = split(flat, list(experts.values()), len(self.balance.coefficients))
            counts = {name: counts for name, (_, counts) in zip(experts, table, strict=True)}
            self.selection_bias.update(counts, speed)
        if self.step.observed is not None:
            self.selection_bias.move(self.sum_over_rows(self.step.observed), speed)
        self.step = Step([])

    def _run_epoch(self, *args, **kwargs):
        # The Trainer would take one more step with a run that was cut short between its last step and its end.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # ---- logging ----

    def present_biases(self) -> dict[str, torch.Tensor]:
        """The selection bias of each router that has one."""
        return self.selection_bias.biases

    def routing_metrics(self, steps: torch.Tensor, training: bool) -> dict[str, float]:
        experts = self.experts[training]
        biases = {name: bias for name, bias in self.present_biases().items() if name in experts}
        each_router = moe_argument(self.args, "log_each_router")
        return summarize(steps, experts, list(self.balance.coefficients), biases, each_router)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self.logged:
            logs |= self.routing_metrics(torch.stack(self.logged), training=True)
            self.logged.clear()
        if "loss" in logs and self.mtp_losses:
            logs["mtp_loss"] = torch.stack(self.mtp_losses).mean().item()
            self.mtp_losses.clear()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self.evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.evaluated:
            total = self.accelerator.reduce(torch.stack(self.evaluated).sum(dim=0), reduction="sum")
            batches = len(self.evaluated) * self.row_processes
            for sums, _ in split(total, list(self.experts[False].values()), len(self.balance.coefficients)):
                sums[FIRST_LOSS:] /= batches
            metrics = self.routing_metrics(total.unsqueeze(0), training=False)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metric_key_prefix == "eval":  # else of one source of several
            check_best_metric(self.args, metrics)
        return metrics


class MoeTrainer(MoeTrainerMixin, Trainer):
    """Transformers' Trainer with routing that is right in training; see MoeTrainerMixin."""
