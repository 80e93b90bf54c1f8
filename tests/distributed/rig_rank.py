"""The process of a rank of an engine whose devices are the test plug-in's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.gpu_rig import load

KILLED = "FD_DSA_RANK_KILLED"
"""Names a file that gets the time at which a rank is killed in its third capture."""


def be_killed_in_a_capture(file: Path) -> None:
    """Have this process killed when its third capture has the work and is not ended."""
    from fd_dsa.runner.step_graphs import PaddleCapture

    capture, numbers = PaddleCapture.__call__, iter(range(1 << 20))

    def call(self: PaddleCapture, work: Any) -> Any:
        # the work runs once before it is captured
        number, runs = next(numbers), iter(range(2))

        def watched() -> Any:
            result = work()
            if number == 2 and next(runs) == 1:
                file.write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return capture(self, watched)

    PaddleCapture.__call__ = call  # type: ignore[method-assign]


def main() -> None:
    """Load what `fd_dsa.startup.rank` finds beside paddlepaddle-gpu, and go on there."""
    load("real")
    from custom_ops.build_library import build_library
    from fd_dsa import custom_ops
    from fd_dsa.startup import rank

    custom_ops.use_library(build_library())
    if KILLED in os.environ:
        be_killed_in_a_capture(Path(os.environ[KILLED]))
    rank.main()


if __name__ == "__main__":
    main()
