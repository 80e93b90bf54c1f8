"""Short steps as graphs: which there are, which one serves a step, and how they are captured.

Of decode steps two of each padded number of tokens: one for steps none of whose rows is longer than
`index_topk`, in which nothing is scored or chosen, and one for rows of any length. Of steps that
hold prompts alone, one of each of a few numbers of keys, for rows within `index_topk`. Grids and
buffers are those of the longest rows that they may be replayed with, and lengths are read on the
device. The graph of a step holds all but the copy of its inputs, to addresses that never change.
The draw of the tokens is a graph of its own: it is queued with that of the step, or later where a
row needs a mask that the host is yet to make. So are the drafts after the first of each request.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fd_dsa.errors import DeviceError, describe_error
from fd_dsa.runner.input_batch import InputBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT_SIZES = (32, 64, 128, 256)
"""Captured sizes of short prompts, keys. The device bounds larger prompts, not the launches."""
MAX_PROMPTS = 8
"""Rows of a captured step of prompts."""
_FALLBACK = "FLAGS_enable_api_kernel_fallback"
# place -> memory pool of all graphs of this process, and one graph, which stays: on an H200
# Paddle 3.3.1 jumped to freed memory when it took some after the last graph of a pool had gone, as
# if it still asked the pool's allocators, and does not since
MEMORY_POOLS: dict[str, int] = {}
LASTING_GRAPHS: dict[str, Any] = {}


class PaddedStep(NamedTuple):
    """What a graph is captured for.

    Attributes:
        num_tokens: of its grids; a step may have fewer.
        max_seqlen_k: longest row that its grids reach to, tokens.
        num_prompts: rows of a step of prompts, at most; 0: it is for decode steps.
    """

    num_tokens: int
    max_seqlen_k: int
    num_prompts: int = 0

    @property
    def num_sampled(self) -> int:
        """Tokens whose logits it makes."""
        return self.num_prompts or self.num_tokens

    def prompt_lengths(self, num_rows: int) -> tuple[np.ndarray, ...]:
        """Lengths of rows that need the largest grids, as `host_lengths` of a Step."""
        new = np.zeros(num_rows, np.int32)
        new[: self.num_prompts - 1] = 1
        new[-1] = self.num_tokens - new[:-1].sum()
        return new, np.zeros_like(new), new


class QueuedStep(NamedTuple):
    """A step whose logits are queued, and what queues its draw and drafts; or graphs of all that.

    Attributes:
        step: the runner's record; of a graph that of the padded step.
        logits: float32 [n, vocab_size], None of no token.
        hidden: normed hidden states, where a layer for multi-token prediction reads them.
        draw: queues the draw from its logits.
        draft: queues that layer and the first drafts of so many requests.
        replay: queues the graph, which fills logits and hidden states.
    """

    step: Any
    logits: Any
    hidden: Any
    draw: Callable[[], None]
    draft: Callable[[int], None]
    replay: Callable[[], None] = lambda: None


Captured = tuple[Any, Callable[[], None]]
"""What captured work returned, which every replay fills, and the replay."""
Capture = Callable[[Callable[[], Any]], Captured]


class CaptureRefused(RuntimeError):
    """No graph can be made of a step, and nothing is spoiled by the try."""


class StepGraphs(dict[PaddedStep, QueuedStep]):
    """The graphs of a runner.

    Args:
        sizes: numbers of tokens that decode steps are padded to.
        longest: longest row that there can be, tokens.
        prompt_sizes: numbers of keys that steps of prompts are padded to; those that rows within
            `index_topk` can have are captured.
        most_prompts: rows of such a step.

    Attributes:
        drafts: queue further drafts, by their rows, the longest one, and drafts of each in all.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        index_topk: int,
        longest: int,
        prompt_sizes: Sequence[int] = (),
        most_prompts: int = 1,
    ) -> None:
        super().__init__()
        self.drafts: dict[tuple[int, int, int], Callable[[], None]] = {}
        self.sizes = tuple(sorted(sizes))
        self._short, self._longest = min(index_topk, longest), longest
        self._prompts = [
            PaddedStep(size, self._short, most_prompts)
            for size in sorted(prompt_sizes)
            if size <= self._short
        ]

    def steps(self) -> list[PaddedStep]:
        """What is to be captured, the largest first: smaller ones then do with its memory."""
        lengths = {self._longest, self._short}
        decode = [PaddedStep(size, length) for size in self.sizes for length in lengths]
        return sorted(decode + self._prompts, reverse=True)

    def more_drafts(self, rows: int, longest: int, count: int) -> Callable[[], None] | None:
        """What queues the further drafts of so many requests; None where no graph does."""
        fits = (k for k in self.drafts if k[0] >= rows and k[1] >= longest and k[2] == count)
        return self.drafts[key] if (key := min(fits, default=None)) else None

    def fitting(self, batch: InputBatch, sampled: np.ndarray) -> PaddedStep | None:
        """What the step in a batch is padded to; None where no graph serves it.

        Args:
            sampled: int64 [n]; flat tokens whose logits are wanted: of a decode step all.
        """
        tokens, length = batch.num_tokens, batch.max_seqlen_k
        if batch.num_prefill_tokens:
            keys = tokens + batch.seq_lens_decoder.sum()
            rows = max(np.count_nonzero(batch.seq_lens_this_time), len(sampled))
            if batch.num_prefill_tokens < tokens or length > self._short or not len(sampled):
                return None
            fits = (p for p in self._prompts if keys <= p.num_tokens and rows <= p.num_prompts)
            return next(fits, None)
        if sampled.tolist() != list(range(tokens)):
            return None
        longest = self._short if length <= self._short else self._longest
        return next((PaddedStep(s, longest) for s in self.sizes if s >= tokens), None)


