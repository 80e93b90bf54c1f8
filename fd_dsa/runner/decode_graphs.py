"""Decode steps as graphs: which there are, which one serves a step, and how they are captured.

Two of each padded number of tokens: one for steps none of whose rows is longer than `index_topk`,
in which nothing is scored or chosen, and one for rows of any length. Grids and buffers of both are
those of the longest rows that they may be replayed with, and lengths are read on the device. The
graph of a step holds all but the copy of its inputs, to addresses that never change. The draw of
the tokens is a graph of its own: it is queued with that of the step, or later where a row needs a
mask that the host is yet to make.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from fd_dsa.errors import DeviceError, describe_error

if TYPE_CHECKING:
    from collections.abc import Iterator

_FALLBACK = "FLAGS_enable_api_kernel_fallback"
# place -> pool of memory of all graphs of this process, and one of them, which stays: on an H200
# Paddle 3.3.1 jumped to freed memory when it took some after the last graph of a pool had gone, as
# if it still asked the pool's allocators, and does not since
_pools: dict[str, int] = {}
_lasting: dict[str, Any] = {}


class PaddedStep(NamedTuple):
    """What a graph is captured for.

    Attributes:
        num_tokens: of its grids; a step may have fewer.
        max_seqlen_k: longest row that its grids reach to, tokens.
    """

    num_tokens: int
    max_seqlen_k: int


class CapturedStep(NamedTuple):
    """A graph.

    Attributes:
        logits: float32 [num_tokens, vocab_size], which every replay fills.
        step: the runner's record of the padded step.
        replay: queues the graph.
        draw: queues that of the draw from its logits.
        hidden: normed hidden states, where a layer for multi-token prediction reads them.
        draft: queues that of the layer and the first drafts, if there is one.
        kept: hidden states that a further draft goes on from.
    """

    logits: Any
    step: Any
    replay: Callable[[], None]
    draw: Callable[[], None]
    hidden: Any = None
    draft: Callable[[], None] = lambda: None
    kept: Any = None


Captured = tuple[Any, Callable[[], None]]
"""What captured work returned, which every replay fills, and the replay."""
Capture = Callable[[Callable[[], Any]], Captured]


class CaptureRefused(RuntimeError):
    """No graph can be made of a step, and nothing is spoiled by the try."""


class DecodeGraphs(dict[PaddedStep, CapturedStep]):
    """The graphs of a runner.

    Args:
        sizes: numbers of tokens that steps are padded to.
        longest: longest row that there can be, tokens.
    """

    def __init__(self, sizes: Sequence[int], index_topk: int, longest: int) -> None:
        super().__init__()
        self.sizes = tuple(sorted(sizes))
        self._short, self._longest = min(index_topk, longest), longest

    def steps(self) -> list[PaddedStep]:
        """What is to be captured, the largest first: smaller ones then do with its memory."""
        lengths = sorted({self._longest, self._short}, reverse=True)
        return [PaddedStep(size, length) for size in reversed(self.sizes) for length in lengths]

    def fitting(self, num_tokens: int, max_seqlen_k: int) -> PaddedStep | None:
        """What a decode step is padded to; None where no graph is as large."""
        for size in self.sizes:
            if size >= num_tokens:
                short = max_seqlen_k <= self._short
                return PaddedStep(size, self._short if short else self._longest)
        return None


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
        if str(place) not in _pools:
            _pools[str(place)] = core.CUDAGraph.gen_new_memory_pool_id()
        self._pool = _pools[str(place)]

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
        _lasting.setdefault(str(self._place), graph)
        return result, graph.replay


def capture_failed(error: Exception) -> DeviceError:
    """What ends a start whose captures fail, with the cure."""
    return DeviceError(
        f"capture of a decode step: {describe_error(error)}; start with --enforce-eager"
    )


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
