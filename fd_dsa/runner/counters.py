"""Counts of the engine's work: plain numbers, written by one thread, read by any.

An observation costs a fraction of a microsecond. Callers that export the numbers also format them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_STEP_SECONDS = (
    *(0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005),
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
)
_KINDS = "prefill", "decode", "mixed"


class Histogram:
    """Histogram of values by upper bounds, and their sum.

    Attributes:
        bounds: upper bounds of the buckets, ascending. Larger values are in one more bucket.
        counts: number of values in each bucket, len(bounds) + 1.
        total: sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


EAGER_REASONS = ("not_captured", "tokens", "prompts", "keys", "samples")
"""Reasons for which no graph serves a step on a device.

Such steps are not captured; or the step has too many tokens, prompts, keys of dense attention, or
sampled tokens. A decode step without a sample of every token counts as "samples".
"""


class StepCounters:
    """Counts of the steps of a runner.

    Attributes:
        prepare_s: host seconds of the metadata of a step, by kind of the step.
        graph_steps: number of steps that were replayed from a CUDA graph, by kind likewise.
        eager_steps: number of steps on a device that no graph served, by EAGER_REASONS.
        sparse_tokens: number of tokens that had more keys than the indexer selects.
        late_compilations: number of launches after the warm-up that had to compile a kernel.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.prepare_s = {kind: Histogram(_STEP_SECONDS) for kind in _KINDS}
        self.graph_steps = dict.fromkeys(_KINDS, 0)
        self.eager_steps = dict.fromkeys(EAGER_REASONS, 0)
        self.sparse_tokens = 0
        self.late_compilations = 0

    @property
    def mask_offsets_launched(self) -> int:
        """Number of steps with prefill tokens, which have windows."""
        return sum(sum(self.prepare_s[kind].counts) for kind in ("prefill", "mixed"))

    @property
    def mask_offsets_skipped(self) -> int:
        """Number of steps that only decode, which have no windows."""
        return sum(self.prepare_s["decode"].counts)

    def count_late_compilation(self) -> None:
        """Count a launch after the warm-up that has to compile a kernel."""
        self.late_compilations += 1

    def count_step(
        self,
        prepare_s: float,
        num_tokens: int,
        num_prefill_tokens: int,
        num_sparse_tokens: int,
        is_graph: bool,
    ) -> None:
        """Count one step.

        Args:
            prepare_s: host seconds of its metadata.
            num_tokens, num_prefill_tokens: number of its tokens, and of those of prefill rows.
            num_sparse_tokens: number of its tokens that have more keys than the indexer selects.
            is_graph: True if it is replayed from a CUDA graph.
        """
        kind = "mixed"
        if num_prefill_tokens in (0, num_tokens):
            kind = "prefill" if num_prefill_tokens else "decode"
        self.prepare_s[kind].observe(prepare_s)
        self.graph_steps[kind] += is_graph
        self.sparse_tokens += num_sparse_tokens
