"""Decisions before weights are loaded."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.distributed.host import HostGroup
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.startup import hardware
from fd_dsa.startup.build import build_engine
from fd_dsa.startup.plan import make_plan
from fd_dsa.startup.progress import PHASES, StartupProgress
from fd_dsa.triton_runtime.driver import GpuTraits


def test_a_plan_has_every_value_resolved() -> None:
    told = make_plan(EngineConfig(device="cpu", num_gpu_blocks_override=200)).describe()
    assert (told["device"], told["dtype"], told["kv_cache_dtype"]) == ("cpu", "float32", "float32")
    assert (told["max_model_len"], told["max_num_batched_tokens"]) == (8192, 576)
    assert told["served_model_name"] == ["demo_model"]
    memory = told["memory"]
    assert (memory["num_blocks"], memory["num_tokens"]) == (200, 200 * 64)
    assert memory["kv_cache_bytes"] == 200 * memory["bytes_per_block"]
    assert memory["weight_bytes"] > 1 << 20


def folder_without(tmp_path: Path, *names: str) -> Path:
    """The demo model with some files left out."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_model_path().iterdir():
        if file.name not in names:
            (folder / file.name).symlink_to(file)
    return folder


def folder_that_proposes(tmp_path: Path, **generation: object) -> Path:
    """The demo model, with another generation_config.json."""
    folder = folder_without(tmp_path, "generation_config.json")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_demo_model_proposes_greedy_decoding() -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(max_model_len=256, max_num_seqs=2) as llm:
        assert llm.sampling_defaults["temperature"] == 0.0
        unsaid, greedy = (
            llm.chat(question, params)[0].text for params in (None, SamplingParams(temperature=0))
        )
        # the 256 tokens that the folder proposes do not fit after a prompt
        assert llm.sampling_defaults["max_tokens"] == 256
    assert unsaid == greedy
    assert "Paris" in unsaid


def test_proposals_of_the_folder(tmp_path: Path) -> None:
    proposed = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    folder = folder_that_proposes(tmp_path, max_new_tokens=3, **proposed)
    config = EngineConfig(model=folder, max_model_len=256, max_num_seqs=2)
    assert make_plan(config).sampling_defaults == {**proposed, "max_tokens": 3}
    assert make_plan(replace(config, generation_config="vllm")).sampling_defaults == {}
    with LLM(model=folder, max_model_len=256, max_num_seqs=2) as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        for (output,) in (llm.generate("Once upon"), llm.chat(question)):
            assert (len(output.token_ids), output.finish_reason) == (3, "length")
        # of a caller that gives parameters nothing is replaced
        (output,) = llm.generate("Once upon", SamplingParams(max_tokens=5, ignore_eos=True))
        assert len(output.token_ids) == 5


def test_a_proposal_that_no_request_could_make(tmp_path: Path) -> None:
    folder = folder_that_proposes(tmp_path, top_p=1.5)
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p: got 1\.5"):
        make_plan(EngineConfig(model=folder))


def test_dummy_weights_need_no_checkpoint_and_depend_on_the_seed(tmp_path: Path) -> None:
    folder = folder_without(tmp_path, "model.safetensors")
    with pytest.raises(ConfigError, match="safetensors"):
        make_plan(EngineConfig(model=folder, device="cpu"))
    answers = []
    for seed in (1, 1, 2):
        config = {"load_format": "dummy", "seed": seed, "max_model_len": 64, "max_num_seqs": 1}
        with LLM(folder, **config) as llm:
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            answers.append(llm.generate([[5, 6, 7]], params)[0].token_ids)
    assert answers[0] == answers[1] != answers[2]


