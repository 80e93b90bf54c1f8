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
        """Streams of random prompts; what the client measures, and the event loop's processor time.

        Args:
            case: requests, prompt_tokens, new_tokens, seed.

        Returns:
            `seconds`, `client_cpu_s`, `tokens`, and `serve_cpu_s` of the thread that serves.
        """
        before, parts = self._cpu_s(), urlsplit(self._url)
        answer = self._client.call(op="streams", host=parts.hostname, port=parts.port, **case)
        return {**answer, "serve_cpu_s": self._cpu_s() - before}

    def _cpu_s(self) -> float:
        """Processor seconds of the main thread, which runs the event loop."""
        times = Path(f"/proc/{self._pid}/task/{self._pid}/schedstat").read_text()
        return int(times.split()[0]) / 1e9


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
