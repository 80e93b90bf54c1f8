"""Served models for the benchmarks: the process, its client, and the processor time of both."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks._harness import ROOT, Worker, on_cpus
from fd_dsa.client.own_server import own_server
from fd_dsa.config import demo_model_path

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


@contextlib.contextmanager
def model_server(model: str, config: Mapping[str, Any], rig: bool) -> Iterator[tuple[str, int]]:
    """Yield host and port of a server of a model folder without weights and without a tokenizer.

    Args:
        config: fields of EngineConfig.
        rig: True = on the test plug-in.
    """
    module = "benchmarks.workers.rig_serve" if rig else "fd_dsa.serve"
    fields = {**config, "load_format": "dummy", "tokenizer": demo_model_path(), "port": 0}
    command = [sys.executable, "-m", module, model]
    for name, value in fields.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag, *map(str, value)] if isinstance(value, tuple) else [f"{flag}={value}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            for line in server.stdout or ():
                if url := re.search(r" serves .* on http://([^:]+):(\d+)$", line):
                    break
            else:
                raise RuntimeError(f"the server ended with status {server.wait()}")
            yield url[1], int(url[2])
        finally:
            server.terminate()
