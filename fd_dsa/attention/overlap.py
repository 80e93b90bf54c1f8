"""Second stream of a layer: projections of the indexer alongside those of the attention.

The projections of the indexer are small, so in a step of few tokens they run alongside the
attention's own at little cost. In a step of many tokens both fill the device, and a fork only costs
time. An eager step is bound by the host, which launches each kernel, and a fork adds launches. By
default only captured steps fork.

Source: vLLM #39943.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS, overlap_max_tokens
from fd_dsa.errors import DeviceError, KernelUnavailable, OverlapError
from fd_dsa.tensor import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

Work = TypeVar("Work")
Side = TypeVar("Side")
_NOT_RUN: Any = object()


def _raised(error: KernelUnavailable) -> None:
    """Raise the error of a kernel without an alternative."""
    raise error


class IndexerOverlap:
    """Fork to the second stream of a device, one at a time for each backend.

    The first fork makes the second stream. A CPU and interpreted kernels have no second stream.

    Args:
        device: device of the tensors, see DSAAttentionBackend.
        max_tokens: max tokens of a step that forks, 0 = no step forks. None takes
            `fd_dsa.environment.overlap_max_tokens`; if that is unset too, only captured steps fork,
            up to DEFAULT_OVERLAP_MAX_TOKENS.

    Attributes:
        eager: True if steps outside of a capture fork, too.
        side_stream: second stream, None on a CPU; a placeholder before the first use.
    """

    def __init__(self, device: str, max_tokens: int | None = None) -> None:
        limit = overlap_max_tokens() if max_tokens is None else max_tokens
        self.eager = limit is not None
        if limit is None:
            limit = DEFAULT_OVERLAP_MAX_TOKENS
        self.max_tokens = 0 if device == "cpu" else limit
        self.side_stream: Any = _NOT_RUN
        self._is_open = False
        self._capturing: Callable[[], bool] | None = None

    def run(
        self,
        num_tokens: int,
        work: Callable[[], Work],
        project: Callable[..., Side],
        *args: Any,
        refuse: Callable[[KernelUnavailable], object] = _raised,
    ) -> tuple[Work, Side]:
        """Run `work()` and `project(*args)`, at the same time if the step forks.

        In a fork `project` runs on the second stream, after all work enqueued so far. Work enqueued
        after this call runs after both. In a capture fork and join become edges of the graph. In
        other steps `project` runs after `work`, on the current stream.

        If the kernel of `project` cannot be compiled, the step does not fork. `refuse` then selects
        another kernel, and `project` runs again.

        `project`, its arguments and its results are held until the join. `project` must return
        every tensor that it makes, or a view of it. Otherwise `work` may overwrite a temporary (see
        SideStream). In Paddle all threads share the device's current stream, so no other thread may
        enqueue work during the call.

        Args:
            num_tokens: tokens of the step, padding included.
            work, project: functions that do not wait for the device.
            args: arguments of `project`, a tensor of the backend's device first.
            refuse: called with the error of a failed compilation. It raises the error if there is
                no other kernel, as the default always does.

        Raises:
            OverlapError: called by `work` or `project` of another call.

        An error of either function ends the fork.
        """
        if self._is_open:
            raise OverlapError(
                "run: called inside of another run; forks cannot be nested; call it afterwards"
            )
        stream = None
        if 0 < num_tokens <= self.max_tokens and (self.eager or self._is_capturing(args[0])):
            stream = self.stream_for(args[0])
        self._is_open = True
        try:
            if stream is None:
                return work(), _projected(project, args, refuse)
            stream.begin()
            try:
                with _undone(stream.end, stream.join):
                    side = project(*args)
            except KernelUnavailable as error:
                # a kernel is compiled before it is enqueued, so the second stream is idle
                refuse(error)
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
            # the launcher is loaded only if a device is asked for
            from fd_dsa.device.transfers import transfers_for

            self._capturing = transfers_for(tensor).is_capturing
        return self._capturing()

    def stream_for(self, tensor: Tensor) -> Any:
        """Return the second stream of a tensor's device, None on a CPU."""
        if self.side_stream is _NOT_RUN:
            from fd_dsa.device.side_stream import side_stream_for

            self.side_stream = side_stream_for(tensor)
        return self.side_stream


def _projected(
    project: Callable[..., Side],
    args: tuple[object, ...],
    refuse: Callable[[KernelUnavailable], object],
) -> Side:
    """Run `project(*args)` without a fork, again after a failed compilation."""
    try:
        return project(*args)
    except KernelUnavailable as error:
        refuse(error)
        return project(*args)


@contextmanager
def _undone(*calls: Callable[[], None]) -> Iterator[None]:
    """Make these calls after an exception and suppress their own errors."""
    try:
        yield
    except BaseException:
        for call in calls:
            with suppress(DeviceError):
                call()
        raise
