"""HCA lists of DeepSeek-V4 on the host: our form, one copy a token, and a gather of every entry.

    python -m benchmarks.v4_host_lists           # some minutes; --rounds 3 is quick

A case is a step of decode rows, with or without drafts, or of prompts. All functions write the same
array. Their results are compared first, then they run in turns. NumPy only, on one processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from benchmarks._harness import parser_of, percentiles, save
from fd_dsa.environment import prepare_cpu_runtime
from fd_dsa.v4_prepare import V4PrepareConfig, builder

Writer = Callable[..., None]
OURS = "ours"
# context lengths, rows and tokens of a row; then steps of prompts
DECODE = tuple(product((1024, 8192, 32768, 131072), (1, 32, 128, 256), (1, 4)))
PROMPTS = ((128, 64, 128), (1024, 8, 1024), (8192, 1, 8192), (34816, 1, 2048), (10000, 4, 2048))
_CALLS = 5


def by_token(cfg: V4PrepareConfig, step: Any, hca_indptr: np.ndarray, hca_idx: np.ndarray) -> None:
    """Copy the list of one token after the other from the entries of its row."""
    bounds = hca_indptr[: len(step.row) + 1].tolist()
    longest = int((step.ctx * (step.q > 0)).max(initial=0)) // cfg.hca_ratio
    entries = builder.hca_entries(cfg, step, longest)
    for row, at, stop in zip(step.row.tolist(), bounds, bounds[1:], strict=False):
        hca_idx[at:stop] = entries[row, : stop - at]


def by_entry(cfg: V4PrepareConfig, step: Any, hca_indptr: np.ndarray, hca_idx: np.ndarray) -> None:
    """Gather all entries of all tokens at once, as ROCm/ATOM #728 does."""
    num_tokens = len(step.row)
    lengths, total = np.diff(hca_indptr[: num_tokens + 1]), int(hca_indptr[num_tokens])
    row = np.repeat(step.row, lengths)
    number = np.arange(total, dtype=np.int32) - np.repeat(hca_indptr[:num_tokens], lengths)
    per_block = cfg.block_size // cfg.hca_ratio
    blocks = step.block_table[row, number // per_block].astype(np.int32)
    hca_idx[:total] = blocks * np.int32(per_block) + number % per_block + np.int32(cfg.comp_base)


WRITERS: dict[str, Writer] = {
    "one copy a token": by_token,
    "gather of entries": by_entry,
    OURS: builder.write_hca_list,
}


@dataclass(frozen=True)
class Case:
    """A step: rows of about one context length, each with as many tokens.

    Attributes:
        context: tokens of a row after the step.
        rows: rows of the step.
        tokens: tokens of a row in the step.
        ragged: contexts from half to three halves of that length, instead of some blocks more.
    """

    context: int
    rows: int
    tokens: int
    ragged: bool = False

    @property
    def label(self) -> str:
        """Its name in the result."""
        kind = ", ragged" if self.ragged else ""
        return f"{self.rows} x {self.tokens} at {self.context}{kind}"

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a form: configuration, step, offsets and the array of lists."""
        rng = np.random.default_rng(self.rows)
        half = self.context // 2
        spread = rng.integers(-half, half + 1, self.rows) if self.ragged else 0
        q = np.full(self.rows, self.tokens, np.int32)
        added = rng.integers(0, 200, self.rows) * (self.tokens != self.context)
        ctx = np.maximum(self.context + spread + added, q).astype(np.int32)
        cfg = v4_config(self.rows, int(ctx.max()), self.tokens)
        table = rng.integers(0, cfg.num_blocks, (self.rows, cfg.max_blocks_per_seq), np.int32)
        step = builder.step_of(ctx, q, np.arange(self.rows, dtype=np.int32), table)
        indptr = np.zeros(len(step.row) + 1, np.int32)
        np.cumsum((step.position + 1) // cfg.hca_ratio, out=indptr[1:])
        return cfg, step, indptr, np.empty(indptr[-1], np.int32)


def v4_config(rows: int, longest: int, tokens: int) -> V4PrepareConfig:
    """Return the sizes of V4-Flash for a step of these rows, in blocks of 256 tokens."""
    columns = -(-longest // 256)
    return V4PrepareConfig(
        window_size=128,
        spec_tokens=3,
        block_size=256,
        csa_ratio=4,
        hca_ratio=128,
        index_topk=512,
        num_slots=rows,
        num_blocks=rows * columns,
        max_blocks_per_seq=columns,
        max_num_seqs=rows,
        max_num_tokens=rows * tokens,
        max_tokens_per_seq=tokens,
        max_model_len=longest,
    )


def cases() -> list[Case]:
    """Return all cases. Those of 128 decode rows also have ragged contexts."""
    decode = [Case(*sizes) for sizes in DECODE]
    ragged = [replace(case, ragged=True) for case in decode if case.rows == 128]
    return [*decode, *ragged, *(Case(*sizes) for sizes in PROMPTS)]


def times(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Return microseconds of each form, in turns.

    Raises:
        AssertionError: two forms wrote other lists.
    """
    *inputs, out = case.arguments()
    written = []
    for write in WRITERS.values():
        out.fill(-1)
        write(*inputs, out)
        written.append(out.copy())
    for other in written[1:]:
        np.testing.assert_array_equal(other, written[0])
    samples: dict[str, list[float]] = {label: [] for label in WRITERS}
    for _ in range(rounds):
        for label, write in WRITERS.items():
            begin = time.perf_counter_ns()
            for _ in range(_CALLS):
                write(*inputs, out)
            samples[label].append((time.perf_counter_ns() - begin) / 1e3 / _CALLS)
    return {label: percentiles(values) for label, values in samples.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all cases. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    args = parser.parse_args(argv)
    # glibc's allocator as a server has it
    prepare_cpu_runtime()
    found = []
    for case in cases():
        sides = times(case, args.rounds)
        # other work of the machine only adds time
        others = min(side["p20"] for label, side in sides.items() if label != OURS)
        ratio = others / sides[OURS]["p20"]
        found.append({"label": case.label, "us": sides, "best_other_over_ours": ratio})
        figures = ", ".join(f"{label} {side['p20']:.1f}" for label, side in sides.items())
        print(f"{case.label:28} {figures} us, best other / ours {ratio:.2f}", flush=True)
    result = {"rounds": args.rounds, "cases": found}
    save("v4_host_lists", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
