"""The OpenAI server as a process: arguments, health, signals and exit status, without a model.

FAKE_FASTDEPLOY_DUMP names a file for what the process was started with, FAKE_FASTDEPLOY_SERVER a
JSON object of what it does (`Script`). After `entrypoints/openai/api_server.py`: the port opens
when the engine has loaded, /health is 404 while the engine is not well, workers run in sessions of
their own, and a server whose engine did not come up ends with status 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DUMP_VARIABLE = "FAKE_FASTDEPLOY_DUMP"
SCRIPT_VARIABLE = "FAKE_FASTDEPLOY_SERVER"
_WORKER = "import signal, time\nsignal.signal(15, {handler})\nwhile True: time.sleep(60)"


@dataclass(frozen=True)
class Script:
    """What this process does.

    Attributes:
        load_s: seconds before the port opens.
        load_until: a file for which it waits as well.
        unwell: GETs after that which are 404, whatever they ask for.
        say: lines for stdout and for stderr, at the start.
        exit_with: status with which it ends instead of opening the port; negative: signal -n.
        ignore: signals that it ignores; those it does not ignore end it.
        end_with: status after such a signal.
        counts: it ends only at the third signal.
        workers: processes it starts, each in a session of its own.
        stubborn: the workers ignore SIGTERM.
        imports: modules that it imports first.
        tokens: what every completion says; a request's `max_tokens` cuts it.
        tokens_upstream: the same with FD_DSA_DISABLE=1, where it is another.
        gap: log probability of `tokens` below that of `tokens_upstream`, as the latter sees it.
        step_s: seconds between two tokens of a stream.
    """

    load_s: float = 0.0
    load_until: str = ""
    unwell: int = 0
    say: tuple[str, str] = ("", "")
    exit_with: int | None = None
    ignore: tuple[str, ...] = ()
    end_with: int = 0
    counts: bool = False
    workers: int = 0
    stubborn: bool = False
    imports: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ("a", " b", " c")
    tokens_upstream: tuple[str, ...] | None = None
    gap: float = 0.0
    step_s: float = 0.0


def main() -> None:
    """Play the script."""
    script = Script(**json.loads(os.environ.get(SCRIPT_VARIABLE, "{}")))
    says = script.tokens
    if script.tokens_upstream is not None and os.environ.get("FD_DSA_DISABLE") == "1":
        says = script.tokens_upstream
    print(script.say[0], end="", flush=True)
    print(script.say[1], end="", flush=True, file=sys.stderr)
    for module in script.imports:
        importlib.import_module(module)
    workers = [_start_worker(script.stubborn) for _ in range(script.workers)]
    found = started_with(workers)
    _listen_to_signals(script)
    _write(found)
    time.sleep(script.load_s)
    while script.load_until and not Path(script.load_until).exists():
        time.sleep(0.02)
    if script.exit_with is not None:
        if script.exit_with < 0:
            os.kill(os.getpid(), -script.exit_with)
        sys.exit(script.exit_with)
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", default=8000, type=int)
    args, _ = parser.parse_known_args()
    _serve(args.host, args.port, script, says)


def _start_worker(stubborn: bool) -> int:
    handler = "signal.SIG_IGN" if stubborn else "signal.SIG_DFL"
    command = [sys.executable, "-c", _WORKER.format(handler=handler)]
    return subprocess.Popen(command, start_new_session=True).pid


def _listen_to_signals(script: Script) -> None:
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        print(f"signal {signal.Signals(number).name}", file=sys.stderr, flush=True)
        if not script.counts or len(received) == 3:
            # as a server that lets its requests end
            os._exit(script.end_with)

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN if name in script.ignore else end)


def started_with(workers: Sequence[int]) -> dict[str, Any]:
    """What this process was started with; `ignored` are signals which it must not ignore."""
    return {
        "module": "fastdeploy.entrypoints.openai.api_server",
        "argv": sys.argv[1:],
        "env": dict(os.environ),
        "pid": os.getpid(),
        "session": os.getsid(0),
        "ignored": [n for n in ("SIGINT", "SIGTERM") if _is_ignored(getattr(signal, n))],
        "workers": list(workers),
    }


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _write(found: dict[str, Any]) -> None:
    """Write the dump, whole or not at all, for the test that waits for it."""
    file = os.environ.get(DUMP_VARIABLE)
    if not file:
        return
    part = Path(f"{file}.part")
    part.write_text(json.dumps(found), "utf-8")
    part.rename(file)


def _serve(host: str, port: int, script: Script, says: Sequence[str]) -> None:
    unwell = script.unwell

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing: tests compare the output."""

        def do_GET(self) -> None:
            nonlocal unwell
            well = unwell == 0
            unwell -= not well
            self._answer(200 if well and self.path in ("/health", "/metrics") else 404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = says[: body.get("max_tokens")]
            if body.get("stream"):
                self._stream(tokens)
                return
            text, usage = "".join(tokens), {"completion_tokens": len(tokens)}
            choice: dict[str, Any] = {"text": text, "message": {"content": text}}
            if body.get("logprobs"):
                pairs = zip(tokens, script.tokens, strict=False)
                tops = [{o: -script.gap, t: 0.0} for t, o in pairs]
                choice["logprobs"] = {"tokens": list(tokens), "top_logprobs": tops}
            self._answer(200, {"choices": [choice], "usage": usage})

        def _stream(self, tokens: Sequence[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for token in tokens:
                time.sleep(script.step_s)
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
        # signals are handled in the main thread, which must not wait in the server's loop
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
