"""The doctor's section about FastDeploy: package, plug-in, and serving path.

FastDeploy is imported only in child processes, which run during the operators' checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from fd_dsa.environment import process_environment
from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.choice import fastdeploy_is_installed, fastdeploy_version
from fd_dsa.fastdeploy_plugin.launch.environment import (
    ENTRY_POINT_GROUPS,
    missing_entry_points,
    probe,
    server_environment,
)
from fd_dsa.fastdeploy_plugin.tree_checks import V1_CACHES

VARIABLES = ("FD_ATTENTION_BACKEND", "FD_PLUGINS", "FD_DSA_DISABLE", V1_CACHES)
_WAIT_S = 120.0
_LAUNCHED = "with_engine_fastdeploy"
_WAYS = {"from_here": "started from here", _LAUNCHED: "--engine fastdeploy"}


@contextmanager
def examination() -> Iterator[Callable[[], dict[str, Any]]]:
    """Start the questions about FastDeploy. Yields a function that waits for the facts."""
    ways = _WAYS if fastdeploy_is_installed() else {}
    with ThreadPoolExecutor(len(_WAYS)) as pool:
        paths = {way: pool.submit(_path, way) for way in ways}
        yield lambda: facts({way: path.result() for way, path in paths.items()})


def _path(way: str) -> dict[str, Any]:
    """Return `probe`'s result for a way of starting FastDeploy, or the failure."""
    environment: Mapping[str, str] = process_environment()
    try:
        if way == _LAUNCHED:
            environment = server_environment(environment)[0]
        found = probe(environment, _WAIT_S)
    except ConfigError as error:
        return {"live": False, "why": str(error)}
    except OSError as error:
        return {"live": False, "why": f"FastDeploy could not be tried: {error}"}
    if found["error"]:
        return {"live": False, "why": f"FastDeploy cannot be imported: {found['error']}"}
    return found


def facts(paths: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """Combine the answers into plain JSON values.

    Returns:
        `installed`, `version` ("" = unknown), `entry_points` (groups in which FastDeploy finds
        fd_dsa), `missing_entry_points` and `environment` (variable -> value, None = unset).
        `serves` is True if fd_dsa serves in at least one way of starting FastDeploy. `checks` is
        explained at `tree_checks.checks` and equal for all ways. `paths`, only with FastDeploy, has
        `live` (True if fd_dsa serves), `why` and other answers of the plug-in for each way.
    """
    missing = missing_entry_points()
    environment = process_environment()
    once: dict[str, Any] = {"version": "", "checks": [], "error": ""}
    for path in paths.values():
        once |= {name: path[name] for name in once if path.get(name)}
    return {
        "installed": fastdeploy_is_installed(),
        "version": fastdeploy_version() or once["version"],
        "entry_points": [group for group in ENTRY_POINT_GROUPS if group not in missing],
        "missing_entry_points": missing,
        "environment": {name: environment.get(name) for name in VARIABLES},
        "paths": {
            way: {name: value for name, value in path.items() if name not in once}
            for way, path in paths.items()
        },
        "serves": any(path["live"] for path in paths.values()),
        "checks": once["checks"],
    }


def as_lines(facts: Mapping[str, Any], with_tree: bool = False) -> list[str]:
    """Return the facts as lines for the terminal.

    The first has a label of ten characters.
    """
    if not facts["installed"]:
        return ["fastdeploy not installed; only --engine fastdeploy needs it"]
    lines = [f"fastdeploy {facts['version'] or 'of unknown version'}"]
    if facts["missing_entry_points"]:
        missing = ", ".join(facts["missing_entry_points"])
        lines.append(f"fd_dsa has no entry point in {missing}; install it as a package")
    values = facts["environment"]
    shown = ", ".join(f"{name} {values[name] or 'unset'}" for name in VARIABLES)
    without = "" if values["FD_PLUGINS"] else " (some versions load no plug-in without FD_PLUGINS)"
    lines.append(shown + without)
    for way, path in facts["paths"].items():
        serves = "fd_dsa serves" if path["live"] else "FastDeploy's own path serves"
        lines.append(f"{_WAYS[way]}: {serves}: {path['why']}")
    if with_tree:
        width = max((len(check["name"]) for check in facts["checks"]), default=0)
        lines += [f"{c['name']:<{width}}  {c['reason'] or 'ok'}" for c in facts["checks"]]
    return [lines[0], *(f"           {line}" for line in lines[1:])]
