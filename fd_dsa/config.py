"""Configuration of the engine, typed and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fd_dsa.cache_formats import CACHE_FORMATS
from fd_dsa.capture_sizes import PROMPT_SIZES, checked_sizes, decode_sizes
from fd_dsa.errors import ConfigError, flag_error, shorten
from fd_dsa.speculative_config import SpeculativeConfig

CPU_SEQS, GPU_SEQS = 64, 256
"""Default largest number of sequences in a step, by device."""

CPU_PROMPT_TOKENS = 512
"""Prompt tokens of a step on a CPU: enough for fast GEMMs, few enough for smooth streams."""

GPU_STEP_TOKENS = 8192
"""Tokens of a step on a GPU: a prompt's GEMMs are at their best from a few thousand rows on."""

DEFAULT_TARGET_MS = 200.0
"""Target milliseconds between two tokens of a server, about the speed of reading."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Pattern of a model's name on a hub."""

MAX_INTEGER = (1 << 63) - 1
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
DEVICES = ("auto", "cpu", "gpu")
GENERATION_CONFIGS = ("auto", "vllm")
# DEVICES, or a custom device of Paddle
_DEVICE_PATTERN = re.compile(rf"{'|'.join(DEVICES)}|[A-Za-z_]\w*:\d+")
_DTYPES = ("auto", "float32", "bfloat16")
_CACHE_DTYPES = ("auto", *CACHE_FORMATS)
# the names of other servers
_CACHE_DTYPE_ALIASES = {alias: one.name for one in CACHE_FORMATS.values() for alias in one.aliases}
_LOAD_FORMATS = ("auto", "safetensors", "dummy")
_MAX_RANKS, _LARGEST_TARGET_MS = 8, 60_000
NO_DRAFTS = "none"


