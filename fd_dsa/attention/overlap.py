"""Work of a layer on a second stream: the indexer's projections run beside those of the attention.

    with overlap.fork(num_tokens, project, hidden_states) as side:
        qkv = ...                   # at the same time as project(hidden_states)
        index_k, weights = side.join()

The projections of the indexer are small and read their weights once, so in a step of few tokens
they cost little beside the attention's own. In a step of many tokens both fill the device, and a
fork only costs time. Without a captured graph it does too: the host launches each kernel and is the
slower side, and a fork is more work for it. By default only captured steps fork.

Source: vLLM #39943.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS, overlap_max_tokens
from fd_dsa.errors import DeviceError, OverlapError

_NOT_RUN: Any = object()


class IndexerOverlap:
    """Forks work to the second stream of a device, one fork at a time; one object a backend.

    The second stream is made by the first fork of the process that uses it; never on a CPU, nor
    where kernels are interpreted.

    Args:
        device: of the tensors, as of DSAAttentionBackend; only "cpu" makes a difference here.
        max_tokens: a step of more tokens does not fork, 0 = none does; None asks
            `fd_dsa.environment.overlap_max_tokens`. Where that says nothing either, steps fork in a
            capture alone, up to DEFAULT_OVERLAP_MAX_TOKENS.

    Attributes:
        max_tokens: as above, 0 on a CPU.
        eager: steps fork outside of captures, too.
    """

    def __init__(self, device: str, max_tokens: int | None = None) -> None:
        most = overlap_max_tokens() if max_tokens is None else max_tokens
        self.eager = most is not None
        if most is None:
            most = DEFAULT_OVERLAP_MAX_TOKENS
        self.max_tokens = 0 if device == "cpu" else most
        self.side_stream: Any = _NOT_RUN
        self.current: Fork | None = None
        self._capturing: Callable[[], bool] | None = None

    def fork(self, num_tokens: int, project: Callable[..., Any], *args: Any) -> Fork:
        """A `with` block during which `project(*args)` runs, begun where the block begins.

        In a step that forks it runs on the second stream, which first waits for all work queued so
        far; else on the current stream when it is joined. In a capture fork and join become edges
        of the graph.

        `project` and its arguments are held until the join, and so is what it returns. It must
        return every tensor that it makes, at least as the memory of what it returns: a temporary
        that it drops may be overwritten by the work beside it (see SideStream). One GEMM for each
        tensor makes no temporary. On Paddle the device's current stream is that of all threads, so
        no other thread may queue work during a fork.

        Args:
            num_tokens: tokens of the step, padding included.
            project: makes the results; must not wait for the device.
            args: its arguments; the first is a tensor of the backend's device.
        """
        forks = 0 < num_tokens <= self.max_tokens and (self.eager or self._is_capturing(args[0]))
        return Fork(self, forks, project, args)

    def _is_capturing(self, tensor: Any) -> bool:
        """True while the current stream of a tensor's device is captured; asked in every layer."""
        if self._capturing is None:
            # the launcher is loaded only where a device is asked for
            from fd_dsa.triton_runtime.streams import capture_query

            self._capturing = capture_query(tensor)
        return self._capturing()

    def stream_for(self, tensor: Any) -> Any:
        """The second stream beside a tensor's, None where there is none."""
        if self.side_stream is _NOT_RUN:
            from fd_dsa.triton_runtime.streams import side_stream_for

            self.side_stream = side_stream_for(tensor)
        return self.side_stream


class Fork:
    """One fork: a `with` block, inside of which it is joined once."""

    __slots__ = ("_args", "_forks", "_overlap", "_project", "_result", "_stream")

    def __init__(
        self, overlap: IndexerOverlap, forks: bool, project: Callable[..., Any], args: Any
    ) -> None:
        self._overlap, self._forks = overlap, forks
        self._project: Callable[..., Any] | None = project
        self._args, self._result, self._stream = args, None, None

    def __enter__(self) -> Fork:
        """Begin.

        Raises:
            OverlapError: a fork of the same overlap is open, or this one was begun before.
        """
        overlap = self._overlap
        if overlap.current is not None or self._project is None:
            raise OverlapError(
                "fork: another one is open, or this one has run; forks are not nested, and each is "
                "one `with` block: leave the block before the next fork"
            )
        overlap.current = self
        try:
            if self._forks:
                self._stream = overlap.stream_for(self._args[0])
            if self._stream is not None:
                self._begin(self._stream, self._project)
        except BaseException:
            self._close()
            raise
        return self

    def join(self) -> Any:
        """What `project` returned; later work of the current stream runs after it.

        Raises:
            OverlapError: joined before, or outside of the `with` block.
        """
        project, stream = self._project, self._stream
        if project is None or self._overlap.current is not self:
            raise OverlapError(
                "join: allowed is one, inside of the `with` block of its fork; keep the result"
            )
        self._project = None
        if stream is None:
            return project(*self._args)
        stream.join()
        return self._result

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; after an exception the stream is joined back and the results are dropped.

        Raises:
            OverlapError: the block ended without a join.
        """
        unjoined, stream = self._project is not None, self._stream
        self._close()
        if not unjoined:
            return
        if stream is not None:
            # a capture that has failed refuses it; the error on its way is the one to show
            with suppress(DeviceError):
                stream.join()
        if kind is None:
            raise OverlapError(
                "fork: the `with` block ended without join, allowed is one join in each; the "
                "results were dropped"
            )

    def _begin(self, stream: Any, project: Callable[..., Any]) -> None:
        """Run `project` on the second stream; an exception leaves nothing forked."""
        stream.begin()
        try:
            self._result = project(*self._args)
        except BaseException:
            for step in (stream.end, stream.join):
                with suppress(DeviceError):
                    step()
            raise
        stream.end()

    def _close(self) -> None:
        """The next fork may begin; nothing is held any longer."""
        self._overlap.current = None
        self._project = self._stream = self._args = self._result = None