def test_a_tokenizer_of_another_folder(tmp_path: Path) -> None:
    folder = folder_without(tmp_path, "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        make_plan(EngineConfig(model=folder, device="cpu"))
    config = EngineConfig(model=folder, device="cpu", tokenizer=demo_model_path())
    plan = make_plan(config)
    assert plan.tokenizer.encode("Hello") and plan.describe()["tokenizer"] == str(demo_model_path())


@pytest.mark.parametrize("highest", [4096, 2**32 - 1])
@pytest.mark.parametrize("decoder", [None, decoders.ByteLevel()], ids=["words", "bytes"])
def test_a_tokenizer_with_ids_beyond_the_embeddings(
    tmp_path: Path, highest: int, decoder: decoders.Decoder | None
) -> None:
    folder = folder_without(tmp_path, "tokenizer.json")
    # two tokens, and a hole between them
    foreign = tokenizers.Tokenizer(models.WordLevel({"t0": 0, "t1": 1}, "t0"))
    if decoder is not None:
        # a table of bytes with a place for each id would not fit in memory
        foreign.decoder = decoder
    data = json.loads(foreign.to_str())
    data["model"]["vocab"]["t1"] = highest
    (folder / "tokenizer.json").write_text(json.dumps(data))
    found = rf"up to {highest}, vocab_size of the model's config\.json is 4096; "
    with pytest.raises(ConfigError, match=f"{found}it does not belong to this model"):
        make_plan(EngineConfig(model=folder, device="cpu"))
    with pytest.raises(ConfigError, match=f"{found}leave out --tokenizer"):
        make_plan(EngineConfig(device="cpu", tokenizer=folder))


def test_host_memory_that_cannot_be_used_is_refused() -> None:
    config = EngineConfig(kv_offload_bytes="1M", enable_prefix_caching=False)
    said = "^--kv-offload-bytes: got 1048576, allowed: 0 without prefix caching; leave it out$"
    with pytest.raises(ConfigError, match=said):
        make_plan(config)


def test_unknown_fields_of_a_model_are_refused_unless_the_flag_accepts_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_without(tmp_path, "config.json")
    fields = json.loads((demo_model_path() / "config.json").read_text()) | {"index_kpool": 4}
    (folder / "config.json").write_text(json.dumps(fields))
    asked = {"model": folder, "device": "cpu", "num_gpu_blocks_override": 200}
    with pytest.raises(ConfigError, match=r"index_kpool: got 4, .*--allow-unknown-config-fields"):
        make_plan(EngineConfig(**asked))
    plan = make_plan(EngineConfig(**asked, allow_unknown_config_fields=True))
    assert plan.model_config.index_topk == 256
    assert [one.getMessage().rpartition(": ")[2] for one in caplog.records] == ["index_kpool"]


def test_fewer_chosen_keys_make_more_tokens_sparse() -> None:
    prompt = list(range(5, 69))
    sparse = []
    for topk in (None, 16):
        config = EngineConfig(device="cpu", index_topk=topk, max_model_len=128, max_num_seqs=1)
        assert make_plan(config).model_config.index_topk == (topk or 256)
        engine = build_engine(config)
        engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=1))
        engine.step()
        sparse.append(engine.metrics.steps.sparse_tokens)
    assert sparse == [0, 64 - 16]


def test_as_many_keys_may_be_chosen_as_a_row_can_have() -> None:
    most = make_plan(EngineConfig(device="cpu")).model_config.max_position_embeddings
    assert make_plan(EngineConfig(device="cpu", index_topk=most)).model_config.index_topk == most
    said = rf"^--index-topk: got {most + 1}, allowed: at most {most}, "
    with pytest.raises(ConfigError, match=said):
        make_plan(EngineConfig(device="cpu", index_topk=most + 1))


def test_the_share_of_a_device_that_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def free_device_bytes(device: str, utilization: float) -> int:
        asked.append(utilization)
        return int(utilization * (8 << 30))

    monkeypatch.setattr("fd_dsa.device.resolve.free_device_bytes", free_device_bytes)
    monkeypatch.setattr("fd_dsa.device.resolve.traits_of", lambda device: None)
    monkeypatch.setattr("fd_dsa.attention.device_memory.workspace_bytes", lambda *_: 3 << 28)
    monkeypatch.setattr("fd_dsa.runner.device_steps.sampling_bytes", lambda *_: 1 << 28)
    blocks = []
    for share in (0.5, 1.0):
        config = EngineConfig(
            device="cpu", gpu_memory_utilization=share, max_num_seqs=9000, enforce_eager=True
        )
        plan = make_plan(config).memory
        blocks.append(plan.num_blocks)
        assert plan.activation_bytes > 0
        room = int(share * (8 << 30)) - (1 << 30) - plan.weight_bytes - plan.activation_bytes
        assert plan.num_blocks == room // plan.bytes_per_block
    assert asked == [0.5, 1.0] and blocks[0] < blocks[1]


def test_the_rank_with_the_largest_weights_bounds_the_caches() -> None:
    """A rank whose device lacks the kernels of a format holds more bytes than the others."""
    group: Any = create_autospec(HostGroup, instance=True, rank=0, size=2)
    config, plans = EngineConfig(device="cpu", tensor_parallel_size=2, max_num_seqs=9000), []
    for times in (1, 3):
        group.all_gather.side_effect = lambda mine, times=times: np.stack([mine, mine * [1, times]])
        plans.append(make_plan(config, group).memory)
    assert plans[1].weight_bytes == 3 * plans[0].weight_bytes
    total = plans[1].weight_bytes + plans[1].kv_cache_bytes
    assert total <= plans[1].free_bytes


