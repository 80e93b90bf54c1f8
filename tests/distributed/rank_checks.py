"""Checks of a rank on its GPU. `test_gpu_ranks` starts the ranks and compares their results.

Under a memory checker, as each rank has a process and a GPU of its own:

    export FD_DSA_SMALL_TESTS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --target-processes all --report-api-errors no --error-exitcode 9 \\
        python -m tests.distributed.rank_checks 2 torch sums repeats
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.errors import describe_error
from tests.distributed.divided_selection import LARGE, select
from tests.distributed.gpu_ranks import Rank, run_ranks
from tests.distributed.sums import sum_of, widened

# the last one that our own all-reduce takes is 146, the first in two stages 25 on four ranks and 7
# on eight; a row is 7,168 values
TOKENS = (1, 2, 3, 5, 6, 7, 8, 9, 16, 17, 24, 25, 33, 34, 66, 67, 100, 128, 146, 147, 333)
TOKENS += (1024, 3000, 8192)
WIDTH = 7168
# of a graph: sizes in turn, so that launches of few blocks and of many follow each other
IN_TURN, TURNS, REPEATS = (1, 128, 1, 16, 5, 1), 10, 10_000
_BLOCK = 512
FP8_FOLDER = "FD_DSA_FP8_FOLDER"
"""Names a checkpoint in FP8 for `check_steps`."""


@cache
def part(rank: int, rows: int, width: int = WIDTH) -> np.ndarray:
    """Bits of a rank's part: magnitudes of 2^-9 to 2^6, signs and mantissas at random."""
    bits = np.random.default_rng([rank, rows]).integers(0, 1 << 16, (rows, width), np.uint16)
    return bits & 0x807F | (118 + (bits >> 7) % 16) << 7


