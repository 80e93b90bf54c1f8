"""A server process whose engine fails in a step: python -m tests.soak.failing_server STEPS.

The engine and its thread are the real ones. Prints its URL when it serves.
"""

from __future__ import annotations

import logging
import sys

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.serve.server import base_url, bind_socket, run_server
from tests.engine.fakes import make_engine


def main() -> int:
    """Serve until the engine fails."""
    logging.basicConfig(stream=sys.stderr, level="INFO")
    engine = make_engine()
    engine.runner.fail_at = int(sys.argv[1])
    with bind_socket("127.0.0.1", 0) as sock:
        return run_server(
            lambda _: AsyncEngine(engine),
            ["demo"],
            sock,
            shutdown_timeout_s=30,
            on_ready=lambda: print(base_url("127.0.0.1", sock), flush=True),
        )


if __name__ == "__main__":
    sys.exit(main())
