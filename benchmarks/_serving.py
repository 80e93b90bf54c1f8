"""A served model for the benchmarks: the process, its client, and the processor time of both."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks._harness import ROOT, Worker, on_cpus
from fd_dsa.client.own_server import own_server

# as the worker `ours` builds its engine
_FLAGS = ("--max-num-seqs", "32", "--kv-cache-memory-bytes", "4G", "--log-level", "warning")


@contextlib.contextmanager
def served(
    checkout: Path = ROOT, cpus: set[int] | None = None, client_cpus: set[int] | None = None
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Yield a server of the demo model with the package of a checkout, and its client.

    Args:
        checkout: whose `fd_dsa` serves.
        cpus, client_cpus: processors of the server and of the client; None = all.

    Yields:
        A function of requests, prompt_tokens, new_tokens and seed, which streams random prompts.
        It returns `seconds`, `client_cpu_s` and `tokens` as the client measures them, and
        `serve_cpu_s` of the server's main thread, which runs the event loop.
    """
    # the engine that a server is compared with has no target; a checkout without the flag warns
    os.environ["FD_DSA_TARGET_INTER_TOKEN_LATENCY_MS"] = "0"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        before = Path.cwd()
        with on_cpus(cpus or os.sched_getaffinity(0)):
            os.chdir(checkout)
            try:
                server = own_server(None, _FLAGS, Path(folder) / "server.log")
                running = stack.enter_context(server)
            finally:
                os.chdir(before)
        client = stack.enter_context(Worker("benchmarks.workers.stream_client", cpus=client_cpus))
        url, schedstat = urlsplit(running.base_url), f"/proc/{running.pid}/task/{running.pid}"

        def cpu_s() -> float:
            return int(Path(schedstat, "schedstat").read_text().split()[0]) / 1e9

        def generate(**case: Any) -> dict[str, Any]:
            before = cpu_s()
            answer = client.call(op="streams", host=url.hostname, port=url.port, **case)
            return {**answer, "serve_cpu_s": cpu_s() - before}

        yield generate