def digest(array: np.ndarray) -> str:
    """Of its bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def check_scattered_sums(rank: Rank, group: Any) -> None:
    """The rows that a rank gets of a sum, which NCCL rounds after every rank but the first."""
    count = 64
    parts = [part(r, count * rank.size) for r in range(rank.size)]
    out = rank.memory.get(group.reduce_scatter(rank.memory.put(parts[rank.rank], "bfloat16")))
    own = [widened(p)[rank.rank * count :][:count].astype(np.float64) for p in parts]
    bound = ((1 + 2.0**-8) ** (rank.size - 1) - 1) * np.sum(np.abs(own), 0)
    assert (np.abs(widened(out) - np.sum(own, 0)) <= bound).all()


def check_sums(rank: Rank) -> dict[str, str]:
    """Every size against float64; our own sums also against float32 in the order of ranks."""
    group, found = rank.group("sums"), {}
    for tokens in TOKENS if rank.memory.large else TOKENS[:-3]:
        # large ones repeat some rows
        rows = min(tokens, _BLOCK)
        parts = [part(r, rows) for r in range(rank.size)]
        own = np.resize(parts[rank.rank], (tokens, WIDTH))
        out = rank.memory.get(group.all_reduce(rank.memory.put(own, "bfloat16")))
        exact = np.sum([widened(p) for p in parts], 0, np.float64)
        room = np.sum([np.abs(widened(p)) for p in parts], 0, np.float64)
        in_order = sum_of(parts)
        for first in range(0, tokens, rows):
            some = out[first : first + rows]
            bound = 2.0**-8 * (np.abs(exact) + 2.0**-12 * room)
            if tokens > 146:
                # NCCL rounds after every rank but the first, by half a unit of 2^-7 at most
                bound = ((1 + 2.0**-8) ** (rank.size - 1) - 1) * room
            assert (np.abs(widened(some) - exact[: len(some)]) <= bound[: len(some)]).all(), tokens
            if tokens <= 146:
                np.testing.assert_array_equal(some, in_order[: len(some)], f"{tokens} tokens")
        found[f"{tokens}"] = digest(out)
    own = rank.memory.put(part(rank.rank, 3), "int32")
    gathered = rank.memory.get(group.all_gather(own))
    np.testing.assert_array_equal(gathered, [part(r, 3) for r in range(rank.size)])
    check_scattered_sums(rank, group)
    group.barrier()
    group.close()
    return found


def check_selections(rank: Rank) -> dict[str, str]:
    """The selection of a step that ranks divide is that of one rank, to the bit."""
    group = rank.group("selections")
    alone, shared = (select(rank.memory, LARGE, one) for one in (None, group))
    np.testing.assert_array_equal(shared, alone)
    group.close()
    return {"slots": digest(shared)}


def check_blocks(rank: Rank) -> str:
    """Blocks in the host memory of all ranks come back whole."""
    from tests.distributed.divided_blocks import LARGE, check_blocks_come_back

    group = rank.group("blocks")
    check_blocks_come_back(rank.memory, group, LARGE)
    group.close()
    return "whole"


def check_repeats(rank: Rank) -> dict[str, str]:
    """Ten thousand all-reduces of a graph, and some eager ones, give the same bits."""
    group, sums = rank.group("repeats"), {}
    sources = {t: rank.memory.put(part(rank.rank, t), "bfloat16") for t in set(IN_TURN)}
    targets = [rank.memory.poisoned((t, WIDTH), "bfloat16") for t in IN_TURN * TURNS]

    def work() -> None:
        for tokens, target in zip(IN_TURN * TURNS, targets, strict=True):
            rank.copy(target, sources[tokens])
            group.all_reduce(target)

    for tokens in set(IN_TURN):
        sums[tokens] = sum_of([part(r, tokens) for r in range(rank.size)])

    def check() -> None:
        for tokens, target in zip(IN_TURN * TURNS, targets, strict=True):
            assert np.array_equal(rank.memory.get(target), sums[tokens]), f"{tokens} tokens"

    for _ in range(5):
        work()
        check()
    replay = rank.capture(work)
    for number in range(REPEATS // len(targets) + 1 if rank.memory.large else 2):
        replay()
        # between two looks launches follow each other without the host
        if number % 8 == 7:
            check()
    check()
    group.close()
    return {str(tokens): digest(total) for tokens, total in sums.items()}


def check_absent(rank: Rank) -> str:
    """The last rank does not come: the others fail, and say for whom they waited."""
    group, x = rank.group("absent", 1), rank.memory.put(part(rank.rank, 128), "bfloat16")
    group.barrier()
    if rank.rank == rank.size - 1:
        # until the others have given up: its memory must be there
        time.sleep(4)
        return "absent"
    try:
        group.all_reduce(x)
        rank.memory.sync()
    except Exception as error:
        # torch and Paddle raise errors of their own
        print(f"rank {rank.rank}: {describe_error(error)}", file=sys.stderr)
    return str(group.failure())


def check_steps(rank: Rank) -> dict[str, str]:
    """Ten thousand decode steps of two models, from graphs, give the same bits.

    Their checkpoints: the demo model, and the folder in the environment.
    """
    from fd_dsa.config import demo_model_path
    from fd_dsa.runner.step_graphs import PaddleCapture
    from tests.distributed.repeated_steps import repeat, split_runner
    from tests.gpu_rig import current

    rig, found = current(), {}
    assert rig is not None
    folders = {"bfloat16": demo_model_path(), "fp8_ds_mla": Path(os.environ[FP8_FOLDER])}
    for kv_cache_dtype, folder in folders.items():
        group = rank.group(kv_cache_dtype)
        runner = split_runner(folder, kv_cache_dtype, rig.device, group)
        # the group stays open: NCCL's end waits for graphs that hold its collectives
        found[folder.name] = repeat(runner, PaddleCapture, rank.memory, rank.copy, REPEATS)
    return found


def main(argv: list[str]) -> None:
    """Some checks on one rank."""
    rank, found = Rank(argv), {}
    for name in rank.arguments:
        check: Any = globals()[f"check_{name}"]
        begin = time.monotonic()
        found[name] = check(rank)
        print(f"rank {rank.rank}: {name} in {time.monotonic() - begin:.1f} s", file=sys.stderr)
    rank.finish(found)
    # a device that has failed cannot be put away
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        run_ranks(__spec__.name, int(sys.argv[1]), *sys.argv[2:], timeout_s=300)
    else:
        main(sys.argv[1:])