class PaddleCapture:
    """Captures by Paddle's CUDAGraph; all graphs of a process share one pool of memory.

    A refused operation during a capture by Paddle is fatal to the process. So the work runs before,
    and whatever Paddle would do on the host instead of a device is refused there.

    Raises:
        CaptureRefused: this Paddle has no graphs.
    """

    def __init__(self, place: Any) -> None:
        from paddle.base import core
        from paddle.device.cuda import graphs

        if not graphs.is_cuda_graph_supported():
            raise CaptureRefused("this build of Paddle has no CUDA graphs")
        self._place, self._new = place, graphs.CUDAGraph
        if str(place) not in MEMORY_POOLS:
            MEMORY_POOLS[str(place)] = core.CUDAGraph.gen_new_memory_pool_id()
        self._pool = MEMORY_POOLS[str(place)]

    def __call__(self, work: Callable[[], Any]) -> Captured:
        """Run `work` once, then capture it.

        Args:
            work: queues launches and returns tensors.

        Raises:
            CaptureRefused: `work` waits for the host, or the capture cannot begin.
            DeviceError: work was refused inside of the capture, or no graph came of it; Paddle
                cannot go on.
        """
        import paddle

        with _without_fallback():
            try:
                work()
            except Exception as error:
                raise CaptureRefused(describe_error(error)) from error
        paddle.device.synchronize(self._place)
        graph = self._new(place=self._place, mode="thread_local", pool_id=self._pool)
        try:
            graph.capture_begin()
        except Exception as error:
            raise CaptureRefused(describe_error(error)) from error
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
        weakref.finalize(graph, _reset, graph._graph)
        LASTING_GRAPHS.setdefault(str(self._place), graph)
        return result, graph.replay


def capture_failed(error: Exception) -> DeviceError:
    """What ends a start whose captures fail, with the cure."""
    return DeviceError(f"capture of a step: {describe_error(error)}; start with --enforce-eager")


@contextmanager
def _without_fallback() -> Iterator[None]:
    """Inside, Paddle raises where it would compute on the host for a device."""
    import paddle

    before = paddle.get_flags([_FALLBACK])
    paddle.set_flags({_FALLBACK: False})
    try:
        yield
    finally:
        paddle.set_flags(before)


def _reset(graph: Any) -> None:
    """Free a captured graph."""
    with suppress(Exception):
        graph.reset()
