"""The process of a rank of an engine whose devices are the test plug-in's."""

from __future__ import annotations

from tests.gpu_rig import load


def main() -> None:
    """Load what `fd_dsa.engine.rank` finds beside paddlepaddle-gpu, and go on there."""
    load("real")
    from custom_ops.build_library import build_library
    from fd_dsa import custom_ops
    from fd_dsa.engine import rank

    custom_ops.use_library(build_library())
    rank.main()


if __name__ == "__main__":
    main()
