"""`python -m fd_dsa.serve --engine fastdeploy`: FastDeploy's own server, with our plug-in in it.

Nothing here imports FastDeploy: it runs in children, the server's environment is the server's
alone, and what a user sees of it is its own log, a ready line and its exit status.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from fd_dsa.config import EngineConfig
from fd_dsa.environment import local_url, process_environment, switch
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch.choice import INSTALL, fastdeploy_is_installed
from fd_dsa.fastdeploy_plugin.launch.environment import (
    missing_entry_points,
    probe,
    server_environment,
)
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags, translate, without_secrets
from fd_dsa.fastdeploy_plugin.launch.server import ServerProcess

SERVER_MODULE = "fastdeploy.entrypoints.openai.api_server"
# FastDeploy's default, which it applies without a word
_FASTDEPLOY_MODEL_LEN = 2048
# a first import fills caches of compiled Python on a cold disk
_IMPORT_S = 600.0
_HEALTH_EVERY_S = 0.5
_SAY_EVERY_S = 30.0
_HEALTH_ANSWER_S = 5.0
_EXIT_BAD_START = 2
# sizes that the embedded engine checks in the same way
_CHECKED = ("model", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
_CHECKED += ("num_gpu_blocks_override",)
_LAST_PORT = 65535
_QUEUES = ("--engine-worker-queue-port", "--cache-queue-port")

logger = logging.getLogger("fd_dsa.serve")


@dataclass(frozen=True)
class Launch:
    """A server of FastDeploy's that is ready to be started.

    Attributes:
        warnings: what the user should know first, a line each.
        url, metrics_url: of the server and its metrics for this machine, without a path.
        model_name: for the `model` field of requests.
        max_model_len: longest prompt plus output, tokens.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    warnings: tuple[str, ...]
    url: str
    metrics_url: str
    model_name: str
    max_model_len: int


