"""Custom operators are measured with the other sides, or left out with a printed reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import _custom_ops
from custom_ops.build_library import BuildError
from fd_dsa import custom_ops
from fd_dsa.ops import providers


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    _custom_ops.library.cache_clear()
    yield
    _custom_ops.library.cache_clear()
    custom_ops.use_library(None)


def serving(reason: str) -> str:
    """What a benchmark sets up: asks which kernel serves, whose probe says `reason`."""
    choice = providers.choose("topk", "cuda", probe=lambda library: reason)
    return choice.provider


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_custom_ops, "library", lambda: Path("libc.so.6"))


def test_it_serves_what_is_set_up_with_it_and_nothing_after(library: None) -> None:
    assert _custom_ops.set_up("topk", lambda: serving("")) == "custom_op"
    assert serving("") == "triton"


def test_what_was_taken_before_does_not_serve_without(monkeypatch: pytest.MonkeyPatch) -> None:
    custom_ops.use_library("libc.so.6")
    assert serving("") == "custom_op"
    assert _custom_ops.without(lambda: serving("")) == "triton"
    installed = custom_ops.Build(custom_ops.BUILT, "for a GPU", "x.so", kernels=object())
    monkeypatch.setattr(custom_ops, "build", lambda: installed)
    with pytest.raises(RuntimeError, match="fd_dsa_ops serves topk; uninstall it"):
        _custom_ops.without(lambda: serving(""))


def test_one_that_disagrees_is_left_out(library: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert _custom_ops.set_up("topk", lambda: serving("slots differ")) is None
    assert "left out: topk: slots differ" in capsys.readouterr().out


def test_without_a_compiler_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Path:
        raise BuildError("no nvcc")

    monkeypatch.setattr(_custom_ops, "build_library", refuse)
    assert _custom_ops.set_up("topk", lambda: serving("")) is None
    assert "custom operators left out: no nvcc" in capsys.readouterr().out


def test_a_library_that_cannot_be_loaded_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_custom_ops, "build_library", lambda: tmp_path / "missing.so")
    assert _custom_ops.set_up("topk", lambda: serving("")) is None
    assert "missing.so" in capsys.readouterr().out
