"""The real demo model: its tokens are counted right, and it finds what is out of its window."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_dsa.accuracy.cli import main
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.startup.build import build_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    """A server with the demo model."""
    config = EngineConfig(demo_model_path(), num_gpu_blocks_override=128, max_num_seqs=8)
    with running(threaded(build_engine(config)), ("demo_model",)) as live:
        yield live


@pytest.mark.slow
def test_the_demo_model_finds_pass_keys_on_both_sides_of_index_topk(
    demo: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--continuity", "--tasks", "passkey", "--depths", "0,0.5", "--trials", "1"]
    flags += ["--lengths", "topk-64,topk,topk+1,2*topk", "--max-tokens", "16"]
    flags += ["--base-url", demo.url, "--tokenizer", str(demo_model_path())]
    assert main(["retrieval", "--out", str(tmp_path), *flags]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    topk = scores["settings"]["task_settings"]["index_topk"]
    # a needle at the start of 2 * topk tokens is found only if the indexer picks it
    changes = {int(n): c["after"]["passed"] for n, c in scores["continuity"].items()}
    assert changes == {topk - 64: 2, topk: 2, topk + 1: 2, 2 * topk: 2}
    printed = capsys.readouterr().out
    assert "No step at index_topk" in printed
    assert "The server counts the same lengths (8 prompts)." in printed