def prepare(args: argparse.Namespace, passed: PassedFlags) -> Launch:
    """Command and environment of FastDeploy's server, by what `translate` takes; starts nothing.

    Raises:
        BackendUnavailable: FastDeploy is not installed, or fd_dsa is no installed package.
        ConfigError: a flag or a variable cannot be honoured; names both sides.
    """
    _require_packages()
    translated = translate(args, passed)
    environment, warnings = server_environment(process_environment())
    if switch("FD_DSA_DISABLE"):
        warnings.append(
            "FD_DSA_DISABLE is set: FastDeploy serves by its own DSA path, for comparison"
        )
    own = _model_and_name(args, passed) | {"--host": args.host}
    host = str(passed.values.get("--host", args.host))
    data_parallel = passed.number("--data-parallel-size", args.data_parallel_size)
    num_queues = max(1, data_parallel // passed.num_nodes)
    ports = choose_ports(host, args.port, "port" in args.given, passed, num_queues)
    own = {flag: value for flag, value in own.items() if flag not in passed.values} | ports
    words = [word for pair in own.items() for word in pair]
    known = own | passed.values
    length = passed.number("--max-model-len", getattr(args, "max_model_len", _FASTDEPLOY_MODEL_LEN))
    if "--max-model-len" not in passed.values and "max_model_len" not in args.given:
        warnings.append(
            f"max_model_len is {length}, FastDeploy's default; --max-model-len N changes it"
        )
    return Launch(
        command=(sys.executable, "-m", SERVER_MODULE, *words, *translated, *passed.arguments),
        environment=environment,
        warnings=tuple(warnings),
        url=local_url(host, known["--port"]),
        metrics_url=f"{local_url(host, known['--metrics-port'])}/metrics",
        model_name=str(known["--served-model-name"]),
        max_model_len=length,
    )


def launch(plan: Launch, started: float, on_ready: Callable[[str, float], None]) -> int:
    """Run FastDeploy's server until it ends; returns its exit status, 128 + n after signal n.

    Its output and our signals go through, and no process of it outlives this one; see
    `ServerProcess`.

    Args:
        started: `time.monotonic()` of the moment from which to count.
        on_ready: called once, when GET /health of the server answers 200, with FastDeploy and its
            version, and the seconds since `started`.

    Raises:
        BackendUnavailable: FastDeploy cannot be imported; says why.
    """
    for line in plan.warnings:
        logger.warning("%s", line)
    engine = _check_import(plan)
    logger.info("starting %s: %s", engine, shlex.join(without_secrets(plan.command)))
    logs = f"{plan.environment.get('FD_LOG_DIR', 'log')}/"
    with ServerProcess(plan.command, plan.environment) as server:
        is_ready = _wait_until_ready(server, plan.url, logs, started)
        if is_ready:
            on_ready(engine, time.monotonic() - started)
        status = server.wait()
        assert status is not None
        cause = f" ({Signals(status - 128).name})" if status - 128 in list(Signals) else ""
        words = f"status {status}{cause}"
        if is_ready:
            logger.info("FastDeploy's server ended with %s", words)
            return status
        if server.signals:
            logger.info("stopped while starting, with %s", words)
            return status
        sys.stderr.write(
            f"fd_dsa: error: FastDeploy's server ended with {words} before it was ready; its last "
            f"words: {server.last_words() or 'none'}; its own logs are in {logs}\n"
        )
        # FastDeploy returns 0 where its engine did not come up
        return status or _EXIT_BAD_START


def _require_packages() -> None:
    """Refuse a start in which FastDeploy is not there, or could not find the plug-in."""
    if not fastdeploy_is_installed():
        raise BackendUnavailable(
            f"--engine fastdeploy: FastDeploy is not installed in this Python; {INSTALL}. "
            "--engine embedded works without it, for models that fit one device"
        )
    missing = missing_entry_points()
    if missing:
        raise BackendUnavailable(
            f"--engine fastdeploy: fd_dsa has no entry point in {', '.join(missing)}, by which "
            "FastDeploy finds its plug-ins; install fd_dsa into this Python (pip install .), so "
            "that it is a package and not only a folder"
        )


def _check_import(plan: Launch) -> str:
    """Import FastDeploy in a child, and log whose path is live; returns its name and version."""
    found = probe(plan.environment, _IMPORT_S)
    engine = f"FastDeploy {found['version']}".rstrip()
    if found["error"]:
        raise BackendUnavailable(
            f"--engine fastdeploy: {engine} is installed and cannot be used: {found['error']}; "
            "repair its installation (docs/fastdeploy.md), or take --engine embedded, which works "
            "without it for models that fit one device"
        )
    if found["live"]:
        logger.info("fd_dsa serves its DSA path: %s", found["why"])
    else:
        logger.warning("FastDeploy serves by its own DSA path, not by fd_dsa: %s", found["why"])
    return engine


def _model_and_name(args: argparse.Namespace, passed: PassedFlags) -> dict[str, str]:
    """FastDeploy's flags for the model folder, and the name under which requests ask for it."""
    if "model" not in args and "--model" not in passed.values:
        raise ConfigError(
            "--model: got none, --engine fastdeploy needs the folder of a model; the demo model of "
            "the package is for --engine embedded"
        )
    names = getattr(args, "served_model_name", [])
    if len(names) > 1:
        raise ConfigError(
            f"--served-model-name: got {len(names)} names, --served-model-name of FastDeploy takes "
            "one; give one"
        )
    config = EngineConfig(**{name: getattr(args, name) for name in _CHECKED if name in args.given})
    model = str(passed.values.get("--model", config.model_path))
    return {"--model": model, "--served-model-name": names[0] if names else Path(model).name}


def choose_ports(
    host: str, port: int, port_is_given: bool, passed: PassedFlags, num_queues: int
) -> dict[str, str]:
    """FastDeploy's flags for free consecutive ports that the user left open, and their values.

    One for HTTP, one for metrics, and a queue of workers and one of caches for each data parallel
    rank of this machine: four in all for one rank. FastDeploy's own defaults differ from version
    to version, and two servers on one machine must not share them.

    Args:
        port: our `--port`, 0 for any.
        port_is_given: the user gave it, so it stays; else others are tried above it.
        passed: flags after `--`, whose ports stay.
        num_queues: data parallel ranks on this machine.

    Raises:
        ConfigError: the interface is none of this machine's; no such ports are free; on several
            machines, where all must have the same ports, those above the HTTP port are taken.
    """
    try:
        # a port that the system thinks free
        with socket.create_server((host, 0), family=_family(host)) as server:
            any_port = int(server.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"--host: got {host!r}, which is no address of this machine ({error.strerror}); "
            "use 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from error
    fixed: dict[str, str] = {}
    if "--port" in passed.values:
        port, port_is_given = passed.number("--port", port), True
    elif port_is_given and port:
        fixed["--port"] = str(port)
    counts = {"--port": 1, "--metrics-port": 1, **dict.fromkeys(_QUEUES, num_queues)}
    open_flags = [flag for flag in counts if flag not in (passed.values | fixed)]
    start = (port + 1 if port_is_given else port) if port else any_port
    num_ports = sum(counts[flag] for flag in open_flags)
    block = iter(_free_block(host, start, num_ports, movable=passed.num_nodes == 1))
    chosen = {flag: ",".join(str(next(block)) for _ in range(counts[flag])) for flag in open_flags}
    return fixed | chosen


def _free_block(host: str, start: int, count: int, movable: bool) -> range:
    """The first `count` consecutive ports from `start` on that are all free."""
    base = start
    while base + count - 1 <= _LAST_PORT:
        taken = [port for port in range(base, base + count) if not _is_free(host, port)]
        if not taken:
            return range(base, base + count)
        if not movable:
            raise ConfigError(
                f"port {taken[0]} is taken, and with --ips every machine needs the same ports; "
                "give another --port, or --metrics-port, --engine-worker-queue-port and "
                "--cache-queue-port after --"
            )
        base = taken[-1] + 1
    raise ConfigError(
        f"found no {count} consecutive free ports from {start} on; give a lower --port, or "
        "--metrics-port, --engine-worker-queue-port and --cache-queue-port after --"
    )


def _is_free(host: str, port: int) -> bool:
    """True if a server could listen there now, and on all interfaces, as FastDeploy's queues do.

    A port in TIME_WAIT is free.
    """
    try:
        for address in (host, "0.0.0.0"):
            socket.create_server((address, port), family=_family(address)).close()
    except OSError:
        return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _wait_until_ready(server: ServerProcess, url: str, logs: str, started: float) -> bool:
    """True as soon as /health answers 200, False when the server ends or gets a signal before.

    There is no limit: hundreds of gigabytes of weights take as long as they take. A line now and
    then says what is waited for, and for how long.
    """
    # here, because a start of the embedded engine imports this module too
    import httpx

    say_at, answer = time.monotonic() + _SAY_EVERY_S, "no answer"
    # a proxy of the environment is for other machines
    with httpx.Client(timeout=_HEALTH_ANSWER_S, trust_env=False) as client:
        while server.wait(0) is None and not server.signals:
            try:
                code = client.get(f"{url}/health").status_code
                if code == httpx.codes.OK:
                    return True
                answer = f"status {code}"
            except httpx.TransportError as error:
                answer = type(error).__name__
            if time.monotonic() >= say_at:
                say_at += _SAY_EVERY_S
                seconds = math.floor(time.monotonic() - started)
                line = (
                    f"still starting after {seconds} s: GET {url}/health gives {answer}. "
                    "FastDeploy answers once its workers have loaded the model; their own logs "
                    f"are in {logs} (workerlog.0). Ctrl-C stops"
                )
                logger.info("%s", line)
            server.wait(_HEALTH_EVERY_S)
    return False
