"""Flags are checked before anything is loaded, and each refusal names its flag."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.capture_sizes import PROMPT_SIZES
from fd_dsa.config import EngineConfig, demo_model_path, parse_bytes
from fd_dsa.environment import prepare_cpu_runtime, switch
from fd_dsa.errors import ConfigError
from fd_dsa.speculative_config import SpeculativeConfig


def test_sizes_with_units() -> None:
    texts = ["4096", "8G", "8g", "512MiB", "512MB", "1.5K", "2 T", " 7B "]
    sizes = [4096, 8 << 30, 8 << 30, 512 << 20, 512 << 20, 1536, 2 << 40, 7]
    assert [parse_bytes(text) for text in texts] == sizes
    for text in ("", "G", "8X", "-1G", "8GG", "1e9", "8 G B", "8388608T", "9" * 400):
        with pytest.raises(ConfigError, match="8G or 512MiB"):
            parse_bytes(text)


def test_defaults_serve_the_demo_on_a_cpu() -> None:
    config = EngineConfig()
    assert config.model_path == demo_model_path()
    assert config.served_model_name == ("demo_model",)
    here = config.on_device("cpu")
    assert (here.device, here.dtype, here.kv_cache_dtype) == ("cpu", "float32", "float32")
    there = config.on_device("gpu:0")
    assert (there.device, there.dtype, there.kv_cache_dtype) == ("gpu:0", "bfloat16", "bfloat16")
    with pytest.raises(ConfigError, match=r"--dtype: got 'bfloat16'.*no bfloat16 kernels"):
        EngineConfig(dtype="bfloat16").on_device("cpu")
    assert (here.num_seqs, here.num_batched_tokens) == (64, 512 + 64)
    assert (there.num_seqs, there.num_batched_tokens) == (256, 8192)
    more = EngineConfig(max_num_seqs=9000).on_device("gpu:0")
    assert (more.num_seqs, more.num_batched_tokens) == (9000, 9000)
    less = EngineConfig(max_num_batched_tokens=100).on_device("gpu:0")
    assert (less.num_seqs, less.num_batched_tokens) == (256, 100)
    assert config.resolve_max_model_len(4096) == 4096
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    longer = EngineConfig(max_model_len=5000)
    assert longer.resolve_max_model_len(5000) == 5000
    with pytest.raises(ConfigError, match=r"--max-model-len: got 5000, .* at most 4096"):
        longer.resolve_max_model_len(4096)


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"max_num_seqs": 1}, (1,)),
        ({"max_num_seqs": 3}, (1, 2, 3)),
        ({"max_num_seqs": 20}, (1, 2, 4, 8, 16, 20)),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 9}, (1, 2, 4, 8, 9)),
        ({"max_num_seqs": 9, "cudagraph_capture_sizes": [9, 3, 3]}, (3, 9)),
        ({"enforce_eager": True}, ()),
        (
            {"max_num_seqs": 4096, "max_num_batched_tokens": 8192},
            (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)),
        ),
    ],
)
def test_sizes_of_captured_steps(fields: dict[str, Any], sizes: tuple[int, ...]) -> None:
    assert EngineConfig(**fields).on_device("gpu:0").capture_sizes == sizes


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, PROMPT_SIZES),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 256}, (32, 64, 128, 192, 256)),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 31}, ()),
        ({"cudagraph_prompt_sizes": [64, 7, 64]}, (7, 64)),
        ({"cudagraph_prompt_sizes": [0]}, ()),
        ({"enforce_eager": True}, ()),
    ],
)
def test_sizes_of_captured_steps_with_prompts(
    fields: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    assert EngineConfig(**fields).on_device("gpu:0").prompt_capture_sizes == sizes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cudagraph_capture_sizes": (0,)}, "got 0, allowed: integers from 1 to 256"),
        ({"cudagraph_capture_sizes": (257,)}, "got 257, allowed: integers from 1 to 256"),
        ({"cudagraph_capture_sizes": (True,)}, "got True"),
        ({"cudagraph_capture_sizes": ()}, "at least one integer; or take --enforce-eager"),
        ({"cudagraph_capture_sizes": 4}, "got 4, allowed: several integers"),
        ({"cudagraph_capture_sizes": (4,), "enforce_eager": True}, "together with"),
        ({"cudagraph_prompt_sizes": b"a"}, "got b'a', allowed: several integers"),
        ({"cudagraph_prompt_sizes": (-1,)}, "got -1, allowed: integers from 0 to 8192"),
        ({"cudagraph_prompt_sizes": (8193,)}, "got 8193, .* or raise --max-num-batched-tokens"),
        ({"cudagraph_prompt_sizes": (0,), "enforce_eager": True}, "together with"),
        ({"enforce_eager": 1}, "--enforce-eager: got 1, allowed: a bool"),
    ],
)
def test_sizes_that_no_step_can_have(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**fields)


def test_values_are_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(model="my-model", kv_cache_memory_bytes="1M", kv_cache_dtype="bfloat16")
    assert config.model_path == tmp_path / "my-model"
    assert config.served_model_name == ("my-model",)
    assert config.kv_cache_memory_bytes == 1 << 20
    assert config.on_device("gpu:0").kv_cache_dtype == "bfloat16"
    assert EngineConfig(model="my-model/../my-model/.").served_model_name == ("my-model",)
    several = EngineConfig(model="my-model", served_model_name=["a", "b"])  # type: ignore[arg-type]
    assert several.served_model_name == ("a", "b")
    one = EngineConfig(model="my-model", served_model_name="ab")  # type: ignore[arg-type]
    assert one.served_model_name == ("ab",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model": ""}, ["--model: got ''", "config.json; give an existing folder"]),
        ({"tokenizer": ""}, ["--tokenizer: got ''", "tokenizer.json; give an existing folder"]),
        (
            {"model": "deepseek-ai/DeepSeek-V3.2"},
            ["--model", "deepseek-ai", "snapshot_download('deepseek-ai/"],
        ),
        ({"served_model_name": ("a", "")}, ["--served-model-name"]),
        ({"device": "cuda"}, ["--device", "'cuda'", "auto, cpu, gpu", "name:number"]),
        ({"device": "gpu:x"}, ["--device", "'gpu:x'"]),
        ({"dtype": "float16"}, ["--dtype", "'float16'", "bfloat16"]),
        ({"kv_cache_dtype": "int8"}, ["--kv-cache-dtype", "'int8'", "bfloat16, fp8_ds_mla"]),
        ({"max_model_len": 0}, ["--max-model-len", "got 0", "at least 2"]),
        # no prompt and output fit
        ({"max_model_len": 1}, ["--max-model-len", "got 1", "at least 2"]),
        ({"max_num_seqs": 0}, ["--max-num-seqs", "from 1 to 1048576"]),
        # the memory of a step would end the start after the weights are read
        ({"max_num_seqs": 10**9}, ["--max-num-seqs", "got 1000000000", "to 1048576"]),
        ({"max_num_batched_tokens": 10**9}, ["--max-num-batched-tokens", "to 1048576"]),
        ({"max_num_seqs": True}, ["--max-num-seqs", "True"]),
        ({"max_num_batched_tokens": 2.5}, ["--max-num-batched-tokens", "2.5"]),
        ({"served_model_name": "\udcff"}, ["--served-model-name", "'\\udcff'", "name in UTF-8"]),
        ({"block_size": -64}, ["--block-size", "-64"]),
        ({"block_size": 2**63}, ["--block-size", f"{2**63}", "below 2**63"]),
        ({"kv_cache_memory_bytes": "8Q"}, ["--kv-cache-memory-bytes", "'8Q'"]),
        ({"kv_cache_memory_bytes": 0}, ["--kv-cache-memory-bytes", "got 0"]),
        ({"num_gpu_blocks_override": 0}, ["--num-gpu-blocks-override"]),
        ({"seed": -1}, ["--seed", "-1"]),
        *(
            (
                {"target_inter_token_latency_ms": target},
                ["--target-inter-token-latency-ms", f"got {target}", "0 for no", "1 to 60000"],
            )
            for target in (-1, 0.5, 60001, True, float("nan"), float("inf"))
        ),
        ({"enable_prefix_caching": 1}, ["--enable-prefix-caching", "got 1", "a bool"]),
        (
            {"kv_cache_memory_bytes": "1G", "num_gpu_blocks_override": 5},
            ["--num-gpu-blocks-override", "--kv-cache-memory-bytes", "one of them"],
        ),
    ],
)
def test_refusals_name_flag_value_and_rule(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**flags)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_amd_processors_take_the_fast_path_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    prepare_cpu_runtime()
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "4"
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    prepare_cpu_runtime()
    is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert os.environ.pop("MKL_DEBUG_CPU_TYPE", None) == ("5" if is_amd else None)


@pytest.mark.parametrize(("given", "taken"), [(None, "1"), ("200", "200")])
def test_idle_threads_spin_briefly_unless_told(
    monkeypatch: pytest.MonkeyPatch, given: str | None, taken: str
) -> None:
    # so that what the process had comes back
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    monkeypatch.delenv("KMP_BLOCKTIME")
    if given is not None:
        monkeypatch.setenv("KMP_BLOCKTIME", given)
    prepare_cpu_runtime()
    assert os.environ["KMP_BLOCKTIME"] == taken


@pytest.mark.parametrize("home", ["a file below it", "nowhere to write"])
def test_a_home_that_paddle_cannot_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    (tmp_path / ".cache").touch()
    monkeypatch.setenv("HOME", str(tmp_path if home == "a file below it" else tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^HOME: Paddle needs .*\.cache.*; set HOME to a"):
        prepare_cpu_runtime()
    (tmp_path / ".cache").unlink()
    prepare_cpu_runtime()
    assert (tmp_path / ".cache/paddle/dataset").is_dir()


def test_configuration_and_checkpoint_reading_do_not_import_paddle() -> None:
    code = (
        "import sys, fd_dsa.models.loader\n"
        "from fd_dsa.models.registry import config_from_dict\n"
        "from fd_dsa.startup.memory import weight_bytes\n"
        "weight_bytes(config_from_dict({'model_type': 'deepseek_v32'}))\n"
        "sys.exit('paddle' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_switch_of_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_DSA_CHECK", raising=False)
    assert switch("FD_DSA_CHECK") is None
    for value in ("", "0", "false", "1", "true", " True "):
        monkeypatch.setenv("FD_DSA_CHECK", value)
        on = value.strip().lower() in ("1", "true") if value else None
        assert switch("FD_DSA_CHECK") is on
    for value in ("yes", "2", "on"):
        monkeypatch.setenv("FD_DSA_CHECK", value)
        with pytest.raises(ConfigError, match=f"FD_DSA_CHECK: got '{value}', allowed: 0, 1, false"):
            switch("FD_DSA_CHECK")


def test_devices_and_another_name_of_fp8() -> None:
    for device in ("auto", "cpu", "gpu", "hopper:0"):
        assert EngineConfig(device=device).device == device
    assert EngineConfig(kv_cache_dtype="fp8") == EngineConfig(kv_cache_dtype="fp8_ds_mla")


@pytest.mark.parametrize(
    ("fields", "device", "method"),
    [
        ({}, "cpu", "mtp"),
        ({}, "gpu:0", None),
        ({"speculative_config": "none"}, "cpu", None),
        ({"speculative_config": {"method": "ngram"}}, "cpu", "ngram"),
        ({"tensor_parallel_size": 2}, "cpu", "mtp"),
        ({"load_format": "dummy"}, "cpu", None),
    ],
)
def test_the_demo_model_drafts_on_a_cpu_unless_asked_otherwise(
    fields: dict[str, Any], device: str, method: str | None, tmp_path: Path
) -> None:
    drafts = EngineConfig(**fields).on_device(device).speculation
    assert (drafts.method if drafts else None) == method
    assert EngineConfig(model=tmp_path).on_device(device).speculation is None


def test_speculative_config_is_read_as_vllm_writes_it() -> None:
    config = EngineConfig(speculative_config='{"method": "ngram", "num_speculative_tokens": 3}')
    assert config.speculation == SpeculativeConfig("ngram", 3, 5, 5)
    one = SpeculativeConfig.read({"method": "ngram", "prompt_lookup_max": 3})
    assert (one.prompt_lookup_max, one.prompt_lookup_min) == (3, 3)
    assert EngineConfig().speculation is None
    # steps of drafts are captured too
    assert EngineConfig(max_num_seqs=4).on_device("gpu:0").capture_sizes == (1, 2, 4)
    assert config.on_device("gpu:0").capture_sizes[-1] == 512


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("{", "--speculative-config: got '{', allowed: none or a JSON object"),
        ("[" * 10**5, r"--speculative-config: got '\[{47}\.{3}\[{48}', allowed: none or a JSON"),
        ("[1]", "allowed: none or a JSON object"),
        (
            '{"method": "mtp", "method": "ngram"}',
            "^--speculative-config: the name 'method' is there twice in one object; give it once$",
        ),
        ('{"method": "mtp", "x": [{"y": 1, "y": 1}]}', "the name 'y' is there twice"),
        ({"method": "eagle"}, "--speculative-config.method: got 'eagle', allowed: mtp, ngram"),
        ({}, "--speculative-config.method: got None"),
        ({"method": "ngram", "num_speculative_tokens": 4}, "got 4, allowed: .* from 1 to 3"),
        ({"method": "ngram", "num_speculative_tokens": True}, "got True"),
        ({"method": "ngram", "num_spec_tokens": 2}, "; did you mean num_speculative_tokens\\?"),
        ({"method": "ngram", "model": "x"}, "--speculative-config: got 'model', allowed: the keys"),
        ({"method": "mtp", "prompt_lookup_max": 3}, "prompt_lookup_max: got 3, .*method ngram"),
        (
            {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "prompt_lookup_min: got 3, allowed: at most prompt_lookup_max, 2",
        ),
    ],
)
def test_a_wrong_speculative_config_is_refused_by_its_key(given: object, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        EngineConfig(speculative_config=given)  # type: ignore[arg-type]
