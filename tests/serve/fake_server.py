"""A server process over the fake engine: python -m tests.serve.fake_server STEP_S TIMEOUT_S.

Prints its curl line when it serves, then a line for each request that reaches the engine. A third
argument is the number of words after which the engine fails. The text "stall" is never tokenized.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.serve.server import base_url, bind_socket, curl_line, run_server
from fd_dsa.serve.state import ServerState
from tests.serve.fake_engine import FakeEngine, FakeRenderer, FakeTokenizer

NAME = 'it\'s a "model" ü'


class StallingTokenizer(FakeTokenizer):
    """Does not come to an end with one text."""

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """As the fake one, after an hour."""
        if text == "stall":
            print("stalled", flush=True)
            time.sleep(3600)
        return super().encode(text, add_special_tokens, max_tokens)


class AnnouncingEngine(FakeEngine):
    """Prints a line when a request begins."""

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request."""
        print("running", request_id, flush=True)
        async with aclosing(super().generate(prompt_token_ids, params, request_id)) as outputs:
            async for output in outputs:
                yield output


def main() -> int:
    """Serve until a signal."""
    logging.basicConfig(stream=sys.stderr, level="INFO")
    engine = AnnouncingEngine(step_s=float(sys.argv[1]), max_model_len=1000)
    engine.tokenizer = StallingTokenizer(FakeRenderer())
    if len(sys.argv) > 3:
        engine.fail_after = int(sys.argv[3])
    with bind_socket("127.0.0.1", 0) as sock:
        url = base_url("127.0.0.1", sock)

        def on_ready() -> None:
            print(curl_line(url, NAME, engine.max_model_len, chat=True), flush=True)

        return run_server(
            ServerState(None, [NAME]),
            lambda _: engine,
            sock,
            shutdown_timeout_s=float(sys.argv[2]),
            on_ready=on_ready,
            forced_exit_s=8,
        )


if __name__ == "__main__":
    sys.exit(main())
