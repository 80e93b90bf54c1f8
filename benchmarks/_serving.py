"""Served models for the benchmarks: the process, its client, and the processor time of both."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from benchmarks._harness import ROOT, Worker, on_cpus
from fd_dsa.client.own_server import own_server
from fd_dsa.config import demo_model_path

# as the worker `ours` builds its engine
_FLAGS = ("--max-num-seqs", "32", "--kv-cache-memory-bytes", "4G", "--log-level", "warning")

# kinds of steps
DECODE, PROMPTS, EAGER = "decode graph", "graph with prompts", "eager"


def loop_cpu_s(pid: int) -> float:
    """Return the processor time of a server's main thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


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
        url, pid = urlsplit(running.base_url), running.pid

        def generate(**case: Any) -> dict[str, Any]:
            before = loop_cpu_s(pid)
            answer = client.call(op="streams", host=url.hostname, port=url.port, **case)
            return {**answer, "serve_cpu_s": loop_cpu_s(pid) - before}

        yield generate


class Server(NamedTuple):
    """Address and process of a server."""

    host: str
    port: int
    pid: int

    def steps(self) -> Counter[str]:
        """Return the number of steps so far, of both kinds of graphs and of eager steps."""
        with contextlib.closing(HTTPConnection(self.host, self.port)) as connection:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()

        def by_kind(name: str) -> dict[str, int]:
            line = rf'^fd_dsa:{name}{{.*kind="(\w+)".*}} (\S+)$'
            found = re.findall(line, page, re.MULTILINE)
            return {kind: int(float(count)) for kind, count in found}

        every, replayed = by_kind("step_prepare_seconds_count"), by_kind("graph_steps_total")
        graphs, decode = sum(replayed.values()), replayed["decode"]
        eager = sum(every.values()) - graphs
        return Counter({DECODE: decode, PROMPTS: graphs - decode, EAGER: eager})


@contextlib.contextmanager
def model_server(model: str, config: Mapping[str, Any], rig: bool) -> Iterator[Server]:
    """Yield a server of a model folder without weights and without a tokenizer.

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
            yield Server(url[1], int(url[2]), server.pid)
        finally:
            server.terminate()
