"""An HTTP server in a thread whose answers are scripted, for what a good server never does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]
MODELS: Reply = (200, {}, {"data": [{"id": "demo", "max_model_len": 2048}]})


def chat(text: str | None, reason: str | None = "stop", tokens: int = 3) -> Reply:
    """A good answer."""
    choice = {"message": {"content": text}, "finish_reason": reason}
    return (
        200,
        {},
        {"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": tokens}},
    )


def aborted() -> Reply:
    """The stream of an answer that a server ends when it shuts down, for chats and completions."""
    choices = {"delta": {"content": "half"}, "finish_reason": None}, {"delta": {}}
    lines = [{"choices": [choices[0]]}, {"choices": [choices[1] | {"finish_reason": "abort"}]}]
    return 200, {}, b"".join(b"data: %s\n\n" % json.dumps(line).encode() for line in lines)


def asked(body: dict[str, Any]) -> str:
    """The user's turn of a request."""
    return str(body["messages"][-1]["content"])


@dataclass
class Scripted:
    """A running server.

    Attributes:
        base_url: with `/v1`.
        bodies: of all requests to /chat/completions, as they came.
        headers: of the same requests.
        most: requests that were there at one time.
    """

    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most: int = 0
    running: int = 0


@contextmanager
def scripted(
    answer: Callable[[dict[str, Any]], Reply], pages: dict[str, Reply] | None = None
) -> Iterator[Scripted]:
    """Serve until the block ends.

    Args:
        answer: of a request's body, in a thread of the request.
        pages: path -> reply to GET; /v1/models has the model `demo` unless it is there.
    """
    known = {"/v1/models": MODELS, **(pages or {})}
    seen, lock = Scripted(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*known.get(self.path, (404, {}, {"error": {"message": "no such path"}})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen.bodies.append(body)
                seen.headers.append({k.lower(): v for k, v in self.headers.items()})
                seen.running += 1
                seen.most = max(seen.most, seen.running)
            try:
                reply = answer(body)
            finally:
                with lock:
                    seen.running -= 1
            self._send(*reply)

        def _send(self, status: int, headers: dict[str, str], content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            # the client may be gone
            with suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    seen.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
