"""CUDA graphs of steps: their sizes, the choice of a graph for a step, and the capture.

Decode steps have two graphs per padded number of tokens. The short graph is for steps whose tokens
all attend to all keys of their rows, so it scores and selects no keys. The long graph is for rows
of any length. Steps with prompts, alone or beside decode rows, have two such graphs for each of a
few numbers of tokens. Grids and buffers fit the longest rows that a graph may be replayed with, and
lengths are read on the device.

The graph of a step contains all work but the copy of its inputs, to addresses that never change.
Sampling is a graph of its own, enqueued with the graph of the step. It is enqueued later if a row
needs a mask that depends on the tokens of the step before. Drafts after the first one of each
request are graphs of their own too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import compress
from operator import gt, le
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fd_dsa.attention.protocol import PromptLimits
from fd_dsa.errors import DeviceError, describe_error
from fd_dsa.runner.counters import EAGER_REASONS
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

_FALLBACK = "FLAGS_enable_api_kernel_fallback"
# place -> memory pool of all graphs of this process, and one graph that stays alive, because on an
# H200 Paddle 3.3.1 jumped to freed memory when it allocated after the last graph of a pool was gone
MEMORY_POOLS: dict[str, int] = {}
LASTING_GRAPHS: dict[str, Any] = {}


class GraphKey(NamedTuple):
    """Sizes that a graph is captured for.

    Attributes:
        num_tokens: number of tokens of its grids; a step may have fewer.
        max_seqlen_k: longest row that its grids reach to, tokens.
        limits: limits of a step with prompts; None = the graph is for decode steps.
    """

    num_tokens: int
    max_seqlen_k: int
    limits: PromptLimits | None = None

    @property
    def num_sampled(self) -> int:
        """Number of tokens whose logits the graph computes."""
        return self.num_tokens if self.limits is None else self.limits.num_samples


class GraphEntry(NamedTuple):
    """Graphs of one key.

    Attributes:
        step: Step of the padded size; a replay fills its logits and hidden states.
        replay: enqueues the graph of the model.
        sample: enqueues the graph of the sampling.
        draft: enqueues the graph of the layer for multi-token prediction and the first draft of
            each request.
    """

    step: Step
    replay: Callable[[], None]
    sample: Callable[[], None]
    draft: Callable[[], None]


Captured = tuple[Any, Callable[[], None]]
"""Tensors that captured work returned, and the replay, which fills them again."""
Capture = Callable[[Callable[[], Any]], Captured]


class CaptureError(RuntimeError):
    """Error of a step that cannot be captured. The process is still usable."""


class StepGraphs(dict[GraphKey, GraphEntry]):
    """Graphs of a runner.

    Args:
        sizes: numbers of tokens that decode steps are padded to.
        max_dense_keys: longest row whose tokens attend to all keys.
        longest: maximum length of a row, tokens.
        prompts: limits of steps with prompts, by the number of tokens that they are padded to.

    Attributes:
        prompts: as given, in ascending order; empty if all steps with prompts are eager.
        drafts: graphs of further drafts, by number of rows, length of the longest row, and number
            of drafts of each request.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        max_dense_keys: int,
        longest: int,
        prompts: Mapping[int, PromptLimits] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.drafts: dict[tuple[int, int, int], Callable[[], None]] = {}
        self.sizes, self.prompts = tuple(sorted(sizes)), dict(sorted(prompts.items()))
        self._max_dense_keys = max_dense_keys
        self._short, self._longest = min(max_dense_keys, longest), longest

    def steps(self) -> list[GraphKey]:
        """Return the keys to capture, the largest first, so that smaller ones reuse its memory."""
        lengths = sorted({self._longest, self._short}, reverse=True)
        of_sizes = dict.fromkeys(self.sizes), self.prompts
        keys = [
            GraphKey(size, length, limits)
            for of_size in of_sizes
            for size, limits in of_size.items()
            for length in lengths
        ]
        return sorted(keys, key=lambda key: key.num_tokens, reverse=True)

    def drop_prompts(self) -> None:
        """Remove all graphs of steps with prompts."""
        self.prompts.clear()
        for key in [key for key in self if key.limits is not None]:
            del self[key]

    def more_drafts(self, rows: int, longest: int, count: int) -> Callable[[], None] | None:
        """Return the replay of further drafts, or None if no captured graph is large enough."""
        fits = (k for k in self.drafts if k[0] >= rows and k[1] >= longest and k[2] == count)
        return self.drafts[key] if (key := min(fits, default=None)) else None

    def fitting(self, batch: InputBatch, sampled: np.ndarray) -> GraphKey | None:
        """Return the key of the graph for the step in a batch, or None if no graph fits.

        Args:
            batch: step to run.
            sampled: int64 [n]; flat tokens whose logits are wanted. A decode step needs all.
        """
        tokens = batch.num_tokens
        longest = self._short if batch.max_seqlen_k <= self._short else self._longest
        if batch.num_prefill_tokens:
            wanted = self._wanted(batch, len(sampled))
            for size, limits in self.prompts.items():
                if tokens <= size and all(map(le, wanted, limits)):
                    return GraphKey(size, longest, limits)
            return None
        if sampled.tolist() != list(range(tokens)):
            return None
        return next((GraphKey(s, longest) for s in self.sizes if s >= tokens), None)

    def refusal(self, batch: InputBatch, num_samples: int) -> str:
        """Return why no graph fits the step in a batch, one of EAGER_REASONS.

        Args:
            num_samples: number of tokens whose logits are wanted.
        """
        if not batch.num_prefill_tokens:
            return "tokens" if batch.num_tokens > self.sizes[-1] else "samples"
        if not self.prompts:
            return "not_captured"
        size, limits = max(self.prompts.items())
        wanted = (batch.num_tokens, *self._wanted(batch, num_samples))
        is_past = map(gt, wanted, (size, *limits))
        return next(compress(EAGER_REASONS[1:], is_past))

    def _wanted(self, batch: InputBatch, num_samples: int) -> PromptLimits:
        """Return the least limits that the step in a batch needs."""
        new = batch.num_chunk_tokens[: batch.num_rows]
        cached = batch.num_computed_tokens[: batch.num_rows]
        dense = np.minimum(self._max_dense_keys - cached, new)
        # only tokens of prompts see keys densely, up to the last such token of their row
        keys = np.where(dense > 0, cached + dense, 0).sum()
        num_samples = max(num_samples, batch.num_tokens - batch.num_prefill_tokens)
        return PromptLimits(int(np.count_nonzero(new)), int(keys), num_samples)


