"""A server that speaks as much of a hub's API as huggingface_hub's downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
LARGE = ".safetensors"


@dataclass
class Hub:
    """A running hub with one model, org/model.

    Attributes:
        url: for HF_ENDPOINT.
        files: path -> bytes.
        ranges: of the requests for large files, from which byte on.
        cuts: bytes of a large file after which the connection is closed, one for each request.
        listed: size of every file in the list of files; None = the true ones.
        headers: of the answers about files, in place of the true ones.
        patch: fields of each listed file and of the model, in place of the true ones.
        is_endless: each page of a list of files names a further one.
        silence_s: wait before an answer.
        asked: number of requests so far.
        damaged: whether large files are sent with another first byte.
    """

    files: dict[str, bytes]
    url: str = ""
    ranges: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    listed: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    patch: dict[str, Any] = field(default_factory=dict)
    is_endless: bool = False
    silence_s: float = 0.0
    asked: int = 0
    damaged: bool = False


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": oid, "size": len(data)}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def hub_of(folder: Path) -> Iterator[Hub]:
    """Serve the files of a folder until the block ends."""
    hub = Hub({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked += 1
            time.sleep(hub.silence_s)
            if path.startswith("/api/models/org/model/tree/"):
                entries = [{**_entry(*item), **hub.patch} for item in hub.files.items()]
                more = {"Link": f'<{hub.url}{path}?cursor=x>; rel="next"'} if hub.is_endless else {}
                self._json(entries, more)
            elif path.startswith("/api/models/org/model"):
                sizes = {name: len(data) for name, data in hub.files.items()}
                if hub.listed is not None:
                    sizes = dict.fromkeys(sizes, hub.listed)
                siblings = [
                    {"rfilename": name, "size": size, **hub.patch} for name, size in sizes.items()
                ]
                self._json({"id": "org/model", "sha": COMMIT, "siblings": siblings, **hub.patch})
            elif found := re.fullmatch("/org/model/resolve/[^/]+/(.*)", path):
                self._file(found[1])
            else:
                headers = {"X-Error-Code": "RepoNotFound"}
                self._send(404 if "none" in path else 401, b"{}", headers)

        def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
            kind = {"Content-Type": "application/json"}
            self._send(200, json.dumps(value).encode(), {**kind, **(headers or {})})

        def _file(self, name: str) -> None:
            data = hub.files[name]
            entry = _entry(name, data)
            headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": COMMIT}
            start, status, large = 0, 200, "lfs" in entry
            if large:
                headers["X-Linked-Etag"] = f'"{entry["lfs"]["oid"]}"'
                headers["X-Linked-Size"] = str(len(data))
            headers.update(hub.headers)
            if wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start, status = int(wanted[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if large and self.command == "GET":
                hub.ranges.append(start)
                data = bytes([data[0] ^ hub.damaged]) + data[1:]
            sent = data[start:]
            is_cut = large and hub.cuts and self.command == "GET"
            self._send(status, sent, headers, hub.cuts.pop(0) if is_cut else None)

        def _send(
            self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(OSError):
                    self.wfile.write(data[:cut])
                if cut is not None:
                    self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
