"""TRL's group-relative policy optimisation for mixture-of-experts models, with router replay."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from hf_moe.model.decoding import forget

from ..balance.router_replay import Indices, check_replayable, fit, of_batches, of_generation, recording, replayed
from ..host import prepared_inputs
from ..host_trl import RepeatSampler, allow_recorded_steps, generated_batches, generated_step
from ..weights.rounded import rounded
from .policy import MoePolicyMixin, PolicyArguments

REPLAY = ("none", "old_policy", "rollout")
PREFIX = "router_indices:"  # of the names of recorded experts among a batch's inputs


@dataclass
class MoeGRPOConfig(PolicyArguments, GRPOConfig):
    """GRPOConfig with what MoeGRPOTrainer adds."""

    router_replay: str = field(
        default="none",
        metadata={
            "help": "Whose experts a training forward takes: the router's own, those of the old policy's forward, or "
            "those of the generation. Weights are always the router's own.",
            "choices": REPLAY,
        },
    )


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that the epoch's number decides, so that a resumed run goes on in the same one."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class MoeGRPOTrainer(MoePolicyMixin, GRPOTrainer):
    """TRL's GRPOTrainer (https://arxiv.org/abs/2402.03300) with routing that is right; see MoeTrainerMixin.

    Texts are generated in evaluation mode: no router explores or drops there. `router_replay` makes the training
    forwards, and with "rollout" that of the old policy, take recorded experts; see router_replay.py. The reference and
    the evaluation route by themselves. Raises ValueError where replay has nothing to record or contradicts a balance
    loss, and where a balance loss over a step would need texts that are not generated yet.
    """

    def find_routing(self) -> None:
        super().find_routing()
        self.replaying, self.rollout, self.old_policy = ExitStack(), None, None
        self.scores_old_policy = False
        args, losses = self.args, ", ".join(self.balance.coefficients)
        if losses and self.balance_over == "step" and args.steps_per_generation % args.gradient_accumulation_steps:
            raise ValueError(
                f"{losses} over a step of {args.gradient_accumulation_steps} micro-batches needs all of them at once, "
                f"but steps_per_generation is {args.steps_per_generation}: make it a multiple, or set balance_over to "
                "micro_batch."
            )
        if args.router_replay == "none":
            return
        check_replayable(self.routers, self.moe)
        if losses:
            raise ValueError(
                f"{losses} would balance experts that router_replay {args.router_replay} took from elsewhere: set "
                "one of them off."
            )
        elsewhere = args.use_vllm or args.use_transformers_continuous_batching or self.rollout_func is not None
        if args.router_replay == "rollout" and elsewhere:
            raise ValueError(
                "router_replay is rollout, which records the experts of Transformers' generate(), but texts come from "
                "elsewhere: set it to old_policy."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        allow_recorded_steps(self)

    # ---- what the routing code asks ----

    def model_inputs(self, inputs: dict) -> dict:
        parts = (("input_ids", "ids"), ("attention_mask", "mask"))
        return {name: torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for name, x in parts}

    def step_batches(self) -> list[dict]:
        first = generated_step(self) % self.args.steps_per_generation
        return generated_batches(self)[first : first + len(self.step.batches)]

    def some_batches(self, count: int) -> list[dict]:
        if generated_batches(self) is None:  # no step was left to train
            self.model.train()
            prepared_inputs(self, next(iter(self.get_train_dataloader())))
        return [self.model_inputs(batch) for batch in generated_batches(self)[:count]]

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        x = super()._get_train_sampler(dataset)
        return EpochSampler(x.data_source, x.mini_repeat_count, x.batch_size, x.repeat_count, x.shuffle, x.seed)

    # ---- recording ----

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        training = self.model.training
        self.model.eval()
        replay = training and self.args.router_replay == "rollout"
        try:
            with self.rounded_weights(), recording(self.routers if replay else {}) as calls:
                completions, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            self.model.train(training)
            forget(self.moe)  # the step of training has a use for that memory
        self.rollout = of_generation(calls, len(prompt_ids))
        longest = max(map(len, prompt_ids)) + max(map(len, completions)) - 1
        for name, index in self.rollout.items():
            if index.shape[1] < longest:
                raise ValueError(
                    f"generate() took {name} over {index.shape[1]} positions for texts of {longest + 1} tokens, which "
                    "cannot be replayed: set router_replay to old_policy."
                )
        return completions, *rest

    def rounded_weights(self) -> AbstractContextManager:
        """Under autocast: recorded steps read weights as they are, and others as autocast rounds them, each time."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if dtype is None or self.use_vllm:
            return nullcontext()
        return rounded(self.moe, dtype, exact=[router.module for router in self.routers.values()])

    def _generate_and_score_completions(self, inputs):
        args = self.args
        if not self.model.training or args.router_replay == "none":
            return super()._generate_and_score_completions(inputs)
        # TRL's own condition; without it the policy of the update is still the old one, and routes as it did.
        self.scores_old_policy = bool(
            args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations)
        )
        self.scores_old_policy |= args.use_vllm and args.vllm_importance_sampling_correction
        self.old_policy = {}
        output = super()._generate_and_score_completions(inputs)
        mask_BS = self.model_inputs(output)["attention_mask"]
        indices = fit(self.rollout if args.router_replay == "rollout" else self.old_policy, mask_BS)
        return output | {PREFIX + name: index for name, index in indices.items()}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, keep, batch_size=None, **kwargs):
        score = super()._get_per_token_logps_and_entropies
        if not self.scores_old_policy:
            return score(model, input_ids, attention_mask, keep, batch_size, **kwargs)
        self.scores_old_policy = False  # what follows is the reference, or the policy of the update
        if self.args.router_replay == "old_policy":
            with recording(self.routers) as calls:
                result = score(model, input_ids, attention_mask, keep, batch_size, **kwargs)
            self.old_policy = of_batches(calls, input_ids.shape[1])
            return result
        indices, results = fit(self.rollout, attention_mask), []
        for i in range(0, len(input_ids), batch_size):
            rows = slice(i, i + batch_size)
            with replayed(self.routers, part(indices, rows)):
                results.append(score(model, input_ids[rows], attention_mask[rows], keep, **kwargs))
        return torch.cat([logps for logps, *_ in results]), None, None

    # ---- replaying ----

    def training_records(self, inputs: dict) -> AbstractContextManager:
        """The context in which the policy takes the experts recorded in a batch."""
        indices = {name.removeprefix(PREFIX): x for name, x in inputs.items() if name.startswith(PREFIX)}
        return replayed(self.routers, indices)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.replaying.enter_context(self.training_records(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with ExitStack() as self.replaying:  # until the backward pass is over
            return super().training_step(*args, **kwargs)


def part(indices: Indices, rows: slice) -> Indices:
    return {name: index[rows] for name, index in indices.items()}
