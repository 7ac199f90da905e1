"""Whole rows put into packs of a given length, by best fit decreasing.

The packs of TRL's `bfd` in a third of its time, and of more rows at once: TRL's trainer packs a thousand at a time,
and leaves one pack of each half empty.
"""

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

TOGETHER = 5000  # rows


def pack(rows: Dataset, length: int, num_proc: int | None = None, desc: str | None = None) -> Dataset:
    """Rows of `input_ids` and `labels` in packs of up to `length` tokens, with each row's part in `seq_lengths`.

    What is longer is cut to `length`. https://arxiv.org/abs/2404.10830, 3.
    """
    how = {
        "batched": True,
        "batch_size": TOGETHER,
        "fn_kwargs": {"length": length},
        "num_proc": num_proc,
        "desc": desc,
    }
    # As arrays, of which a collator makes tensors in half the time that lists take.
    return rows.with_format("arrow").map(pack_table, **how).with_format("numpy")


def pack_table(table: pa.Table, length: int) -> pa.Table:
    columns = {name: pc.list_slice(table[name].combine_chunks(), 0, length) for name in table.column_names}
    lengths = next(iter(columns.values())).value_lengths().to_numpy(zero_copy_only=False)
    packs = best_fit(lengths, length)
    order = np.array([row for members in packs for row in members], dtype=np.int64)
    row_ends = np.concatenate([[0], np.cumsum(lengths[order])])
    pack_ends = np.concatenate([[0], np.cumsum([len(members) for members in packs])])
    packed = {
        name: pa.ListArray.from_arrays(
            pa.array(row_ends[pack_ends], pa.int32()), column.take(pa.array(order)).flatten()
        )
        for name, column in columns.items()
    }
    lengths = pa.array(lengths[order], pa.int32())
    return pa.table(packed | {"seq_lengths": pa.ListArray.from_arrays(pa.array(pack_ends, pa.int32()), lengths)})


def best_fit(lengths: np.ndarray, length: int) -> list[list[int]]:
    """The rows of each pack: from the longest on, each into the fullest pack that has room, else into a new one."""
    # spaces: what packs have left, sorted; waiting: the packs of each.
    packs, spaces, waiting = [], [], defaultdict(list)
    for row in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[row])
        place = bisect_left(spaces, size)
        if place < len(spaces):
            space = spaces[place]
            members = waiting[space].pop()
            if not waiting[space]:
                del spaces[place]
        else:
            space, members = length, []
            packs.append(members)
        members.append(row)
        if space > size:
            if not waiting[space - size]:
                insort(spaces, space - size)
            waiting[space - size].append(members)
    return packs
