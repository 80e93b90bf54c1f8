"""Which kernel serves: chosen once, by what is built and agrees, or by FD_DSA_OP_PROVIDER."""

from __future__ import annotations

import ctypes
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, ConfigError, DeviceError
from fd_dsa.step.custom_op import CustomOpForm
from tests.custom_ops.building import host_library
from tests.kernel_memory import KernelMemory
from tests.step.helpers import assert_matches_oracle, device_builder
from tests.strategies import make_batch

BATCH = make_batch([(3, 2, 3), (0, 9, 1)], 16)
LAUNCH = CustomOpForm.launch


@pytest.fixture(autouse=True)
def unsettled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known or chosen before a test, nor after it."""
    monkeypatch.delenv("FD_DSA_OP_PROVIDER", raising=False)
    custom_ops.use_library(None)
    yield
    custom_ops.use_library(None)


def install(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Let a package be found whose record of its build has these values."""
    library = shutil.which("true")
    made = {"paddle": "3.3.1", "cuda": None, "archs": []} | facts
    package = SimpleNamespace(LIBRARY=library, BUILD=made, __all__=["fd_dsa_step_metadata"])
    monkeypatch.setitem(sys.modules, "fd_dsa_ops", package)


def wrong(kernels: Any) -> str:
    return "slot_mapping differs"


def right(kernels: Any) -> str:
    return ""


def test_without_the_package_triton_serves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fd_dsa"):
        assert custom_ops.choose("topk", right) is None
        assert custom_ops.choose("topk", right) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "topk on a GPU: triton serves (fd_dsa_ops is missing: not installed" in caplog.text
    with pytest.raises(BackendUnavailable, match="fd_dsa_ops has no operators here; it is missing"):
        custom_ops.package()


def test_a_package_without_kernels_serves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch)
    with caplog.at_level(logging.INFO, "fd_dsa"):
        assert custom_ops.choose("topk", right) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "built for Paddle 3.3.1 without CUDA kernels" in caplog.text


def test_a_package_that_breaks_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fd_dsa_ops.py").write_text("raise ImportError('libX.so: undefined symbol: f')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.INFO, "fd_dsa"):
        assert custom_ops.choose("topk", right) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "fd_dsa_ops is broken: libX.so: undefined symbol: f" in caplog.text


def test_kernels_that_agree_serve(caplog: pytest.LogCaptureFixture) -> None:
    custom_ops.use_library(host_library())
    asked = []
    with caplog.at_level(logging.INFO, "fd_dsa"):
        for _ in range(2):
            kernels = custom_ops.choose("topk", lambda found: asked.append(found) or "")
    assert asked == [kernels] and kernels.fd_dsa_step_bytes() > 100
    assert caplog.text.count("topk on a GPU: custom_op serves") == 1
    assert custom_ops.choices() == [custom_ops.Choice("topk", True, "agrees with the definition")]


@pytest.mark.parametrize("raises", [False, True])
def test_kernels_that_do_not_agree_are_a_warning(
    caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    def fails(kernels: Any) -> str:
        raise AttributeError("no such symbol")

    custom_ops.use_library(host_library())
    with caplog.at_level(logging.INFO, "fd_dsa"):
        assert custom_ops.choose("topk", fails if raises else wrong) is None
    said = "its probe failed: AttributeError: no such symbol" if raises else "slot_mapping differs"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert said in caplog.text


def test_the_variable_keeps_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "step_metadata=custom_op, topk=triton")
    custom_ops.use_library(host_library())
    assert custom_ops.choose("topk", right) is None
    assert custom_ops.choose("step_metadata", right) is not None
    assert custom_ops.choices()[1].reason == "FD_DSA_OP_PROVIDER asks for Triton"


def test_what_the_variable_asks_for_in_vain_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "topk=custom_op")
    with pytest.raises(
        BackendUnavailable, match="topk=custom_op cannot be had: fd_dsa_ops is miss"
    ):
        custom_ops.choose("topk", right)
    custom_ops.use_library(host_library())
    with pytest.raises(BackendUnavailable, match="cannot be had: slot_mapping differs"):
        custom_ops.choose("topk", wrong)


@pytest.mark.parametrize("text", ["topk", "topk=paddle", "attention=triton", "topk=triton;a=b"])
def test_a_variable_that_cannot_be_read_is_an_error(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", text)
    with pytest.raises(ConfigError, match=r"FD_DSA_OP_PROVIDER: got .*step_metadata=custom_op"):
        custom_ops.choose("topk", right)


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"none\.so: .*; build it again"):
        custom_ops.use_library(tmp_path / "none.so")


def nothing(form: CustomOpForm, *step: Any) -> None:
    """A kernel that writes nothing."""


def a_token_less(form: CustomOpForm, inputs: Any, rows: int, tokens: int, stride: int) -> None:
    """A kernel that forgets the last padded token."""
    LAUNCH(form, inputs, rows, max(tokens - 1, 0), stride)


def another_stride(form: CustomOpForm, inputs: Any, rows: int, tokens: int, stride: int) -> None:
    """A kernel that reads the first row of the table for all."""
    LAUNCH(form, inputs, rows, tokens, 0)


@pytest.mark.parametrize("kernel", [nothing, a_token_less, another_stride])
def test_a_builder_keeps_triton_where_the_kernel_is_wrong(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, kernel: Any
) -> None:
    monkeypatch.setattr(CustomOpForm, "launch", kernel)
    builder = device_builder(kernel_memory, BATCH)
    [choice] = custom_ops.choices()
    assert not choice.serves and "of probe 0 differs from the definition" in choice.reason
    assert_matches_oracle(builder.build(*BATCH.inputs()), BATCH, kernel_memory.get)


def test_a_library_of_another_release_is_not_called(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "sizeof", lambda structure: 8)
    device_builder(kernel_memory, BATCH)
    [choice] = custom_ops.choices()
    assert "takes another structure than this fd_dsa passes; build it again" in choice.reason


def test_a_launch_that_fails_is_an_error_of_the_device(kernel_memory: KernelMemory) -> None:
    builder = device_builder(kernel_memory, BATCH)
    form = builder._provider._launch._forms[1]
    assert isinstance(form, CustomOpForm)
    form._launch._function = lambda step, stream: 400
    with pytest.raises(DeviceError, match="fd_dsa_step_metadata_cuda: CUDA error 400: "):
        builder.build(*BATCH.inputs())
