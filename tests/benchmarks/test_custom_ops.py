"""Which custom operators serve a benchmark, and why others do not."""

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
    providers.drop_selections()


@pytest.mark.parametrize("reason", ["", "slots differ"])
def test_what_serves_and_what_does_not(reason: str) -> None:
    custom_ops.use_library("libc.so.6")
    providers.drop_selections()
    providers.choose("topk", "cuda", probe=lambda library: reason)
    assert _custom_ops.serving() == {"topk": reason or True}


def test_without_a_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Path:
        raise BuildError("no nvcc")

    monkeypatch.setattr(_custom_ops, "build_library", refuse)
    assert _custom_ops.library() is None
    assert "custom operators left out: no nvcc" in capsys.readouterr().out
