"""`python -m fd_dsa.serve` with the test plug-in's device, by the same flags.

FD_DSA_RIG is the plug-in's form, "real" by default. The engine's process, which needs the plug-in,
is this module again.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_ENGINE = "engine"
_DEVICE = "hopper:0"


def main() -> Any:
    """Serve, or be the engine of a server; returns the exit status."""
    if sys.argv[1:2] == [_ENGINE]:
        from tests.gpu_rig import load

        if load(os.environ.get("FD_DSA_RIG", "real")).is_real:
            from custom_ops.build_library import build_library
            from fd_dsa import custom_ops

            custom_ops.use_library(build_library())
        from fd_dsa.engine.ranks import Ranks
        from fd_dsa.serve import engine_child

        Ranks.COMMAND = (sys.executable, "-m", "tests.distributed.rig_rank")
        del sys.argv[1]
        return engine_child.main()
    from fd_dsa.serve import cli, flags
    from fd_dsa.serve.engine_process import EngineProcess

    EngineProcess.COMMAND = (sys.executable, "-m", "benchmarks.workers.rig_serve", _ENGINE)
    flags._CHOICES["device"] = (_DEVICE,)
    return cli.main([*sys.argv[1:], "--device", _DEVICE])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