def demo_model_path() -> Path:
    """Return the folder of the demo checkpoint in the package."""
    return Path(__file__).resolve().parent / "demo_model"


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a text such as `8G`, `512MiB`, `1.5GB` or `4096`.

    K, M, G and T are powers of 1024, with or without `B` or `iB`, in upper or lower case.

    Raises:
        ConfigError: the text has another form, or means too many bytes.
    """
    match = _BYTES_PATTERN.fullmatch(text.strip())
    if match is None or (size := float(match[1]) * _UNITS[match[2].upper()]) > MAX_INTEGER:
        raise ConfigError(
            f"size {shorten(text)}: allowed are a number and an optional unit K, M, G or T, "
            "for example 8G or 512MiB, below 2**63 bytes"
        )
    return int(size)


def _is_integer(value: object, low: int, high: int = MAX_INTEGER) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = "an integer of at least 1, below 2**63", lambda value: _is_integer(value, 1)
_OPTIONAL: _Rule = _POSITIVE[0], lambda value: value is None or _is_integer(value, 1)
# a token of a prompt and one of the output
_LENGTH: _Rule = "an integer of at least 2, below 2**63", lambda x: x is None or _is_integer(x, 2)
_STEP: _Rule = "an integer from 1 to 1048576", lambda x: x is None or _is_integer(x, 1, 1 << 20)
_COUNT: _Rule = "an integer of at least 0, below 2**63", lambda value: _is_integer(value, 0)
_SWITCH: _Rule = "a bool", lambda value: isinstance(value, bool)
# flag -> (allowed values in words, check)
_RULES: dict[str, _Rule] = {
    "device": (
        f"{', '.join(DEVICES)}, in Python also a custom device of Paddle as name:number",
        lambda value: isinstance(value, str) and _DEVICE_PATTERN.fullmatch(value) is not None,
    ),
    "dtype": (", ".join(_DTYPES), _DTYPES.__contains__),
    "kv_cache_dtype": (", ".join(_CACHE_DTYPES), _CACHE_DTYPES.__contains__),
    "generation_config": (", ".join(GENERATION_CONFIGS), GENERATION_CONFIGS.__contains__),
    "load_format": (", ".join(_LOAD_FORMATS), _LOAD_FORMATS.__contains__),
    "block_size": _OPTIONAL,
    "max_model_len": _LENGTH,
    **dict.fromkeys(("max_num_seqs", "max_num_batched_tokens"), _STEP),
    **dict.fromkeys(("index_topk", "kv_cache_memory_bytes", "num_gpu_blocks_override"), _OPTIONAL),
    **dict.fromkeys(("allow_unknown_config_fields", "async_scheduling", "enforce_eager"), _SWITCH),
    **dict.fromkeys(("enable_chunked_prefill", "enable_prefix_caching"), _SWITCH),
    **dict.fromkeys(("kv_offload_bytes", "seed"), _COUNT),
    "tensor_parallel_size": _POSITIVE,
    "gpu_memory_utilization": ("above 0 and at most 1", lambda x: _is_number(x, 0, 1) and x > 0),
    "target_inter_token_latency_ms": (
        f"0 for no target, or milliseconds from 1 to {_LARGEST_TARGET_MS}",
        lambda value: _is_number(value, 0, 0) or _is_number(value, 1, _LARGEST_TARGET_MS),
    ),
}


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the engine, each under the name of its command-line flag.

    Attributes:
        model: folder of a checkpoint in Hugging Face format, None = the demo model.
        served_model_name: names that requests may use, empty = the folder's name.
        tokenizer: folder of the tokenizer and its chat template, None = the model's folder.
        load_format: source of weights: "safetensors" files, "auto" (the same), or "dummy" (random
            numbers, for measurements without a checkpoint).
        index_topk: keys that the indexer selects for a token, None = the model's number.
        allow_unknown_config_fields: load a model whose config.json has unknown fields, with one
            warning. Otherwise they are refused.
        device: device of the model: "cpu", "gpu" (the first that CUDA_VISIBLE_DEVICES shows), or
            "auto" (a GPU if Paddle has one, else the CPU). In Python also the place of a custom
            device of Paddle, such as "name:0".
        tensor_parallel_size: processes that share the model, each with a GPU or with some of the
            CPU's cores.
        dtype: dtype of activations and of weights that are not FP8. "auto" is bfloat16 on a GPU
            and float32 on a CPU, which has no other.
        kv_cache_dtype: format of the caches, see `fd_dsa.cache_formats`. "auto" is the dtype of
            the activations.
        max_model_len: longest prompt plus output in tokens, None = the model's own limit.
        max_num_seqs: max sequences in one step, None = 64 on a CPU and 256 on a GPU.
        max_num_batched_tokens: max tokens in one step, None = 512 of prompts plus one of each
            sequence on a CPU, and 8,192 on a GPU.
        target_inter_token_latency_ms: max milliseconds between two tokens of an answer while
            prompts are computed, 0 = no target. The default of a server is `DEFAULT_TARGET_MS`. A
            program that waits for whole answers needs no target.
        block_size: tokens per cache block, None = the model's `default_block_size`.
        kv_cache_memory_bytes: size of the caches, a number or a text such as "8G".
        kv_offload_bytes: host memory for evicted prefix blocks, a size as above, 0 = off.
        gpu_memory_utilization: fraction of a GPU's memory for weights and caches, 0 to 1.
        num_gpu_blocks_override: number of cache blocks, instead of `kv_cache_memory_bytes`.
        enable_prefix_caching: share the cache blocks of prompts that begin alike.
        enable_chunked_prefill: only True: prompts are split at `max_num_batched_tokens`.
        async_scheduling: prepare and enqueue a step on a GPU while the one before runs.
        enforce_eager: launch decode steps on a GPU kernel by kernel, without CUDA graphs.
        cudagraph_capture_sizes: numbers of rows for which decode steps are captured. A step of
            fewer rows is padded. None = 1, 2, 4, 8, then every eighth number up to `max_num_seqs`.
        cudagraph_prompt_sizes: numbers of tokens for which steps with prompts are captured. (0,)
            keeps them eager. None = sizes from 32 to 2,048, at most `max_num_batched_tokens`.
        speculative_config: source of drafts, see SpeculativeConfig, or "none". None = three drafts
            of the demo model's own MTP layer on a CPU, and otherwise no drafts.
        generation_config: defaults of requests: "auto" (generation_config.json of the model's
            folder) or "vllm" (the defaults of the API).
        seed: seed of requests without one.
        chat_template: Jinja file that renders conversations, None = the folder's template.

    Raises:
        ConfigError: a value is not allowed. The message names the flag.
    """

    model: str | os.PathLike[str] | None = None
    served_model_name: tuple[str, ...] = ()
    tokenizer: str | os.PathLike[str] | None = None
    load_format: str = "auto"
    index_topk: int | None = None
    allow_unknown_config_fields: bool = False
    device: str = "auto"
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    target_inter_token_latency_ms: float = 0.0
    block_size: int | None = None
    kv_cache_memory_bytes: int | str | None = None
    kv_offload_bytes: int | str = 0
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    enforce_eager: bool = False
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    cudagraph_prompt_sizes: tuple[int, ...] | None = None
    speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None = None
    generation_config: str = "auto"
    seed: int = 0
    chat_template: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        self._set("model", self._checked_folder("model") or demo_model_path())
        self._set("tokenizer", self._checked_folder("tokenizer"))
        names = self.served_model_name
        if not isinstance(names, (str, Sequence)):
            raise flag_error("served_model_name", names, "a name or a list of names")
        names = (names,) if isinstance(names, str) else tuple(names)
        self._set("served_model_name", names or (self.model_path.name,))
        for one in self.served_model_name:
            if not isinstance(one, str) or not one or one.encode(errors="ignore").decode() != one:
                raise flag_error("served_model_name", one, "a non-empty name in UTF-8")
        if isinstance(self.kv_cache_dtype, str):
            cache_dtype = _CACHE_DTYPE_ALIASES.get(self.kv_cache_dtype, self.kv_cache_dtype)
            self._set("kv_cache_dtype", cache_dtype)
        for name in ("kv_cache_memory_bytes", "kv_offload_bytes"):
            if isinstance(size := getattr(self, name), str):
                try:
                    self._set(name, parse_bytes(size))
                except ConfigError as error:
                    raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None
        for name, (allowed, is_allowed) in _RULES.items():
            if not is_allowed(getattr(self, name)):
                raise flag_error(name, getattr(self, name), allowed)
        given = self.speculative_config
        if given not in (None, NO_DRAFTS) and not isinstance(given, SpeculativeConfig):
            self._set("speculative_config", SpeculativeConfig.read(given))
        self._check_together()
        self._check_capture_sizes()
        template = self.chat_template
        # a number would mean the descriptor of an open file
        is_path = isinstance(template, (str, os.PathLike))
        if template is not None and not (is_path and os.path.isfile(template)):
            got = os.fspath(template) if is_path else template
            raise flag_error("chat_template", got, "a file with a Jinja template")

    @property
    def model_path(self) -> Path:
        return Path(self.model)  # type: ignore[arg-type]

    @property
    def tokenizer_path(self) -> Path:
        return self.model_path if self.tokenizer is None else Path(self.tokenizer)

    def on_device(self, device: str) -> EngineConfig:
        """Return the settings with `device`, and with sizes, dtypes and drafts resolved for it.

        Raises:
            ConfigError: the device does not support `dtype`.
        """
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        if device == "cpu" and dtype != "float32":
            raise flag_error(
                "dtype",
                dtype,
                "auto or float32 on a CPU: Paddle's CPU build has no bfloat16 kernels",
                "bfloat16 checkpoints are converted while loading",
            )
        cache_dtype = dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        drafts = self.speculative_config
        # without the flag the demo model drafts
        is_demo = self.load_format != "dummy" and self.model_path == demo_model_path()
        if drafts is None and device == "cpu" and is_demo:
            drafts = SpeculativeConfig("mtp", 3)
        num_seqs, num_tokens = self._step_sizes(device)
        resolved: dict[str, Any] = {
            "max_num_seqs": num_seqs,
            "max_num_batched_tokens": num_tokens,
            "dtype": dtype,
            "kv_cache_dtype": cache_dtype,
            "speculative_config": drafts,
        }
        return replace(self, device=device, **resolved)

    def with_blocks(self, tokens: int) -> EngineConfig:
        """Return the configuration with blocks of `tokens` tokens, unless it names their size."""
        return self if self.block_size is not None else replace(self, block_size=tokens)

    @property
    def tokens_per_block(self) -> int:
        """`block_size`, which `with_blocks` resolves."""
        return int(self.block_size)  # type: ignore[arg-type]

    @property
    def num_seqs(self) -> int:
        """`max_num_seqs`, which `on_device` resolves."""
        return int(self.max_num_seqs)  # type: ignore[arg-type]

    @property
    def num_batched_tokens(self) -> int:
        """`max_num_batched_tokens`, which `on_device` resolves."""
        return int(self.max_num_batched_tokens)  # type: ignore[arg-type]

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, which is resolved after construction."""
        given = self.speculative_config
        return given if isinstance(given, SpeculativeConfig) else None

    @property
    def max_drafts(self) -> int:
        """Max drafts of a request in a step."""
        return self.speculation.num_speculative_tokens if self.speculation else 0

    @property
    def max_decode_tokens(self) -> int:
        """Max tokens of a decode step, drafts included."""
        return self._decode_tokens(self.device)

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        """Numbers of rows for which decode steps are captured on a GPU, ascending."""
        if self.enforce_eager:
            return ()
        if self.cudagraph_capture_sizes is not None:
            return self.cudagraph_capture_sizes
        return decode_sizes(self.max_decode_tokens)

    @property
    def prompt_capture_sizes(self) -> tuple[int, ...]:
        """Numbers of tokens for which steps with prompts are captured on a GPU, ascending."""
        sizes = self.cudagraph_prompt_sizes
        if sizes is None and not self.enforce_eager:
            sizes = PROMPT_SIZES
        return tuple(size for size in sizes or () if 0 < size <= self.num_batched_tokens)

    def resolve_max_model_len(self, max_position_embeddings: int) -> int:
        """Return the tokens of the longest sequence.

        Raises:
            ConfigError: `max_model_len` exceeds the model's own maximum.
        """
        if self.max_model_len is None:
            return max_position_embeddings
        if self.max_model_len > max_position_embeddings:
            allowed = f"at most {max_position_embeddings}, the model's max_position_embeddings"
            raise flag_error("max_model_len", self.max_model_len, allowed, "lower it")
        return self.max_model_len

    def _step_sizes(self, device: str) -> tuple[int, int]:
        """Return `max_num_seqs` and `max_num_batched_tokens`, given or the device's defaults."""
        num_seqs = self.max_num_seqs or (CPU_SEQS if device == "cpu" else GPU_SEQS)
        # a decode step has a token of each sequence
        num_tokens = (
            num_seqs + CPU_PROMPT_TOKENS if device == "cpu" else max(GPU_STEP_TOKENS, num_seqs)
        )
        return num_seqs, self.max_num_batched_tokens or num_tokens

    def _decode_tokens(self, device: str) -> int:
        """Return the max tokens of a decode step with the sizes of a device."""
        num_seqs, num_tokens = self._step_sizes(device)
        return min((1 + self.max_drafts) * num_seqs, num_tokens)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _checked_folder(self, name: str) -> Path | None:
        path = getattr(self, name)
        if path is None:
            return None
        if not isinstance(path, (str, os.PathLike)):
            raise flag_error(name, path, "a path of a local folder")
        folder, text = Path(os.path.abspath(os.path.expanduser(path))), os.fspath(path)
        # an empty text, for example from an unset variable of a script, is not this folder
        if not text or not os.path.isdir(folder):
            file, hint = f"{'config' if name == 'model' else name}.json", "give an existing folder"
            if name == "model" and HUB_NAME.fullmatch(text) and not os.path.lexists(text):
                hint = (
                    "if that is a model of a hub, give the folder that "
                    f"huggingface_hub.snapshot_download({shorten(text)}) returns"
                )
            allowed = f"a local folder in Hugging Face format with {file}"
            raise flag_error(name, text, allowed, hint)
        return folder

    def _check_together(self) -> None:
        """Refuse values that this release does not support, also in combination."""
        if self.tensor_parallel_size > _MAX_RANKS:
            allowed = f"at most {_MAX_RANKS}, the GPUs of one machine"
            hint = "--engine fastdeploy serves on several machines"
            raise flag_error("tensor_parallel_size", self.tensor_parallel_size, allowed, hint)
        if not self.enable_chunked_prefill:
            raise ConfigError(
                "--enable-chunked-prefill: cannot be switched off, long prompts are always split; "
                "--max-num-batched-tokens says into how many tokens"
            )
        if self.kv_cache_memory_bytes is not None and self.num_gpu_blocks_override is not None:
            raise ConfigError(
                f"--num-gpu-blocks-override: got {self.num_gpu_blocks_override} together with "
                f"--kv-cache-memory-bytes {self.kv_cache_memory_bytes}; both set the size of the "
                "caches: give one of them"
            )

    def _check_capture_sizes(self) -> None:
        # only a GPU captures steps
        rows, (_, tokens) = self._decode_tokens("gpu"), self._step_sizes("gpu")
        of_rows = "the rows that a decode step can have; leave them out, or raise --max-num-seqs"
        of_tokens = "the tokens of a step; leave them out, or raise --max-num-batched-tokens"
        for name, least, most, why in (
            ("cudagraph_capture_sizes", 1, rows, of_rows),
            ("cudagraph_prompt_sizes", 0, tokens, of_tokens),
        ):
            if (sizes := getattr(self, name)) is not None:
                how = {"is_eager": self.enforce_eager}
                self._set(name, checked_sizes(name, sizes, least, most, why, **how))
