"""The OpenAI server as a process: arguments, health and scripted answers, without a model.

FAKE_FASTDEPLOY_DUMP names a file for the arguments and environment of the process,
FAKE_FASTDEPLOY_SERVER has its `Script` as JSON. After `entrypoints/openai/api_server.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DUMP_VARIABLE = "FAKE_FASTDEPLOY_DUMP"
SCRIPT_VARIABLE = "FAKE_FASTDEPLOY_SERVER"


@dataclass(frozen=True)
class Script:
    """Process of the server.

    Attributes:
        say: text for stderr, at the start.
        exit_with: status with which it ends instead of opening the port.
        imports: modules that it imports first.
        tokens: tokens of every completion; a request's `max_tokens` cuts them.
    """

    say: str = ""
    exit_with: int | None = None
    imports: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ("a", " b", " c")


def main() -> None:
    """Play the script."""
    script = Script(**json.loads(os.environ.get(SCRIPT_VARIABLE, "{}")))
    print(script.say, end="", flush=True, file=sys.stderr)
    for module in script.imports:
        importlib.import_module(module)
    if DUMP_VARIABLE in os.environ:
        found = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}
        part = Path(f"{os.environ[DUMP_VARIABLE]}.part")
        part.write_text(json.dumps(found), "utf-8")
        part.rename(os.environ[DUMP_VARIABLE])
    if script.exit_with is not None:
        sys.exit(script.exit_with)
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", default=8000, type=int)
    args, _ = parser.parse_known_args()
    _serve(args.host, args.port, script)


def _serve(host: str, port: int, script: Script) -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing: tests compare the output."""

        def do_GET(self) -> None:
            self._answer(200 if self.path in ("/health", "/metrics") else 404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = script.tokens[: body.get("max_tokens")]
            if body.get("stream"):
                self._stream(tokens)
                return
            text = "".join(tokens)
            choice: dict[str, Any] = {"text": text, "message": {"content": text}}
            usage = {"completion_tokens": len(tokens)}
            self._answer(200, {"choices": [choice], "usage": usage})

        def _stream(self, tokens: Sequence[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for token in tokens:
                choice = {"text": token, "delta": {"content": token}, "finish_reason": None}
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer((host, port), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
