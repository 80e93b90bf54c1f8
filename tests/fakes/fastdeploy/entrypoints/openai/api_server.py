"""`python -m fastdeploy.entrypoints.openai.api_server`, as far as a launcher sees it.

Says what it was started with, answers /health and /v1/models, and ends by a signal. A test steers
it through the environment:

FAKE_FASTDEPLOY_DUMP: file for {"module", "argv", "env", "pid"} as JSON.
FAKE_FASTDEPLOY_CRASH: exit with this status at once, before anything listens.
FAKE_FASTDEPLOY_EXIT: status after SIGTERM or SIGINT; 0 without it.
FAKE_FASTDEPLOY_SLOW: seconds of start-up in which /health is refused with 503.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PREFIXES = ("FD_", "FAKE_", "CUDA_", "PYTHON")


def dump(module: str) -> None:
    """Write what this process was started with, whole or not at all."""
    path = os.environ.get("FAKE_FASTDEPLOY_DUMP")
    if path:
        env = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
        started = {"module": module, "argv": sys.argv[1:], "env": env, "pid": os.getpid()}
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(started, file)
        os.replace(f"{path}.part", path)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags that this server acts on; all others are taken as they are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="default")
    parser.add_argument("--served-model-name", nargs="+")
    return parser.parse_known_args(argv)[0]


def _handler(arguments: argparse.Namespace, ready_at: float) -> type[BaseHTTPRequestHandler]:
    names = arguments.served_model_name or [arguments.model]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if time.monotonic() < ready_at:
                self._answer(503, {"error": "starting"})
            elif self.path == "/health":
                self._answer(200, {})
            elif self.path == "/v1/models":
                models = [{"id": name, "object": "model"} for name in names]
                self._answer(200, {"object": "list", "data": models})
            else:
                self._answer(404, {"error": self.path})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            print(f"api_server: {format % args}", flush=True)

    return Handler


def main() -> int:
    """Serve until a signal; the status to exit with."""
    dump("fastdeploy.entrypoints.openai.api_server")
    crash = os.environ.get("FAKE_FASTDEPLOY_CRASH")
    if crash:
        print("api_server: failed to start the engine", flush=True)
        return int(crash)
    arguments = parse(sys.argv[1:])
    ready_at = time.monotonic() + float(os.environ.get("FAKE_FASTDEPLOY_SLOW", "0"))
    server = ThreadingHTTPServer((arguments.host, arguments.port), _handler(arguments, ready_at))

    def stop(number: int, frame: Any) -> None:
        print(f"api_server: {signal.Signals(number).name}", flush=True)
        # the loop waits for the handler to return, so another thread ends it
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"api_server: http://{arguments.host}:{arguments.port}", flush=True)
    server.serve_forever(poll_interval=0.05)
    server.server_close()
    print("api_server: stopped", flush=True)
    return int(os.environ.get("FAKE_FASTDEPLOY_EXIT", "0"))


if __name__ == "__main__":
    sys.exit(main())
