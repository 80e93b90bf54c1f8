"""`python -m fd_dsa.accuracy perplexity`: figures, files, refusals."""

from __future__ import annotations

import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.embedded import open_model
from fd_dsa.accuracy.perplexity import DEFAULT_TEXT, measure, report_parts
from fd_dsa.command_line.report import Table
from tests.demo.samples import PROSE

ON_CPU = ("--device", "cpu")
TOPK = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    # characters of one byte and of two
    file.write_text(PROSE + "Größe.\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("perplexity") / "run"
    flags = ("--context", "192", "--index-topk", str(TOPK), "--kv-cache-dtype", "bfloat16")
    assert main(["perplexity", str(text), *ON_CPU, *flags, "--dense", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "perplexity.json").read_text("utf-8"))


def test_figures_are_those_of_the_losses(result: dict[str, Any], text: Path) -> None:
    model = open_model(device="cpu", max_model_len=192, index_topk=TOPK, kv_cache_dtype="bfloat16")
    losses = measure(model, text.read_text("utf-8"))
    found = result["sparse"]
    assert found["tokens"] == len(losses.nats) and found["windows"] == 1
    assert found["characters"] == len(PROSE) + 7
    assert found["bytes"] == len(PROSE) + 9
    bits = float(losses.nats.sum()) / math.log(2)
    assert found["perplexity"] == pytest.approx(math.exp(losses.nats.mean()), rel=1e-3)
    assert found["bits_per_character"] == pytest.approx(bits / (len(PROSE) + 7), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(bits / (len(PROSE) + 9), rel=1e-3)


def test_up_to_the_selection_s_size_both_attentions_agree(result: dict[str, Any]) -> None:
    stretches = result["stretches"]
    assert sum(entry["tokens"] for entry in stretches) == result["sparse"]["tokens"]
    dense = [entry for entry in stretches if entry["last"] <= TOPK]
    assert dense and max(entry["largest_difference"] for entry in dense) < 1e-3
    sparse = [entry for entry in stretches if entry["first"] > TOPK]
    assert sparse[0]["first"] == TOPK + 1
    assert max(entry["largest_difference"] for entry in sparse) > 1e-3
    settings = result["settings"]
    assert settings["index_topk"] == TOPK and settings["context"] == 192
    assert settings["kv_cache_dtype"] == "bfloat16" and settings["device"] == "cpu"


def test_the_report_holds_the_tables(result: dict[str, Any], folder: Path) -> None:
    report = (folder / "report.md").read_text("utf-8")
    tables = [part for part in report_parts(result) if isinstance(part, Table)]
    assert all(table.markdown() in report for table in tables)
    assert f"| {result['sparse']['perplexity']:.3f} |" in report
    assert "One pass." in report
    assert "prose.txt" in report and str(folder) not in report


def test_windows_are_told(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", str(text), *ON_CPU, "--context", "64"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "longer than the context" in shown
    assert "Above 4096, the size of the vocabulary" in shown


def test_the_package_s_own_text_is_the_one_of_its_notice() -> None:
    notice = (files("fd_dsa.accuracy") / "data" / "wizard_in_oz.NOTICE").read_text("utf-8")
    digest = hashlib.sha256(DEFAULT_TEXT.read_bytes()).hexdigest()
    assert f"SHA-256: {digest}" in notice
    assert DEFAULT_TEXT.name in notice and "public domain" in notice


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    good = tmp_path / "good.txt"
    good.write_text("A text.")
    out = tmp_path / "run"
    cases = {
        (str(latin),): f"{latin}: byte 2 is no UTF-8; give a text in UTF-8",
        (str(tmp_path / "none.txt"),): f"TEXT: {tmp_path}/none.txt cannot be read (no such file",
        (str(empty),): "the text has 0 tokens, too few to predict one",
        (str(good), "--context", "1"): "--context: got '1'; must be a whole number from 2 on",
        (str(good), "--context", "9999999"): "--context: got 9999999, allowed: 2 to ",
        (str(good), "--index-topk", "0"): "--index-topk: got '0'",
        (str(good), "--kv-cache-dtype", "int4"): "--kv-cache-dtype: got 'int4'",
    }
    for flags, told in cases.items():
        assert main(["perplexity", *flags, *ON_CPU, "--out", str(out)]) == 2, flags
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"fd_dsa: error: {told}")
    assert not out.exists()
