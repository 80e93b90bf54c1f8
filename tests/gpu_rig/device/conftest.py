"""Tests in this folder run in sessions that have loaded a form of the plug-in; others pass it by.

FD_DSA_RIG=fake pytest tests/gpu_rig/device, or guard; `pytest -m gpu_rig` for the real form.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_dsa.config import demo_model_path
from tests.gpu_rig import Rig, current
from tests.gpu_rig.session import VARIABLE

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ALONE = "FD_DSA_RIG_ALONE"


def pytest_configure(config: pytest.Config) -> None:
    """The marker of this folder."""
    config.addinivalue_line("markers", "own_process: runs in a new process, which it may end")
    config.addinivalue_line("markers", "own_gpu: measures memory that other processes change")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Nothing is collected in a session without the plug-in."""
    return True if current() is None and collection_path.is_relative_to(HERE) else None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `own_process` by a session of its own, whose outcome is that of the test.

    Without a GPU there are no captures, and nothing that ends the process.
    """
    rig = current()
    marked = pyfuncitem.get_closest_marker("own_process") is not None
    if not marked or rig is None or not rig.is_real or ALONE in os.environ:
        return None
    # the session is no worker of pytest-xdist, and an installed plug-in may warn of workers
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {ALONE: "1", VARIABLE: rig.form}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    command += ["-rs", pyfuncitem.nodeid]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    if " passed" not in done.stdout:
        pytest.skip(next(x for x in done.stdout.splitlines() if x.startswith("SKIPPED")))
    return True


@pytest.fixture
def rig() -> Rig:
    """The plug-in of this session."""
    found = current()
    assert found is not None
    return found


@pytest.fixture
def real_rig(rig: Rig) -> Rig:
    """The plug-in with CUDA memory; skips the test in the other forms."""
    if not rig.is_real:
        pytest.skip(f"needs the real form, this session has {rig.form!r}")
    return rig


@pytest.fixture(autouse=True)
def device(rig: Rig) -> Iterator[None]:
    """New tensors are made on the device unless a place is named."""
    import paddle

    before = paddle.device.get_device()
    paddle.set_device(rig.device)
    yield
    paddle.set_device(before)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo model; of its first two layers where kernels are interpreted."""
    found = current()
    if found is None or found.is_real:
        return demo_model_path()
    # not before the plug-in is loaded
    from tools.fastdeploy_check.cut import cut

    folder = tmp_path_factory.mktemp("demo") / "model"
    cut(demo_model_path(), folder, 2)
    return folder


@pytest.fixture(autouse=True, scope="module")
def thawed() -> None:
    """Allow compilation again: an engine of another module ends it for the whole process."""
    if current() is not None:
        from fd_dsa.triton_runtime import unfreeze

        unfreeze()
