"""`python -m fd_dsa.serve --engine fastdeploy`: FastDeploy's own server with the plug-in.

The launcher prepares a command and its environment, says where the server will answer, and then
becomes that command: signals, output and exit status are FastDeploy's own.

Source of FastDeploy's flags: `fastdeploy/engine/args_utils.py` (`EngineArgs.add_cli_args`) and
`fastdeploy/entrypoints/openai/{api_server,utils}.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fd_dsa.commands import pip_command, project_folder
from fd_dsa.config import EngineConfig
from fd_dsa.environment import local_url, process_environment, switch
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch.choice import require_fastdeploy
from fd_dsa.fastdeploy_plugin.launch.environment import (
    missing_entry_points,
    probe,
    server_environment,
)

SERVER_MODULE = "fastdeploy.entrypoints.openai.api_server"
# FastDeploy's default, which it applies without a log line
_FASTDEPLOY_MODEL_LEN = 2048
# a first import fills caches of compiled Python on a cold disk
_IMPORT_S = 600.0

# flags that both servers have under one name; other flags of FastDeploy go after --
SHARED: tuple[str, ...] = ("model", "served_model_name", "host", "port", "tensor_parallel_size")
SHARED += ("data_parallel_size", "enable_expert_parallel", "max_model_len", "max_num_seqs")
SHARED += ("max_num_batched_tokens", "gpu_memory_utilization", "num_gpu_blocks_override")
SHARED += ("enable_prefix_caching", "api_key")
# flags that the launcher uses itself
OWN = ("config", "download", "dry_run", "engine", "log_level")
_PLACE = ("model", "served_model_name", "host", "port")

logger = logging.getLogger("fd_dsa.serve")


@dataclass(frozen=True)
class Launch:
    """A command for FastDeploy's server.

    Attributes:
        command: program and arguments.
        environment: environment of the server.
        warnings: lines for the user, logged before the start.
        url: address of the server for this machine.
        model_name: value of the `model` field of requests.
        max_model_len: max tokens of a prompt plus its output.
        num_api_keys: number of keys that the server accepts.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    warnings: tuple[str, ...]
    url: str
    model_name: str
    max_model_len: int
    num_api_keys: int


def prepare(args: argparse.Namespace) -> Launch:
    """Return command and environment of FastDeploy's server, without a start.

    FastDeploy uses the last value of a flag, so flags after `--` override the launcher's.

    Args:
        args: result of `fd_dsa.serve.flag_sources.parse_args`.

    Raises:
        BackendUnavailable: FastDeploy is not installed, or fd_dsa is no installed package.
        ConfigError: a flag or a variable is unsupported.
    """
    require_fastdeploy()
    missing = missing_entry_points()
    if missing:
        raise BackendUnavailable(
            f"--engine fastdeploy: fd_dsa has no entry point in {', '.join(missing)}, by which "
            f"FastDeploy finds its plug-ins; {pip_command(project_folder())} installs fd_dsa "
            "into this Python, so that it is a package and not only a folder"
        )
    place = _place(args)
    words = [word for name, value in place.items() for word in (_flag(name), str(value))]
    for name in SHARED:
        if name in args.given and name not in _PLACE:
            words += _words(_flag(name), getattr(args, name))
    environment, warnings = server_environment(process_environment())
    if switch("FD_DSA_DISABLE"):
        warnings.append(
            "FD_DSA_DISABLE is set: FastDeploy serves by its own DSA path, for comparison"
        )
    place |= passed_values(args.passed)
    length = place.get("max_model_len", getattr(args, "max_model_len", _FASTDEPLOY_MODEL_LEN))
    return Launch(
        command=(sys.executable, "-m", SERVER_MODULE, *words, *args.passed),
        environment=environment,
        warnings=tuple(warnings),
        url=local_url(place["host"], place["port"]),
        model_name=place["served_model_name"],
        max_model_len=length,
        num_api_keys=_num_keys([*words, *args.passed]),
    )


def check_import(plan: Launch) -> str:
    """Import FastDeploy in a child, and log the DSA path that will run.

    Returns:
        Name and version of FastDeploy.

    Raises:
        BackendUnavailable: FastDeploy cannot be imported; says why.
    """
    for line in plan.warnings:
        logger.warning("%s", line)
    found = probe(plan.environment, _IMPORT_S)
    engine = f"FastDeploy {found['version']}".rstrip()
    if found["error"]:
        raise BackendUnavailable(
            f"--engine fastdeploy: {engine} is installed and cannot be used: {found['error']}; "
            "repair its installation (docs/fastdeploy.md), or take --engine embedded, which works "
            "without it"
        )
    if found["live"]:
        logger.info("fd_dsa serves its DSA path: %s", found["why"])
    else:
        logger.warning("FastDeploy serves by its own DSA path, not by fd_dsa: %s", found["why"])
    return engine


def become(plan: Launch) -> NoReturn:
    """Replace this process by FastDeploy's server."""
    logger.info("starting FastDeploy: %s", shlex.join(without_secrets(plan.command)))
    sys.stdout.flush()
    os.execve(plan.command[0], plan.command, plan.environment)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return arguments for a log, without the values of keys and passwords."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        secret = flag.startswith("--") and flag.endswith(("-key", "-password"))
        shown.append("***" if hide_next else f"{flag}=***" if secret and equals else argument)
        hide_next = secret and not equals
    return shown


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """Return model, name, host and port, which the launcher always passes."""
    for name in sorted(args.given - {*SHARED, *OWN}):
        raise ConfigError(
            f"{_flag(name)}: got {getattr(args, name)!r}, but it is a flag of --engine embedded; "
            "leave it out, and give FastDeploy's own flags after --"
        )
    passed = passed_values(args.passed)
    if "model" not in args and "model" not in passed:
        raise ConfigError(
            "--model: got none, --engine fastdeploy needs the folder of a model; the demo model of "
            "the package is for --engine embedded"
        )
    for flag in args.not_needed:
        raise ConfigError(f"{flag}: is a flag of FastDeploy; give FastDeploy's own flags after --")
    names = getattr(args, "served_model_name", [])
    if len(names) > 1:
        raise ConfigError(
            f"--served-model-name: got {len(names)} names, FastDeploy takes one; give one"
        )
    # FastDeploy may download a model after --, so only the launcher's own folder is checked
    model = str(EngineConfig(model=args.model).model_path) if "model" in args else passed["model"]
    name = names[0] if names else Path(passed.get("model", model)).name
    return {"model": model, "served_model_name": name, "host": args.host, "port": args.port}


def passed_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values after `--` of the server's model, name, address and length."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*_PLACE, "max_model_len"):
        kind = int if name in ("port", "max_model_len") else str
        parser.add_argument(_flag(name), dest=name, type=kind, default=argparse.SUPPRESS)
    try:
        return vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError as error:
        raise ConfigError(f"after --: {error}") from None


def _num_keys(arguments: Sequence[str]) -> int:
    return sum(word.partition("=")[0] == "--api-key" for word in arguments)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(flag: str, value: object) -> list[str]:
    """Return a flag and its value on FastDeploy's command line."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    values = value if isinstance(value, list) else [value]
    return [word for one in values for word in (flag, str(one))]
