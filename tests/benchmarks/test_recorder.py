"""The result file of a GPU benchmark: shapes that fail, shapes without time, a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import _gpu
from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME, write_json

TIMES = {"ours": {"p20": 1.0, "p50": 2.0, "p80": 3.0}}


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a GPU is measured."""
    monkeypatch.setattr(_gpu, "ceilings", lambda: {"copy_bytes_per_s": 4e12, "node_us": 0.5})
    monkeypatch.setattr(_gpu, "clocks", dict)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "it.json").read_text())


def add(record: _gpu.Recorder, name: str) -> None:
    """An attempt of one case."""

    def case() -> None:
        record.case(f"{name}, timed", TIMES, ours="ours")
        if name == "bad":
            raise RuntimeError("no such kernel")

    record.attempt(name, case)


def test_a_shape_that_fails_leaves_the_others(tmp_path: Path) -> None:
    with _gpu.Recorder("it", tmp_path) as record:
        for name in ("first", "bad", "last"):
            add(record, name)
        record.attempt("wrong", lambda: False)
    found = result(tmp_path)
    assert found["done"] == ["first", "last"] and found["complete"]
    assert found["failed"] == {"bad": "RuntimeError: no such kernel", "wrong": "a side is wrong"}
    assert record.status() == 1


def test_a_run_without_time_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _gpu.Recorder("it", tmp_path) as record:
        add(record, "first")
        monkeypatch.setattr(record, "_end", 0.0)
        add(record, "second")
    assert result(tmp_path)["not_run"] == ["second"] and record.status() == OUT_OF_TIME
    cut = result(tmp_path)
    # a case of a shape that was not done when the process was ended
    cut["cases"].append(cut["cases"][0] | {"case": "half", "attempt": "second"})
    write_json(tmp_path / "it.json", cut)
    with _gpu.Recorder("it", tmp_path) as record:
        for name in ("first", "second"):
            add(record, name)
    found = result(tmp_path)
    assert [case["case"] for case in found["cases"]] == ["first, timed", "second, timed"]
    assert found["complete"] and record.status() == 0 and not found["not_run"]
    # a complete one is measured anew
    with _gpu.Recorder("it", tmp_path):
        assert result(tmp_path)["cases"] == []


def test_what_another_tree_left_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    monkeypatch.setenv("FD_DSA_COMMIT", "1" * 40)
    with _gpu.Recorder("it", tmp_path) as record:
        add(record, "first")
    assert result(tmp_path)["not_run"] == ["first"]
    monkeypatch.setenv("FD_DSA_COMMIT", "2" * 40)
    with _gpu.Recorder("it", tmp_path):
        assert "not_run" not in result(tmp_path)
