"""Under expert parallelism processes agree how long a step's rows are, when it begins, not in each of its layers."""


class StepLengths:
    """Of the trainer's present step."""

    def __init__(self, trainer):
        from hf_moe.kernels.expert_parallel import LENGTHS  # which Transformers 5.21 has no place for

        self.trainer, self.lengths = trainer, LENGTHS

    def begin(self) -> None:
        batches = self.trainer.step.batches
        if all("input_ids" in batch for batch in batches):
            self.lengths.agree([batch["input_ids"].numel() for batch in batches])

    def end(self) -> None:
        """What comes next, as evaluation, has lengths of its own."""
        self.lengths.forget()


def lengths_of(trainer) -> StepLengths | None:
    """None where the experts are whole on each process, or not every layer sees each token of a batch once."""
    return StepLengths(trainer) if trainer.spread and trainer.balance.multi_token is None else None
