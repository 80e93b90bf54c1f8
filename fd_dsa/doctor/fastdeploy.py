"""What the doctor says about FastDeploy: is it there, is the plug-in, and which path would serve.

FastDeploy is imported by children only, which work while the operators are checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fd_dsa.environment import process_environment
from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.choice import fastdeploy_is_installed, fastdeploy_version
from fd_dsa.fastdeploy_plugin.launch.environment import (
    ENTRY_POINT_GROUPS,
    missing_entry_points,
    server_environment,
)
from fd_dsa.fastdeploy_plugin.launch.probe import Probe

VARIABLES = ("FD_ATTENTION_BACKEND", "FD_PLUGINS", "FD_DSA_DISABLE")
# after the operators' checks, which take some seconds themselves
_WAIT_S = 60.0
_WAYS = {"from_here": "started from here", "with_engine_fastdeploy": "--engine fastdeploy"}


@contextmanager
def examination() -> Iterator[Fastdeploy]:
    """Ask about FastDeploy while the block runs."""
    here = process_environment()
    with ExitStack() as stack:
        paths: dict[str, Probe | str] = {}
        if fastdeploy_is_installed():
            paths["from_here"] = _ask(stack, here)
            try:
                launched = server_environment(here)[0]
            except ConfigError as error:
                paths["with_engine_fastdeploy"] = str(error)
            else:
                same = launched == here
                paths["with_engine_fastdeploy"] = (
                    paths["from_here"] if same else _ask(stack, launched)
                )
        yield Fastdeploy(paths)


def _ask(stack: ExitStack, environment: Mapping[str, str]) -> Probe | str:
    """A child that imports FastDeploy in this environment, or why there is none."""
    try:
        return stack.enter_context(Probe(environment))
    except OSError as error:
        return f"FastDeploy could not be tried: {error}"


class Fastdeploy:
    """What was asked about FastDeploy.

    Args:
        paths: way of starting FastDeploy -> the child that tries it, or why none does.
    """

    def __init__(self, paths: Mapping[str, Probe | str]) -> None:
        self._paths = paths

    def facts(self) -> dict[str, Any]:
        """All that is known, as plain JSON values.

        Returns:
            `installed`, `version` ("" = unknown), `entry_points` (groups in which FastDeploy finds
            fd_dsa), `missing_entry_points`, `environment` (variable -> value, None = unset),
            `paths` (where FastDeploy is installed: way of starting it -> `live` (ours serves),
            `why`, and what else the plug-in says of itself there), `serves` (ours does in one of
            these ways) and `checks` (see `tree_checks.checks`; the same in every way of starting).
        """
        missing = missing_entry_points()
        environment = process_environment()
        paths = {way: _path(tried) for way, tried in self._paths.items()}
        lists = [path.pop("checks", []) for path in paths.values()]
        return {
            "installed": fastdeploy_is_installed(),
            "version": fastdeploy_version() or self._version(),
            "entry_points": [group for group in ENTRY_POINT_GROUPS if group not in missing],
            "missing_entry_points": missing,
            "environment": {name: environment.get(name) for name in VARIABLES},
            "paths": paths,
            "serves": any(path["live"] for path in paths.values()),
            "checks": next(filter(None, lists), []),
        }

    def _version(self) -> str:
        """What the imported package calls itself."""
        probes = [tried for tried in self._paths.values() if isinstance(tried, Probe)]
        return next((probe.findings(_WAIT_S).version for probe in probes), "")


def _path(tried: Probe | str) -> dict[str, Any]:
    """Which path would serve when FastDeploy is started in one way."""
    if isinstance(tried, str):
        return {"live": False, "why": tried}
    findings = tried.findings(_WAIT_S)
    if findings.error:
        return {"live": False, "why": f"FastDeploy cannot be imported: {findings.error}"}
    return dict(findings.status)


def as_lines(facts: Mapping[str, Any], with_tree: bool = False) -> list[str]:
    """The facts for a person, the first line with a label of ten characters.

    Args:
        facts: of `Fastdeploy.facts`.
        with_tree: list every check of the tree.
    """
    if not facts["installed"]:
        return ["fastdeploy not installed; --engine fastdeploy alone needs it"]
    found = [f"fastdeploy {facts['version'] or 'of unknown version'}"]
    if facts["missing_entry_points"]:
        missing = ", ".join(facts["missing_entry_points"])
        found.append(f"fd_dsa has no entry point in {missing}; install it as a package")
    values = facts["environment"]
    shown = ", ".join(f"{name} {values[name] or 'unset'}" for name in VARIABLES)
    without = "" if values["FD_PLUGINS"] else " (some versions load no plug-in without FD_PLUGINS)"
    found.append(shown + without)
    for way, title in _WAYS.items():
        path = facts["paths"].get(way)
        if path:
            serves = "fd_dsa serves" if path["live"] else "FastDeploy's own path serves"
            alone = path["live"] and not path.get("runner_is_ours")
            runner = " (but the model runner is FastDeploy's own)" if alone else ""
            found.append(f"{title}: {serves}: {path['why']}{runner}")
    if with_tree:
        width = max((len(check["name"]) for check in facts["checks"]), default=0)
        found += [f"{c['name']:<{width}}  {c['reason'] or 'ok'}" for c in facts["checks"]]
    return [found[0], *(f"           {line}" for line in found[1:])]
