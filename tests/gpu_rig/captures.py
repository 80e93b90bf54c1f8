"""What captures decode steps in a session: Paddle's graphs, or a stand-in where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fd_dsa.runner.decode_graphs import CapturedStep, PaddleCapture
from tests.gpu_rig.rig import Rig


def stand_in(place: Any) -> Callable[[Callable[[], Any]], CapturedStep]:
    """Work that is run again and leaves its result where the capture left it."""

    def capture(work: Callable[[], Any]) -> CapturedStep:
        work()
        result = work()

        def replay() -> None:
            again = work()
            if again is not result:
                result.copy_(again, False)

        return CapturedStep(result, replay)

    return capture


def capture_of(rig: Rig) -> Callable[[Any], Any]:
    """What captures in this session."""
    return PaddleCapture if rig.is_real else stand_in
