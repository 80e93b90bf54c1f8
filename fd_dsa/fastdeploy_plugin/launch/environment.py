"""Environment of FastDeploy's server, and the report of a child that has it.

The launcher never imports FastDeploy, because that imports a whole engine, starts plug-ins and
creates files.

Source of the variables' meaning: `fastdeploy/envs.py` and `fastdeploy/plugins/utils.py` of
PaddlePaddle/FastDeploy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.choice import fastdeploy_version

BACKEND = "DSA_ATTN"
PLUGIN = "fd_dsa"
_CHILD = "fd_dsa.fastdeploy_plugin.status"
ENTRY_POINT_GROUPS = ("fastdeploy.model_register_plugins", "fastdeploy.model_runner_plugins")


def server_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment of FastDeploy's server, and its warnings.

    The server gets the launcher's environment with FD_ATTENTION_BACKEND=DSA_ATTN, and with fd_dsa
    in FD_PLUGINS. That list has no spaces, because FastDeploy would read them as part of a name.

    Raises:
        ConfigError: FD_ATTENTION_BACKEND asks for another backend.
    """
    backend = environment.get("FD_ATTENTION_BACKEND", "")
    if backend not in ("", BACKEND):
        raise ConfigError(
            f"FD_ATTENTION_BACKEND: got {backend!r}, --engine fastdeploy needs {BACKEND}; unset it "
            "(the launcher sets it for FastDeploy's server only)"
        )
    names = [name.strip() for name in environment.get("FD_PLUGINS", "").split(",")]
    plugins = list(dict.fromkeys(name for name in names if name))
    plugins += [] if PLUGIN in plugins else [PLUGIN]
    changes = {"FD_ATTENTION_BACKEND": BACKEND, "FD_PLUGINS": ",".join(plugins)}
    lines = []
    others = sorted(plugin_names() - {PLUGIN})
    if others and "FD_PLUGINS" not in environment:
        lines.append(
            f"FD_PLUGINS is set to {PLUGIN} for FastDeploy's server, so its other plug-ins "
            f"({', '.join(others)}) stay out; name them in FD_PLUGINS to load them too"
        )
    return {**environment, **changes}, lines


def plugin_names() -> set[str]:
    """Return the names of the installed plug-ins for FastDeploy in the groups of fd_dsa."""
    return {point.name for group in ENTRY_POINT_GROUPS for point in entry_points(group=group)}


def missing_entry_points() -> list[str]:
    """Return the groups of FastDeploy without an installed entry point named fd_dsa."""
    return [group for group in ENTRY_POINT_GROUPS if not entry_points(group=group, name=PLUGIN)]


def probe(environment: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    """Return `status.report` of a child that imports FastDeploy.

    A failed import, or a child without a report, gives only `error` and `version`.

    Args:
        environment: environment of the child.
        timeout_s: seconds after which the child is ended.
    """
    version = fastdeploy_version()
    with tempfile.TemporaryDirectory(prefix="fd_dsa-probe-") as name:
        folder = Path(name)
        report, output = folder / "report.json", folder / "output"
        # FastDeploy writes logs and metrics to its working folder when it is imported, so the child
        # has another one; sys.path stays the same
        entries = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        own = {
            "FD_LOG_DIR": str(folder / "log"),
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, entries)),
        }
        try:
            with output.open("wb") as file:
                status = subprocess.run(
                    [sys.executable, "-m", _CHILD, str(report)],
                    env={**environment, **own},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"its import takes more than {timeout_s:g} s", "version": version}
        try:
            found = json.loads(report.read_text("utf-8"))
        except (OSError, ValueError):
            said = output.read_text("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "no output")
            error = f"its import ended Python with status {status}: {last}"
            return {"error": error, "version": version}
        return {**found, "version": version or found["version"]}
