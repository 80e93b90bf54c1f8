"""FastDeploy's server with our plug-in, and the same server with FastDeploy's own DSA path."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks._harness import environment
from fd_dsa import __version__
from fd_dsa.environment import installed_version, nvidia_smi
from fd_dsa.fastdeploy_plugin.launch.environment import probe, server_environment
from fd_dsa.fastdeploy_plugin.launch.start import without_secrets
from fd_dsa.fastdeploy_plugin.tree_checks import V1_CACHES

OURS, UPSTREAM = "fd_dsa", "FastDeploy"
PATHS = (OURS, UPSTREAM)
# FastDeploy's own backend pairs the indexer's RoPE in one way only; ours follows for a comparison
_VARIABLES = {
    OURS: {"FD_DSA_DISABLE": "0", "FD_DSA_INDEXER_ROPE_INTERLEAVE": "1"},
    UPSTREAM: {"FD_DSA_DISABLE": "1"},
}
_OUR_LINE = re.compile(r"fd_dsa: .+|\b\w+ on (?:cpu|gpu)\S*: \w+ \(.+\)")
_STOP_S = 120.0
_HEALTH_EVERY_S = 0.2
_REQUEST_S = 600.0


class CheckFailed(Exception):
    """Error of a check that cannot be made, or that found a fault."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        path: OURS or UPSTREAM.
        name: of the model.
        client: for requests, with its address.
    """

    path: str
    name: str
    client: httpx.Client

    def post(self, route: str, **fields: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            CheckFailed: another status than 200.
        """
        answer = self.client.post(route, json={"model": self.name, **fields})
        if answer.status_code != httpx.codes.OK:
            raise CheckFailed(f"{route} of {self.path}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def stream(self, route: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed answer that have a choice.

        Raises:
            CheckFailed: another status than 200, or the stream has no end.
        """
        body = {"model": self.name, "stream": True, **fields}
        with self.client.stream("POST", route, json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                text = answer.read().decode()[:300]
                raise CheckFailed(f"{route} of {self.path}: {answer.status_code} {text}")
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data != line and (event := json.loads(data)).get("choices"):
                    yield event
        raise CheckFailed(f"{route} of {self.path}: the stream ended without [DONE]")


def which_path(path: str) -> dict[str, Any]:
    """Report of the plug-in in a process that is started for a path.

    Returns:
        as `fd_dsa.fastdeploy_plugin.status.report`, with `error` also if another path serves, and
        with `variables`, which servers of this path need. Only FastDeploy's own path needs its V1
        cache manager: V0 makes no caches of bytes there.
    """
    found = probe(server_environment({**os.environ, **_VARIABLES[path]})[0], _REQUEST_S)
    needed = found.get("own_path_variables", {}) if path == UPSTREAM else {}
    exported = {name: os.environ[name] for name in (V1_CACHES,) if name in os.environ}
    found["variables"] = {**_VARIABLES[path], **needed, **exported}
    if found["error"]:
        found["error"] = f"FastDeploy cannot be imported: {found['error']}"
    elif found["live"] != (path == OURS):
        found["error"] = f"{path} would not serve: {found['why']}"
    return found


@contextmanager
def serving(
    path: str, arguments: Sequence[str], log_folder: Path, variables: Mapping[str, str]
) -> Iterator[Server]:
    """Yield a server on a free port, started by the launcher that users start.

    Args:
        path: OURS or UPSTREAM.
        arguments: arguments of `python -m fd_dsa.serve --engine fastdeploy`.
        log_folder: folder for the output of launcher and server.
        variables: added to the environment.

    Raises:
        CheckFailed: it did not come up.
    """
    log = log_folder / f"server-{path}-{time.strftime('%H%M%S')}.log"
    own = {"FD_LOG_DIR": str(log_folder / f"log-{path}")}
    command = [sys.executable, "-m", "fd_dsa.serve", "--engine", "fastdeploy", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **variables, **own},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url, name = _ready(process, log)
        with httpx.Client(base_url=url, timeout=_REQUEST_S, trust_env=False) as client:
            yield Server(path, name, client)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Return address and model of the server, once GET /health answers 200."""
    line = re.compile(r"^fd_dsa \S+ starts (.+) with FastDeploy.* on (http://\S+)$", re.MULTILINE)
    while process.poll() is None:
        found = line.search(log.read_text("utf-8", "replace"))
        with suppress(httpx.TransportError):
            if found and httpx.get(f"{found[2]}/health", trust_env=False).is_success:
                return found[2], found[1]
        time.sleep(_HEALTH_EVERY_S)
    status = process.wait()
    last = log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    raise CheckFailed(f"the server ended with status {status}: {last} (all of it: {log})")


def logged(log_folder: Path) -> dict[str, int]:
    """Return lines of fd_dsa in the logs of our servers, with their counts.

    The plug-in's own, and those that say which kernels serve an operator and why.
    """
    files = [*log_folder.glob(f"server-{OURS}-*"), *log_folder.glob(f"log-{OURS}/**/*")]
    texts = [file.read_text("utf-8", "replace") for file in files if file.is_file()]
    return dict(Counter(line for text in texts for line in _OUR_LINE.findall(text)))


def machine(argv: Sequence[str], paths: Mapping[str, Any]) -> dict[str, Any]:
    """Return machine, versions, commit, command and serving path of a result."""
    return {
        **environment(),
        "fd_dsa": __version__,
        "fastdeploy": paths[OURS]["version"],
        "paddlepaddle-gpu": installed_version("paddlepaddle-gpu"),
        "os": platform.platform(),
        "gpus": nvidia_smi("index,name,memory.total"),
        "command": shlex.join(["python", "-m", "tools.fastdeploy_check", *without_secrets(argv)]),
        "paths": dict(paths),
    }