class PaddleCapture:
    """Capture by Paddle's CUDAGraph, with one memory pool for all graphs of a process.

    An operation that Paddle refuses during a capture is fatal to the process. So the work runs once
    before it, and raises there if Paddle would compute on the host instead of the device.

    Paddle's own wait keeps Python's lock. A device that waits for a rank which has ended would thus
    keep the thread that watches the ranks from running.

    Args:
        finish: waits for the current stream without Python's lock; None = only Paddle waits.

    Raises:
        CaptureError: this Paddle has no graphs.
    """

    def __init__(self, place: object, finish: Callable[[], None] | None = None) -> None:
        from paddle.base import core
        from paddle.device.cuda import graphs

        if not graphs.is_cuda_graph_supported():
            raise CaptureError("this build of Paddle has no CUDA graphs")
        self._place, self._new, self._finish = place, graphs.CUDAGraph, finish
        if str(place) not in MEMORY_POOLS:
            MEMORY_POOLS[str(place)] = core.CUDAGraph.gen_new_memory_pool_id()
        self._pool = MEMORY_POOLS[str(place)]

    def __call__(self, work: Callable[[], Any]) -> Captured:
        """Run `work` once, then capture it.

        Args:
            work: enqueues launches and returns tensors.

        Raises:
            CaptureError: `work` waits for the host, or the capture cannot begin.
            DeviceError: the capture failed half-way, and Paddle cannot continue.
        """
        import paddle

        with _without_fallback():
            try:
                work()
            except Exception as error:
                raise CaptureError(describe_error(error)) from error
        if self._finish is not None:
            self._finish()
        paddle.device.synchronize(self._place)
        graph = self._new(place=self._place, mode="thread_local", pool_id=self._pool)
        try:
            graph.capture_begin()
        except Exception as error:
            raise CaptureError(describe_error(error)) from error
        try:
            result = work()
        except Exception as error:
            with suppress(Exception):
                graph.capture_end()
            raise capture_failed(error) from error
        try:
            graph.capture_end()
        except Exception as error:
            raise capture_failed(error) from error
        # a graph that lives at exit ends the process with an error
        weakref.finalize(graph, _suppressed, graph._graph.reset)
        LASTING_GRAPHS.setdefault(str(self._place), graph)
        return result, graph.replay


def capture_failed(error: Exception) -> DeviceError:
    """Return the error of a failed capture, with the cure."""
    return DeviceError(f"capture of a step: {describe_error(error)}; start with --enforce-eager")


@contextmanager
def _without_fallback() -> Iterator[None]:
    """Make Paddle raise if it would compute on the host for a device."""
    import paddle

    before = paddle.get_flags([_FALLBACK])
    paddle.set_flags({_FALLBACK: False})
    try:
        yield
    finally:
        paddle.set_flags(before)


def _suppressed(free: Callable[[], object]) -> None:
    """Free a captured graph, and ignore its error."""
    with suppress(Exception):
        free()
