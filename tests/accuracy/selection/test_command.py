"""`python -m fd_dsa.accuracy selection` and what it leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.selection.command import parts
from fd_dsa.command_line.report import Table, page

SHORT = ("--lengths", "300", "--texts", "1", "--queries", "3", "--seed", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: two devices, of which one is not there."""
    out = tmp_path_factory.mktemp("selection") / "run"
    dtypes = ("--kv-cache-dtypes", "float32", "fp8_ds_mla")
    providers = ("--providers", "cpu", "nonesuch:0")
    assert main(["selection", *SHORT, *dtypes, *providers, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "selection.json").read_text("utf-8"))


def test_every_dtype_has_its_figures(result: dict[str, Any]) -> None:
    measured = [run for run in result["runs"] if "layers" in run]
    assert [run["kv_cache_dtype"] for run in measured] == ["float32", "fp8_ds_mla"]
    for run in measured:
        assert (run["provider"], run["device"], run["length"]) == ("cpu", "cpu", 300)
        assert run["served_by"]["cache_write"] == "numpy"
        assert [layer["layer"] for layer in run["layers"]] == list(range(len(run["layers"])))
        assert all(layer["exactness"] == 1.0 for layer in run["layers"])
    assert result["settings"]["model"] == "demo_model"


def test_a_device_that_is_missing_is_told_and_the_others_are_measured(
    result: dict[str, Any], folder: Path
) -> None:
    missing = [run for run in result["runs"] if "layers" not in run]
    assert [run["provider"] for run in missing] == ["nonesuch:0"] * 2
    assert all("nonesuch" in run["unavailable"] for run in missing)
    assert "Not run: nonesuch:0, float32: " in (folder / "report.md").read_text("utf-8")


def test_the_report_is_made_of_the_json_alone(result: dict[str, Any], folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["report.md", "selection.json"]
    assert (folder / "report.md").read_text("utf-8") == page("Selection", parts(result))


def test_tables_mark_layers_in_which_no_head_attends(result: dict[str, Any]) -> None:
    first = next(run for run in result["runs"] if "layers" in run)
    tables = [part for part in parts(result) if isinstance(part, Table)]
    rows = {row[0]: row for row in tables[0].rows}
    for layer in first["layers"]:
        name = str(layer["layer"]) + ("" if layer["attends"] else ", no head attends")
        recalls = rows[name][2:5]
        if layer["attends"]:
            assert recalls[0].startswith(f"{100 * layer['needle_recall']['indexer']:.1f} [")
        else:
            assert recalls == ("-", "-", "-")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lengths", "100"), "--lengths: got 100, allowed: above index_topk "),
        (
            ("--lengths", "999", "999999"),
            "--lengths: got 999999; with 64 tokens for the answer the model's 8192 allow 8128",
        ),
        (("--texts", "0"), "--texts: got '0'; must be a whole number from 1 on"),
        (("--queries", "0"), "--queries: got '0'; must be"),
        (("--providers", "cpu,topk=magic"), "--providers: got 'topk=magic' in 'cpu,topk=magic'"),
        (("--providers", "cpu:7x"), "--providers: got 'cpu:7x'"),
        (
            ("--kv-cache-dtypes", "int4"),
            "--kv-cache-dtypes: got 'int4', allowed: float32",
        ),
        (("--index-topk", "0"), "--index-topk: got '0'"),
        (("--texts", f"{10**12}"), "--texts and --lengths: "),
        (("nowhere",), "MODEL: got 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    brief = ("--providers", "cpu") if "--providers" not in flags else ()
    assert main(["selection", *flags, *brief, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"fd_dsa: error: {told}")
    assert not out.exists()
