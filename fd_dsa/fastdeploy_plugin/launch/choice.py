"""Engine of `--engine auto`, and the installed FastDeploy."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from fd_dsa.environment import installed_version
from fd_dsa.errors import BackendUnavailable, ConfigError

INSTALL = (
    "install it from Paddle's own package index (docs/fastdeploy.md has the commands), then fd_dsa "
    "into the same Python"
)


def fastdeploy_is_installed() -> bool:
    """Return True if this Python can find the package, without an import."""
    return find_spec("fastdeploy") is not None


def require_fastdeploy() -> None:
    """Check that FastDeploy is installed.

    Raises:
        BackendUnavailable: FastDeploy is missing; says how to install it.
    """
    if not fastdeploy_is_installed():
        raise BackendUnavailable(f"FastDeploy is not installed in this Python; {INSTALL}")


def fastdeploy_version() -> str:
    """Return the version of the installed package, "" if its files have no version."""
    # name of the package for CUDA, and of a build from source
    return installed_version("fastdeploy-gpu") or installed_version("fastdeploy")


def choose_engine(args: argparse.Namespace) -> tuple[str, str]:
    """Return the engine for `--engine auto`, and the reason in words.

    The embedded engine runs on all GPUs of one machine. FastDeploy runs only if a flag asks for a
    feature that the embedded engine does not have.

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
    """Refuse flags that only FastDeploy supports.

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
    """Return the flag that asks for a feature of FastDeploy only, in words, or ""."""
    if args.data_parallel_size > 1:
        return f"--data-parallel-size is {args.data_parallel_size}"
    if args.enable_expert_parallel:
        return "--enable-expert-parallel is set"
    if args.passed:
        return f"{args.passed[0]} is given after --"
    return ""
