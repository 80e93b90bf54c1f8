"""Messages of rank 0 for a decode step: changed cells of block tables, or whole tables.

    python -m benchmarks.rank_messages                # a minute on 2 cores
    python -m benchmarks.rank_messages --readers 7    # the other ranks of eight

Other processes read the messages from shared memory and restore the step, as the other ranks of a
split model do. The forms take turns, and their tables are compared at the end. The time of rank 0
ends when its message is sent. The time of all ranks ends when every process has restored the step.
Nothing is written.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._harness import parser_of, percentiles
from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs

BLOCK_SIZE = 64
# rows, and the length to which the longest one grows
CASES = ((1, 32768), (128, 4096), (128, 32768), (128, 163840))
WHOLE, CHANGES = "whole tables", "changed cells"
# steps that are not timed
_WARM_UP = 10


class Side:
    """Rank 0's batch of decode rows, with messages of one form.

    Args:
        whole: True to send whole tables, as the package did at first.
        context: most tokens of a row.
        steps: number of steps that rows grow.
    """

    def __init__(self, whole: bool, rows: int, context: int, steps: int) -> None:
        self.batch = batch = make_batch(rows, context)
        self._whole = whole
        self._lengths = [context - steps - row % BLOCK_SIZE for row in range(rows)]
        batch.begin_changes()
        for row, length in enumerate(self._lengths):
            count = -(-length // BLOCK_SIZE)
            batch.set_blocks(row, range(row * count, (row + 1) * count))

    def grow(self) -> None:
        """Fill the batch with the next token of every row."""
        batch, rows, lengths = self.batch, range(len(self._lengths)), self._lengths
        batch.begin_step()
        batch.add_rows(rows, [1] * len(rows), [7] * len(rows), lengths, [False] * len(rows))
        for row in rows:
            if lengths[row] % BLOCK_SIZE == 0:
                batch.set_blocks(row, [9000 + row], lengths[row] // BLOCK_SIZE)
            lengths[row] += 1

    def message(self) -> bytes:
        """Return the message of the step."""
        batch, rows = self.batch, range(len(self._lengths))
        ones, indices = [-1] * len(rows), np.arange(len(rows))
        sampling = SamplingInputs([*rows], self._lengths, [*range(len(rows) + 1)], ones)
        tables = None
        if self._whole:
            batch.begin_changes()
            columns = -(-batch.max_seqlen_k // BLOCK_SIZE)
            tables = batch.block_tables[: batch.num_rows, :columns]
        call = "enqueue_model", (indices, sampling), batch.state()
        message = pickle.dumps((call, tables), pickle.HIGHEST_PROTOCOL)
        batch.begin_changes()
        return message


def make_batch(rows: int, context: int) -> InputBatch:
    """Return an empty batch for rows of this length."""
    return InputBatch(rows, rows, context // BLOCK_SIZE, BLOCK_SIZE)


def follow(group: HostGroup, rows: int, context: int) -> None:
    """Restore the steps of both forms until a message is empty. Body of a process."""
    by_changes, other = make_batch(rows, context), make_batch(rows, context)
    whole = np.full(other.block_tables.shape, -1, np.int32)
    while message := group.receive():
        (_, _, state), tables = pickle.loads(message)
        if tables is None:
            by_changes.restore(state)
        else:
            other.restore(state)
            whole[: tables.shape[0], : tables.shape[1]] = tables
        group.barrier()
    np.testing.assert_array_equal(by_changes.block_tables, whole)


def measure(group: HostGroup, sides: dict[str, Side], steps: int) -> dict[str, dict[str, Any]]:
    """Return bytes and microseconds of a message of each form."""
    found: dict[str, dict[str, Any]] = {
        label: {"bytes": 0, "rank 0": [], "all ranks": []} for label in sides
    }
    for step in range(-_WARM_UP, steps):
        for label in list(sides)[:: 1 if step % 2 else -1]:
            side, times = sides[label], found[label]
            side.grow()
            begin = time.perf_counter()
            message = side.message()
            group.send(message)
            sent = time.perf_counter()
            group.barrier()
            if step >= 0:
                times["bytes"] += len(message) / steps
                times["rank 0"].append(1e6 * (sent - begin))
                times["all ranks"].append(1e6 * (time.perf_counter() - begin))
    return found


def run_case(rows: int, context: int, readers: int, steps: int) -> dict[str, dict[str, Any]]:
    """Measure a case with new processes.

    Raises:
        RuntimeError: a process failed, or its tables differ.
    """
    shared = Shared.create(1 + readers)
    group, fork = HostGroup(0, shared), multiprocessing.get_context("fork")
    others = [
        fork.Process(target=follow, args=(HostGroup(rank, shared), rows, context), daemon=True)
        for rank in range(1, 1 + readers)
    ]
    for process in others:
        process.start()
    grown = _WARM_UP + steps
    sides = {form: Side(form == WHOLE, rows, context, grown) for form in (WHOLE, CHANGES)}
    found = measure(group, sides, steps)
    group.send(b"")
    for process in others:
        process.join()
    group.close()
    if any(process.exitcode for process in others):
        raise RuntimeError(f"{rows} x {context}: a process failed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all cases and print them. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--readers", type=int, default=8, help="other processes; default: 8")
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    args = parser.parse_args(argv)
    for rows, context in CASES:
        found = run_case(rows, context, args.readers, args.steps)
        figures = {}
        for label, side in found.items():
            # other work of the machine only adds time
            us = {name: percentiles(side[name])["p20"] for name in ("rank 0", "all ranks")}
            figures[label] = {"bytes": side["bytes"]} | us
        print(f"{rows} rows of {context}, {args.readers} readers")
        for label, side in figures.items():
            print(f"  {label}: " + ", ".join(f"{name} {v:,.0f}" for name, v in side.items()))
        whole, ours = figures.values()
        ratios = (f"{name} {whole[name] / ours[name]:.1f}" for name in whole)
        print(f"  {WHOLE} / {CHANGES}: " + ", ".join(ratios), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
