"""merge: Branch-Train-MiX (https://arxiv.org/abs/2403.07816, 3.2): one expert from each of N fine-tuned siblings.

The tensors outside the experts are the siblings' mean, in float32, or those of one of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..files.writer import Output
from .strategy import Request, Sizes, chunks, take
from .whole import Whole


class Merge(Whole):
    options = {"granularity": 1, "rest": "average", "domain_texts": None}
    exact = False
    takes_siblings = True
    held_matrices = 0

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        rest, texts = request.options["rest"], request.options["domain_texts"]
        if request.sources < 2:
            raise ValueError("strategy 'merge' takes experts from several models: name at least 2 sources.")
        if request.experts != request.sources:
            raise ValueError(f"experts ({request.experts}) must be the number of sources ({request.sources}).")
        if rest != "average" and rest not in map(str, range(request.sources)):
            raise ValueError(
                f"rest {rest!r} is not understood; write 'average', or 0 to {request.sources - 1} for that source's."
            )
        if texts is not None and len(texts) != request.sources:
            raise ValueError(f"domain_texts ({len(texts)}) must be a file for each of the {request.sources} sources.")
        for text in texts or ():
            if not Path(text).is_file():
                raise FileNotFoundError(f"There is no domain text {text}.")
        return super().sizes(request)

    @classmethod
    def rest(cls, request: Request, outputs: Sequence[Output]) -> Output:
        rest = request.options["rest"]
        if rest != "average":
            return outputs[int(rest)]

        def average() -> Iterator[torch.Tensor]:
            for pieces in zip(*(output.pieces() for output in outputs), strict=True):
                for rows in zip(*map(chunks, pieces), strict=True):
                    total = torch.zeros(rows[0].shape)
                    for row in rows:
                        total += row.float()
                    yield (total / len(rows)).to(rows[0].dtype)

        return outputs[0]._replace(pieces=average)

    def piece(self, index: int, part: str, neurons: slice) -> torch.Tensor:
        return take(part, self.layer.networks[index][part], neurons)
