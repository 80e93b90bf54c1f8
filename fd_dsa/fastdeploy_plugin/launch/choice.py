"""Engine of `--engine auto`, and the installed FastDeploy."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from fd_dsa.environment import installed_version
from fd_dsa.errors import BackendUnavailable, ConfigError

INSTALL = (
    "install it from Paddle's own package index (docs/fastdeploy.md has the commands), then fd_dsa "
    "beside it"
)


def fastdeploy_is_installed() -> bool:
    """True if this Python can find the package; it is not imported."""
    return find_spec("fastdeploy") is not None


def require_fastdeploy() -> None:
    """Refuse to go on without FastDeploy.

    Raises:
        BackendUnavailable: says how to install it.
    """
    if not fastdeploy_is_installed():
        raise BackendUnavailable(f"FastDeploy is not installed in this Python; {INSTALL}")


def fastdeploy_version() -> str:
    """Version of the installed package, "" if its files do not tell."""
    # the package for CUDA, and its name in a build from source
    return installed_version("fastdeploy-gpu") or installed_version("fastdeploy")


def choose_engine(args: argparse.Namespace) -> tuple[str, str]:
    """Engine for `--engine auto`, and the reason in words.

    The embedded engine serves on all GPUs of one machine. FastDeploy serves only if a flag asks
    for a feature that the embedded engine does not have.

    Raises:
        BackendUnavailable: the flags need FastDeploy, which is not installed.
    """
    asked = _asked_for_more(args)
    if not asked:
        return "embedded", "no flag asks for FastDeploy"
    if not fastdeploy_is_installed():
        raise BackendUnavailable(
            f"{asked}, which needs FastDeploy, and that is not installed in this Python; "
            f"{INSTALL}. --engine embedded serves without these flags"
        )
    return "fastdeploy", asked


def refuse_for_embedded(args: argparse.Namespace) -> None:
    """Refuse flags that only FastDeploy can honour.

    Raises:
        ConfigError: names the first of them.
    """
    asked = _asked_for_more(args)
    if asked:
        raise ConfigError(
            f"{asked}, which --engine embedded does not have; leave it out, or take "
            "--engine fastdeploy"
        )


def _asked_for_more(args: argparse.Namespace) -> str:
    """Flag that asks for a feature of FastDeploy only, in words; "" without one."""
    if args.data_parallel_size > 1:
        return f"--data-parallel-size is {args.data_parallel_size}"
    if args.enable_expert_parallel:
        return "--enable-expert-parallel is set"
    if args.passed:
        return f"{args.passed[0]} stands after --"
    return ""
