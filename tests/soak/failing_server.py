"""A server process whose engine fails: python -m tests.soak.failing_server STEPS REQUESTS.

It fails after so many steps, the first of which waits until so many requests have come. The engine
and its thread are the real ones. Prints its URL when it serves.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.serve.server import DrainingServer, base_url, bind_socket
from fd_dsa.serve.state import ServerState
from tests.engine.fakes import make_engine


class CountingEngine(AsyncEngine):
    """Counts the requests that have come."""

    def __init__(self, engine: LLMEngine) -> None:
        super().__init__(engine)
        self.come = threading.Semaphore(0)

    async def generate(self, *args: Any) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request."""
        self.come.release()
        async with aclosing(super().generate(*args)) as outputs:
            async for output in outputs:
                yield output


def main() -> int:
    """Serve until the engine fails."""
    logging.basicConfig(stream=sys.stderr, level="INFO")
    inner = make_engine()
    inner.runner.fail_at = int(sys.argv[1])
    engine, run_step = CountingEngine(inner), inner.runner.execute_model

    def first_step(logits_indices: np.ndarray) -> np.ndarray:
        inner.runner.execute_model = run_step
        for _ in range(int(sys.argv[2])):
            assert engine.come.acquire(timeout=60)
        return run_step(logits_indices)

    inner.runner.execute_model = first_step
    with bind_socket("127.0.0.1", 0) as sock:

        def on_ready() -> None:
            print(base_url("127.0.0.1", sock), flush=True)

        state = ServerState(["demo"])
        return DrainingServer(state, lambda _: engine, 30, on_ready).serve_on(sock)


if __name__ == "__main__":
    sys.exit(main())
