"""Form of the plug-in that a pytest session runs on."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gpu_rig import BuildError, Rig, RigError, current, load
from tests.gpu_rig.build import build, find_tools

VARIABLE = "FD_DSA_RIG"


def _has_gpu() -> bool:
    """True where the NVIDIA driver shows a device."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def open_session(markexpr: str) -> None:
    """Load the form named by FD_DSA_RIG, or the real one for `-m gpu_rig` on a GPU.

    Raises:
        pytest.UsageError: the form cannot be built or loaded; says what is missing.
    """
    form = os.environ.get(VARIABLE)
    if form is None and markexpr.strip() == "gpu_rig" and _has_gpu():
        form = "real"
    if not form:
        return
    try:
        load(form)
    except (BuildError, RigError) as error:
        raise pytest.UsageError(f"test plug-in, form {form!r}: {error}") from error


def opened() -> Rig:
    """The plug-in of this session, or the form named by FD_DSA_RIG, "fake" without a name."""
    return current() or load(os.environ.get(VARIABLE, "fake"))


def skip_reason() -> str | None:
    """The reason to skip tests that need the plug-in, None in a session that has it."""
    if current() is not None:
        return None
    if not _has_gpu():
        return "no NVIDIA GPU on this machine"
    return "a session has the test plug-in from its start: make gpu-rig, or pytest -m gpu_rig"


def built(form: str) -> Path:
    """Folder of a form; the test is skipped, with the reason, where no compiler is."""
    if find_spec("paddle") is None:
        pytest.skip("not installed: paddle")
    try:
        find_tools(form)
    except BuildError as error:
        pytest.skip(f"THE TEST PLUG-IN CANNOT BE BUILT HERE: {error}")
    return build(form)