def test_the_share_means_nothing_on_a_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    make_plan(EngineConfig(device="cpu"))
    assert caplog.messages == []
    make_plan(EngineConfig(device="cpu", gpu_memory_utilization=0.5))
    assert "--gpu-memory-utilization has no effect on cpu" in caplog.text


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Let the device be a GPU of a compute capability."""

    def pretend(capability: int) -> None:
        traits = GpuTraits(capability, 108, 99 << 10)
        monkeypatch.setattr("fd_dsa.device.resolve.resolve_device", lambda name: "gpu:0")
        monkeypatch.setattr("fd_dsa.device.resolve.keep_float32", lambda device: None)
        monkeypatch.setattr("fd_dsa.device.resolve.traits_of", lambda device: traits)
        monkeypatch.setattr("fd_dsa.device.resolve.free_device_bytes", lambda *_: 1 << 34)

    return pretend


def test_a_gpu_without_the_instructions_is_refused(on_a_gpu) -> None:
    on_a_gpu(75)
    with pytest.raises(BackendUnavailable) as caught:
        make_plan(EngineConfig(device="gpu"))
    assert str(caught.value) == (
        "--device: got gpu:0, a GPU of compute capability 7.5; kernels need 8.0 (A100) or later; "
        "take --device cpu"
    )
    on_a_gpu(80)
    with pytest.raises(ConfigError) as refused:
        make_plan(EngineConfig(device="gpu", kv_cache_dtype="fp8_ds_mla"))
    assert str(refused.value) == (
        "--kv-cache-dtype: got 'fp8_ds_mla', but gpu:0 is of compute capability 8.0 and FP8 needs "
        "8.9 or later; take --kv-cache-dtype bfloat16"
    )


def test_blocks_of_fp8_caches() -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(EngineConfig(device="cpu", kv_cache_dtype="fp8", block_size=32))
    assert str(refused.value) == (
        "--block-size: got 32, allowed: 64 with --kv-cache-dtype fp8_ds_mla; leave it out"
    )


def test_ranks_that_exchange_heads_hold_those_of_all(
    on_a_gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(90)
    monkeypatch.setattr("fd_dsa.device.resolve.paddle_device_counts", lambda: {"gpu": 4})
    monkeypatch.setattr("paddle.device.set_device", lambda device: None)
    config, held = EngineConfig(device="gpu", tensor_parallel_size=4), []
    for tokens in ("0", "2048"):
        monkeypatch.setenv("FD_DSA_EXCHANGED_MIN_TOKENS", tokens)
        plan = make_plan(config)
        held.append(plan.memory.weight_bytes)
    model = plan.whole_config
    width = model.qk_nope_head_dim + model.v_head_dim
    values = model.num_attention_heads * width * model.kv_lora_rank
    # three quarters of both up-projections of every layer, in bfloat16
    num_layers = len(model.has_indexer)
    assert plan.config.dtype == "bfloat16"
    assert held[1] - held[0] == num_layers * 2 * values * 3 // 4


@pytest.mark.parametrize("capability", [80, 89])
def test_fp8_weights_are_bfloat16_where_nothing_multiplies_them(
    on_a_gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture, capability: int
) -> None:
    on_a_gpu(capability)
    folder = folder_without(tmp_path, "config.json")
    config = json.loads((demo_model_path() / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    plan = make_plan(EngineConfig(model=folder, device="gpu", load_format="dummy"))
    assert bool(plan.fp8) == (capability == 89)
    said = "gpu:0 has no FP8 instructions: FP8 weights are held in bfloat16"
    assert (said in caplog.text) == (capability == 80)


@pytest.mark.parametrize(
    ("name", "found", "refused"),
    [
        ("paddlepaddle", "3.2.2", True),
        ("paddlepaddle", "3.3.0", False),
        ("paddlepaddle", "3.10.0", False),
        ("paddlepaddle", "0.0.0", False),
        ("paddlepaddle-gpu", "3.2.0.dev20260101", True),
        ("paddlepaddle-gpu", "3.3.1", False),
    ],
)
def test_releases_of_paddle_that_are_too_old(
    monkeypatch: pytest.MonkeyPatch, name: str, found: str, refused: bool
) -> None:
    def version(asked: str) -> str:
        if asked == name:
            return found
        raise importlib.metadata.PackageNotFoundError(asked)

    monkeypatch.setattr(hardware, "version", version)
    config = EngineConfig(device="cpu", max_model_len=256, max_num_seqs=1)
    if not refused:
        assert make_plan(config).max_model_len == 256
        return
    with pytest.raises(BackendUnavailable) as caught:
        make_plan(config)
    said = str(caught.value)
    assert said.startswith(f"{name} {found} is too old")
    # no index that pip knows has builds for GPUs
    assert (" -m pip install --upgrade " in said) == (name == "paddlepaddle")


def test_phases_are_told_one_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    progress = StartupProgress()
    told: list[Any] = []
    for number, name in enumerate(PHASES, 1):
        assert progress.phase == name
        progress.note("half")
        told.append(progress.describe())
        assert told[-1].startswith(f"{name} (phase {number} of 5, half), ")
        progress.done(f"text {number}")
    assert caplog.messages == [
        f"[{number}/5] {name:<8} text {number}" for number, name in enumerate(PHASES, 1)
    ]
    # the last phase goes on as long as the server runs
    assert progress.phase == PHASES[-1]
