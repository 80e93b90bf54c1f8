"""Worker: a client of streamed completions that does as little as a client can.

It parses only the last event of a stream.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from typing import Any

from benchmarks._harness import random_prompts

_VOCAB_SIZE = 4096
EVENT = b"data: {"
OPTIONS = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
"""Fields of a request whose answer is streamed and has a fixed length."""


def completion_request(body: dict[str, Any]) -> bytes:
    """Return the HTTP request of a completion, whose connection ends with the answer."""
    data = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
    )


class _Stream:
    """A request, and the end of its answer."""

    def __init__(self, host: str, port: int, body: dict[str, Any]) -> None:
        """Connect without sending."""
        self.request = completion_request(body)
        self.socket = socket.create_connection((host, port))
        self.tail = b""

    def read(self) -> bool:
        """Read available data. Returns False at the end of the answer."""
        data = self.socket.recv(1 << 16)
        self.tail = (self.tail + data)[-4096:]
        return bool(data)

    def num_tokens(self) -> int:
        """Return the number of tokens in the last event of the server.

        Raises:
            RuntimeError: the answer has no usage.
        """
        for line in reversed(self.tail.splitlines()):
            if line.startswith(EVENT) and b'"usage":{' in line:
                return int(json.loads(line[len(b"data: ") :])["usage"]["completion_tokens"])
        raise RuntimeError(f"no usage at the end of an answer: {self.tail[-300:]!r}")


def streams(
    host: str, port: int, requests: int, prompt_tokens: int, new_tokens: int, seed: int
) -> dict[str, Any]:
    """Return seconds for `requests` streams that begin together."""
    options = {"max_tokens": new_tokens, "stream_options": {"include_usage": True}, **OPTIONS}
    prompts = random_prompts(requests, prompt_tokens, _VOCAB_SIZE, seed)
    open_streams = [_Stream(host, port, {"prompt": p, **options}) for p in prompts]
    with selectors.DefaultSelector() as selector:
        for stream in open_streams:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        cpu, begin = time.process_time(), time.perf_counter()
        for stream in open_streams:
            stream.socket.sendall(stream.request)
        while selector.get_map():
            for key, _ in selector.select():
                if not key.data.read():
                    selector.unregister(key.fileobj)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    for stream in open_streams:
        stream.socket.close()
    tokens = sum(stream.num_tokens() for stream in open_streams)
    if tokens != requests * new_tokens:
        raise RuntimeError(f"the server returned {tokens} tokens, wanted {requests * new_tokens}")
    return {"seconds": seconds, "client_cpu_s": cpu, "tokens": tokens}
