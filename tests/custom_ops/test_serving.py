"""Which kernel serves: chosen once, by what is built and agrees, or by FD_DSA_OP_PROVIDER."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, ConfigError
from tests.custom_ops.building import emulated_library


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
    package = SimpleNamespace(
        LIBRARY=library, BUILD=made, __all__=["get_position_ids_and_mask_encoder_batch"]
    )
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
    custom_ops.use_library(emulated_library("position_ids"))
    asked = []
    with caplog.at_level(logging.INFO, "fd_dsa"):
        for _ in range(2):
            kernels = custom_ops.choose("topk", lambda found: asked.append(found) or "")
    assert asked == [kernels] and hasattr(kernels, "fd_dsa_position_ids_cuda")
    assert caplog.text.count("topk on a GPU: custom_op serves") == 1
    assert custom_ops.choices() == [custom_ops.Choice("topk", True, "agrees with the definition")]


@pytest.mark.parametrize("raises", [False, True])
def test_kernels_that_do_not_agree_are_a_warning(
    caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    def fails(kernels: Any) -> str:
        raise AttributeError("no such symbol")

    custom_ops.use_library(emulated_library("position_ids"))
    with caplog.at_level(logging.INFO, "fd_dsa"):
        assert custom_ops.choose("topk", fails if raises else wrong) is None
    said = "its probe failed: AttributeError: no such symbol" if raises else "slot_mapping differs"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert said in caplog.text


def test_the_variable_keeps_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "sparse_mla=custom_op, topk=triton")
    custom_ops.use_library(emulated_library("position_ids"))
    assert custom_ops.choose("topk", right) is None
    assert custom_ops.choose("sparse_mla", right) is not None
    assert custom_ops.choices()[1].reason == "FD_DSA_OP_PROVIDER asks for Triton"


def test_what_the_variable_asks_for_in_vain_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "topk=custom_op")
    with pytest.raises(
        BackendUnavailable, match="topk=custom_op cannot be had: fd_dsa_ops is miss"
    ):
        custom_ops.choose("topk", right)
    custom_ops.use_library(emulated_library("position_ids"))
    with pytest.raises(BackendUnavailable, match="cannot be had: slot_mapping differs"):
        custom_ops.choose("topk", wrong)


@pytest.mark.parametrize("text", ["topk", "topk=paddle", "attention=triton", "topk=triton;a=b"])
def test_a_variable_that_cannot_be_read_is_an_error(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", text)
    with pytest.raises(ConfigError, match=r"FD_DSA_OP_PROVIDER: got .*topk=custom_op"):
        custom_ops.choose("topk", right)


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"none\.so: .*; build it again"):
        custom_ops.use_library(tmp_path / "none.so")
