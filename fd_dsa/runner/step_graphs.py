"""CUDA graphs of short steps: their sizes, the choice of a graph for a step, and the capture.

Decode steps have two graphs per padded number of tokens. The short graph is for steps whose rows
all have at most `index_topk` keys, so it scores and selects no keys. The long graph is for rows of
any length. Prefill steps of rows within `index_topk` have one graph for each of a few numbers of
keys. Grids and buffers fit the longest rows that a graph may be replayed with, and lengths are read
on the device.

The graph of a step contains all work but the copy of its inputs, to addresses that never change.
Sampling is a graph of its own, enqueued with the graph of the step. It is enqueued later if a row
needs a mask that depends on the tokens of the step before. Drafts after the first one of each
request are graphs of their own too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fd_dsa.errors import DeviceError, describe_error
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
        num_prompts: maximum number of rows of a prefill step; 0 = the graph is for decode steps.
    """

    num_tokens: int
    max_seqlen_k: int
    num_prompts: int = 0

    @property
    def num_sampled(self) -> int:
        """Number of tokens whose logits the graph computes."""
        return self.num_prompts or self.num_tokens

    def prompt_lengths(self, num_rows: int) -> tuple[np.ndarray, ...]:
        """Return lengths of rows that need the largest grids, as in `Step.host_lengths`."""
        new = np.zeros(num_rows, np.int32)
        new[: self.num_prompts - 1] = 1
        new[-1] = self.num_tokens - new[:-1].sum()
        return new, np.zeros_like(new), new


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
        longest: maximum length of a row, tokens.
        prompt_sizes: numbers of keys that prefill steps are padded to. Sizes above `index_topk` are
            not captured.
        max_prompts: maximum number of rows of a prefill step.

    Attributes:
        drafts: graphs of further drafts, by number of rows, length of the longest row, and number
            of drafts of each request.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        index_topk: int,
        longest: int,
        prompt_sizes: Sequence[int] = (),
        max_prompts: int = 1,
    ) -> None:
        super().__init__()
        self.drafts: dict[tuple[int, int, int], Callable[[], None]] = {}
        self.sizes = tuple(sorted(sizes))
        self._short, self._longest = min(index_topk, longest), longest
        self._prompts = [
            GraphKey(size, self._short, max_prompts)
            for size in sorted(prompt_sizes)
            if size <= self._short
        ]

    def steps(self) -> list[GraphKey]:
        """Return the keys to capture, the largest first, so that smaller ones reuse its memory."""
        lengths = {self._longest, self._short}
        decode = [GraphKey(size, length) for size in self.sizes for length in lengths]
        return sorted(decode + self._prompts, reverse=True)

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
        tokens, length = batch.num_tokens, batch.max_seqlen_k
        if batch.num_prefill_tokens:
            keys = tokens + batch.num_computed_tokens.sum()
            rows = max(int(np.count_nonzero(batch.num_scheduled_tokens)), len(sampled))
            if batch.num_prefill_tokens < tokens or length > self._short or not len(sampled):
                return None
            prompts = (p for p in self._prompts if keys <= p.num_tokens and rows <= p.num_prompts)
            return next(prompts, None)
        if sampled.tolist() != list(range(tokens)):
            return None
        longest = self._short if length <= self._short else self._longest
        return next((GraphKey(s, longest) for s in self.sizes if s >= tokens), None)


class PaddleCapture:
    """Capture by Paddle's CUDAGraph, with one memory pool for all graphs of a process.

    An operation that Paddle refuses during a capture is fatal to the process. So the work runs once
    before it, and raises there if Paddle would compute on the host instead of the device.

    Raises:
        CaptureError: this Paddle has no graphs.
    """

    def __init__(self, place: object) -> None:
        from paddle.base import core
        from paddle.device.cuda import graphs

        if not graphs.is_cuda_graph_supported():
            raise CaptureError("this build of Paddle has no CUDA graphs")
        self._place, self._new = place, graphs.CUDAGraph
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
