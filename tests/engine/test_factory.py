"""From a model folder to an engine: defaults of the folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.engine.factory import build_engine
from fd_dsa.errors import ConfigError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def demo_folder(folder: Path, **generation: object) -> Path:
    """The demo model, with another generation_config.json."""
    folder.mkdir()
    for file in demo_model_path().iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_demo_model_proposes_greedy_decoding() -> None:
    engine = build_engine(EngineConfig(max_model_len=256, max_num_seqs=2))
    assert engine.sampling_defaults["temperature"] == 0.0
    llm = LLM.from_engine(engine)
    unsaid, greedy = (
        llm.chat(QUESTION, params)[0].text for params in (None, SamplingParams(temperature=0))
    )
    assert unsaid == greedy
    assert "Paris" in unsaid


def test_proposals_of_the_folder(tmp_path: Path) -> None:
    proposed = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    folder = demo_folder(tmp_path / "model", **proposed)
    engine = build_engine(EngineConfig(model=folder, max_model_len=256, max_num_seqs=2))
    assert engine.sampling_defaults == proposed


def test_a_proposal_that_no_request_could_make(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path / "model", top_p=1.5)
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p is 1\.5"):
        build_engine(EngineConfig(model=folder))


def test_a_folder_without_tokenizer_is_refused_before_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(demo_model_path() / "config.json", folder)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        build_engine(EngineConfig(model=folder))


def test_more_cache_than_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs .* free .*--kv-cache-memory-bytes"):
        build_engine(EngineConfig(kv_cache_memory_bytes="100T"))
