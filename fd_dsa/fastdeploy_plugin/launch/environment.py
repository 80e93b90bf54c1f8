"""The environment in which FastDeploy's server runs; that of the launcher stays as it is.

Source of the variables' meaning: `fastdeploy/envs.py` and `fastdeploy/plugins/utils.py` of
PaddlePaddle/FastDeploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from fd_dsa.errors import ConfigError

BACKEND = "DSA_ATTN"
PLUGIN = "fd_dsa"
ENTRY_POINT_GROUPS = ("fastdeploy.model_register_plugins", "fastdeploy.model_runner_plugins")


def server_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What FastDeploy's server gets, and what the user should know about it.

    FD_ATTENTION_BACKEND becomes DSA_ATTN and FD_PLUGINS names fd_dsa beside what it names already,
    without spaces, which FastDeploy would read as part of a name. Everything else passes through,
    FD_DISABLE_CHUNKED_PREFILL too, which is never set here: a value of the user's that only costs
    something is left alone, with a warning.

    Args:
        environment: of the launcher; not changed.

    Returns:
        a copy with the changes, and a line for each value that works against the plug-in.

    Raises:
        ConfigError: FD_ATTENTION_BACKEND asks for another backend.
    """
    backend = environment.get("FD_ATTENTION_BACKEND", "")
    if backend not in ("", BACKEND):
        raise ConfigError(
            f"FD_ATTENTION_BACKEND: got {backend!r}, --engine fastdeploy needs {BACKEND}; unset it "
            "(the launcher sets it for FastDeploy's server alone)"
        )
    names = [name.strip() for name in environment.get("FD_PLUGINS", "").split(",")]
    plugins = list(dict.fromkeys(name for name in names if name))
    plugins += [] if PLUGIN in plugins else [PLUGIN]
    changes = {"FD_ATTENTION_BACKEND": BACKEND, "FD_PLUGINS": ",".join(plugins)}
    return {**environment, **changes}, _warnings(environment)


def _warnings(environment: Mapping[str, str]) -> list[str]:
    """A line for each value that works against the plug-in."""
    lines = []
    unchunked = environment.get("FD_DISABLE_CHUNKED_PREFILL", "")
    if unchunked not in ("", "0"):
        lines.append(
            f"FD_DISABLE_CHUNKED_PREFILL={unchunked} stays as it is set: FastDeploy takes every "
            "prompt in one piece. fd_dsa does not need that (FastDeploy's own DSA_ATTN does); "
            "unset it for chunked prefill"
        )
    others = sorted(plugin_names() - {PLUGIN})
    if others and "FD_PLUGINS" not in environment:
        lines.append(
            f"FD_PLUGINS is set to {PLUGIN} for FastDeploy's server, so its other plug-ins "
            f"({', '.join(others)}) stay out; name them in FD_PLUGINS to load them too"
        )
    return lines


def plugin_names() -> set[str]:
    """Names of the installed plug-ins for FastDeploy, in the groups that fd_dsa uses."""
    return {point.name for group in ENTRY_POINT_GROUPS for point in entry_points(group=group)}


def missing_entry_points() -> list[str]:
    """Groups in which the installed packages have no entry point named fd_dsa."""
    return [group for group in ENTRY_POINT_GROUPS if not entry_points(group=group, name=PLUGIN)]
