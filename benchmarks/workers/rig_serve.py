"""`python -m fd_dsa.serve` with the test plug-in's device, by the same flags.

FD_DSA_RIG is the plug-in's form, "real" by default. The engine's process, which needs the plug-in,
is this module again.
"""

from __future__ import annotations

import os
import sys
from typing import Any

ENGINE = "engine"
_DEVICE = "hopper:0"


def load_device() -> None:
    """Load the plug-in and, on a GPU, the custom operators. Call it before Paddle's import."""
    from tests.gpu_rig import load

    if load(os.environ.get("FD_DSA_RIG", "real")).is_real:
        from custom_ops.build_library import build_library
        from fd_dsa import custom_ops

        custom_ops.use_library(build_library())
    from fd_dsa.startup.ranks import Ranks

    Ranks.COMMAND = (sys.executable, "-m", "tests.distributed.rig_rank")


def serve(module: str, flags: list[str], *, on_rig: bool = True) -> Any:
    """Run a server whose engine is a process of `module`. Returns the exit status."""
    from fd_dsa.serve import cli
    from fd_dsa.serve import flags as server_flags
    from fd_dsa.serve.engine_process import EngineProcess

    EngineProcess.COMMAND = (sys.executable, "-m", module, ENGINE)
    if on_rig:
        server_flags._CHOICES["device"] = (_DEVICE,)
        flags = [*flags, "--device", _DEVICE]
    return cli.main(flags)


def main() -> Any:
    """Serve, or run the engine of a server. Returns the exit status."""
    if sys.argv[1:2] == [ENGINE]:
        load_device()
        from fd_dsa.serve import engine_child

        del sys.argv[1]
        return engine_child.main()
    return serve("benchmarks.workers.rig_serve", sys.argv[1:])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
