"""One set of training rows from several, in given proportions."""

import math
import sys

from datasets import Dataset, interleave_datasets


def mix(sources: dict[str, Dataset], weights: list[float] | None, seed: int) -> Dataset:
    """Rows drawn from `sources`, each from one of them with probability weight / sum of the weights; in its order.

    A source that runs out begins anew, and the rows end when each source has been gone through once. So every source's
    expected share of the rows is its weight's exactly (Wald's identity), and every row is in.

    Raises ValueError for weights that are not one positive number a source.
    """
    check_weights(list(sources), weights)
    if weights is None:
        (rows,) = sources.values()
        return rows
    shares = [weight / sum(weights) for weight in weights]
    mixed = interleave_datasets(
        list(sources.values()), probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )
    for (name, rows), share in zip(sources.items(), shares, strict=True):
        times = share * len(mixed) / len(rows)
        print(f"{name}: {share:.1%} of the rows, each about {times:.2f} times", file=sys.stderr)
    return mixed


def check_weights(sources: list[str], weights: list[float] | None) -> None:
    if weights is None:
        return
    if len(weights) != len(sources):
        raise ValueError(f"train_weights has {len(weights)} numbers for {len(sources)} sources of train_data.")
    if len(set(sources)) < len(sources):
        raise ValueError(f"train_weights needs sources that differ, but train_data is {', '.join(sources)}.")
    for name, weight in zip(sources, weights, strict=True):
        if not (0 < weight < math.inf):
            raise ValueError(f"train_weights gives {weight} to {name}; weights are positive numbers.")
