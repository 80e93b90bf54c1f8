"""A server process over the fake engine: python -m tests.serve.fake_server STEP_S TIMEOUT_S.

Prints its curl line when it serves, then a line for each request that reaches the engine. A third
argument is the number of words after which the engine fails.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator

from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.serve.server import base_url, bind_socket, curl_line, run_server
from tests.serve.fake_engine import FakeEngine

NAME = 'it\'s a "model" ü'


class AnnouncingEngine(FakeEngine):
    """Prints a line when a request begins."""

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request."""
        print("running", request_id, flush=True)
        async for output in super().generate(prompt_token_ids, params, request_id):
            yield output


def main() -> int:
    """Serve until a signal."""
    logging.basicConfig(stream=sys.stderr, level="INFO")
    engine = AnnouncingEngine(step_s=float(sys.argv[1]), max_model_len=1000)
    if len(sys.argv) > 3:
        engine.fail_after = int(sys.argv[3])
    with bind_socket("127.0.0.1", 0) as sock:
        url = base_url("127.0.0.1", sock)

        def on_ready() -> None:
            print(curl_line(url, NAME, engine.max_model_len, chat=True), flush=True)

        return run_server(
            engine, [NAME], sock, shutdown_timeout_s=float(sys.argv[2]), on_ready=on_ready
        )


if __name__ == "__main__":
    sys.exit(main())
