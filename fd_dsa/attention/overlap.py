"""Second stream of a layer: projections of the indexer alongside those of the attention.

The projections of the indexer are small and read their weights once, so in a step of few tokens
they cost little beside the attention's own. In a step of many tokens both fill the device, and a
fork only costs time. Without a captured graph it does too: the host launches each kernel and is the
slower side, and a fork is more work for it. By default only captured steps fork.

Source: vLLM #39943.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS, overlap_max_tokens
from fd_dsa.errors import DeviceError, KernelUnavailable, OverlapError
from fd_dsa.ops.providers import TRITON, device_kind, refuse
from fd_dsa.tensor import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

Work = TypeVar("Work")
Side = TypeVar("Side")
_NOT_RUN: Any = object()
_OPERATOR = "indexer_projection"


class IndexerOverlap:
    """Fork to the second stream of a device, one at a time for each backend.

    The second stream is made by the first fork of the process that uses it; never on a CPU, nor
    where kernels are interpreted.

    Args:
        device: of the tensors, as of DSAAttentionBackend.
        max_tokens: a step of more tokens does not fork, 0 = none does; None asks
            `fd_dsa.environment.overlap_max_tokens`. Where that says nothing either, steps fork in a
            capture alone, up to DEFAULT_OVERLAP_MAX_TOKENS; `eager`: in others, too.
    """

    def __init__(self, device: str, max_tokens: int | None = None) -> None:
        most = overlap_max_tokens() if max_tokens is None else max_tokens
        self.eager = most is not None
        if most is None:
            most = DEFAULT_OVERLAP_MAX_TOKENS
        self.max_tokens = 0 if device == "cpu" else most
        self.side_stream: Any = _NOT_RUN
        self._is_open = False
        self._capturing: Callable[[], bool] | None = None

    def run(
        self,
        num_tokens: int,
        work: Callable[[], Work],
        project: Callable[..., Side],
        *args: Any,
    ) -> tuple[Work, Side]:
        """Run `work()` and `project(*args)`, at the same time if the step forks.

        `project` then runs on the second stream, which first waits for all work queued so far, and
        what is queued after this call runs after both. In a capture fork and join become edges of
        the graph. In other steps `project` runs after `work`, on the current stream.

        If the kernel of `project` cannot be compiled, the step does not fork and `project` runs
        once more: another provider of the operator then serves.

        `project` and its arguments are held until the join, and so is what it returns. It must
        return every tensor that it makes, at least as the memory of what it returns: a temporary
        that it drops may be overwritten by the work beside it (see SideStream). On Paddle the
        device's current stream is that of all threads, so no other one may queue work meanwhile.

        Args:
            num_tokens: tokens of the step, padding included.
            work, project: neither may wait for the device.
            args: the first is a tensor of the backend's device.

        Raises:
            OverlapError: called by `work` or `project` of another call. After an error of either
                nothing stays forked.
        """
        if self._is_open:
            raise OverlapError(
                "run: called inside of another one, forks are not nested; call it after that"
            )
        stream = None
        if 0 < num_tokens <= self.max_tokens and (self.eager or self._is_capturing(args[0])):
            stream = self.stream_for(args[0])
        self._is_open = True
        try:
            if stream is None:
                return work(), _projected(project, args)
            stream.begin()
            try:
                with _undone(stream.end, stream.join):
                    side = project(*args)
            except KernelUnavailable as error:
                # compiled before it is queued, so nothing runs on the second stream
                refuse(_OPERATOR, device_kind(args[0]), TRITON, error)
                return work(), project(*args)
            stream.end()
            with _undone(stream.join):
                main = work()
            stream.join()
            return main, side
        finally:
            self._is_open = False

    @contextmanager
    def as_captured(self) -> Iterator[None]:
        """Fork eager steps inside as captured ones, for a warm-up before the captures."""
        before, self.eager = self.eager, True
        try:
            yield
        finally:
            self.eager = before

    def _is_capturing(self, tensor: Tensor) -> bool:
        """Return True while the current stream of a tensor's device is captured."""
        if self._capturing is None:
            # the launcher is loaded only where a device is asked for
            from fd_dsa.device.transfers import transfers_for

            self._capturing = transfers_for(tensor).is_capturing
        return self._capturing()

    def stream_for(self, tensor: Tensor) -> Any:
        """Return the second stream of a tensor's device, None on a CPU."""
        if self.side_stream is _NOT_RUN:
            from fd_dsa.device.side_stream import side_stream_for

            self.side_stream = side_stream_for(tensor)
        return self.side_stream


def _projected(project: Callable[..., Side], args: tuple[object, ...]) -> Side:
    """Run `project(*args)` without a fork, again after a failed compilation."""
    try:
        return project(*args)
    except KernelUnavailable as error:
        refuse(_OPERATOR, device_kind(args[0]), TRITON, error)
        return project(*args)


@contextmanager
def _undone(*calls: Callable[[], None]) -> Iterator[None]:
    """Make these calls after an exception. Their own errors are suppressed."""
    try:
        yield
    except BaseException:
        for call in calls:
            with suppress(DeviceError):
                call()
        raise
