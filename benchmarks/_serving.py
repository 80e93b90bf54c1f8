"""A served model for the benchmarks: the process, its client, and the processor time of both."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks._harness import ROOT, Worker, on_cpus
from fd_dsa.client.own_server import own_server

# as the worker `ours` builds its engine
_FLAGS = ("--max-num-seqs", "32", "--kv-cache-memory-bytes", "4G", "--log-level", "warning")


class Served:
    """A server and its client; a benchmark calls several of these alternately.

    Args:
        url: of the server, without a path.
        pid: of its process.
        client: a Worker of `benchmarks.workers.stream_client`.
    """

    def __init__(self, url: str, pid: int, client: Worker) -> None:
        self._url, self._pid, self._client = url, pid, client

    def generate(self, **case: Any) -> dict[str, Any]:
        """Streams of random prompts; what the client measures, and the server's processor time.

        Args:
            case: requests, prompt_tokens, new_tokens, seed.

        Returns:
            `seconds`, `client_cpu_s`, `tokens`, `step_ms` between the pieces of a stream,
            `serve_cpu_s` of the thread that serves and `cpu_s` of the whole server.
        """
        before = self._cpu_s()
        parts = urlsplit(self._url)
        answer = self._client.call(op="streams", host=parts.hostname, port=parts.port, **case)
        loop_s, all_s = (b - a for a, b in zip(before, self._cpu_s(), strict=True))
        return {**answer, "serve_cpu_s": loop_s, "cpu_s": all_s}

    def _cpu_s(self) -> tuple[float, float]:
        """Processor seconds of the main thread, which runs the event loop, and of the server."""
        threads = [
            t for pid in _with_children(self._pid) for t in Path(f"/proc/{pid}/task").iterdir()
        ]
        times = {int(t.name): int((t / "schedstat").read_text().split()[0]) for t in threads}
        return times[self._pid] / 1e9, sum(times.values()) / 1e9


def _with_children(pid: int) -> list[int]:
    """A process and those that it has started."""
    stats = [p.read_text() for p in Path("/proc").glob("[0-9]*/stat")]
    parents = {int(s.split()[0]): int(s.rpartition(")")[2].split()[1]) for s in stats}
    return [pid, *(child for child, parent in parents.items() if parent == pid)]


@contextlib.contextmanager
def served(
    checkout: Path = ROOT, cpus: set[int] | None = None, client_cpus: set[int] | None = None
) -> Iterator[Served]:
    """A server of the demo model with the package of a checkout, and its client.

    Args:
        checkout: whose `fd_dsa` serves.
        cpus, client_cpus: processors of the server and of the client; None = all.
    """
    before = Path.cwd()
    # the engine that a server is compared with has no target; a checkout without the flag warns
    os.environ["FD_DSA_TARGET_INTER_TOKEN_LATENCY_MS"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        with on_cpus(cpus or os.sched_getaffinity(0)):
            os.chdir(checkout)
            try:
                server = own_server(None, _FLAGS, Path(folder) / "server.log")
                running = server.__enter__()
            finally:
                os.chdir(before)
        try:
            with Worker("benchmarks.workers.stream_client", cpus=client_cpus) as client:
                yield Served(running.base_url.removesuffix("/v1"), running.pid, client)
        finally:
            server.__exit__(None, None, None)
