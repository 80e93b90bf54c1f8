"""Configuration of the engine, typed and checked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fd_dsa.errors import ConfigError, flag_error
from fd_dsa.speculative_config import SpeculativeConfig

DEFAULT_PROMPT_TOKENS = 512
"""Prompt tokens of a step: enough for full-speed GEMMs on a CPU, few enough for smooth streams."""

DEFAULT_TARGET_MS = 200.0
"""Milliseconds between two tokens that a server keeps to: about as fast as people read."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Form of a model's name on a hub."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
DEVICES = ("auto", "cpu", "gpu")
GENERATION_CONFIGS = ("auto", "vllm")
# or a custom device of Paddle
_DEVICE_PATTERN = re.compile(rf"{'|'.join(DEVICES)}|[A-Za-z_]\w*:\d+")
_DTYPES = ("auto", "float32", "bfloat16")
_CACHE_DTYPES = (*_DTYPES, "fp8_ds_mla")
# what users of other servers write
_CACHE_DTYPE_ALIASES = dict.fromkeys(("fp8", "fp8_e4m3"), "fp8_ds_mla")
_LOAD_FORMATS = ("auto", "safetensors", "dummy")
_MOST_CAPTURED = 512
_MOST_RANKS = 8
_LARGEST_TARGET_MS = 60_000
NO_DRAFTS = "none"
FP8_BLOCK_SIZE = 64
"""Tokens of a block of fp8_ds_mla caches; the kernels that read them take no other."""


def demo_model_path() -> Path:
    """Folder of the demo checkpoint that comes with the package."""
    return Path(__file__).resolve().parent / "demo_model"


def parse_bytes(text: str) -> int:
    """Number of bytes in a text such as `8G`, `512MiB`, `1.5GB` or `4096`.

    K, M, G and T are powers of 1024, with or without `B` or `iB`, in either case.

    Raises:
        ConfigError: the text has another form.
    """
    match = _BYTES_PATTERN.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"size {text!r}: allowed are a number and an optional unit K, M, G or T, "
            "for example 8G or 512MiB"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _is_integer(value: object, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]


_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = "an integer of at least 1", lambda value: _is_integer(value, 1)
_OPTIONAL: _Rule = _POSITIVE[0], lambda value: value is None or _is_integer(value, 1)
_SWITCH: _Rule = "a bool", lambda value: isinstance(value, bool)
# flag -> what is allowed, in words and as a function
_RULES: dict[str, _Rule] = {
    "device": (
        f"{', '.join(DEVICES)}, in Python also a custom device of Paddle as name:number",
        lambda value: _DEVICE_PATTERN.fullmatch(str(value)) is not None,
    ),
    "dtype": (", ".join(_DTYPES), _DTYPES.__contains__),
    "kv_cache_dtype": (", ".join(_CACHE_DTYPES), _CACHE_DTYPES.__contains__),
    "generation_config": (", ".join(GENERATION_CONFIGS), GENERATION_CONFIGS.__contains__),
    "load_format": (", ".join(_LOAD_FORMATS), _LOAD_FORMATS.__contains__),
    **dict.fromkeys(("max_num_seqs", "block_size"), _POSITIVE),
    **dict.fromkeys(("max_model_len", "max_num_batched_tokens", "index_topk"), _OPTIONAL),
    **dict.fromkeys(("kv_cache_memory_bytes", "num_gpu_blocks_override"), _OPTIONAL),
    **dict.fromkeys(("allow_unknown_config_fields", "async_scheduling", "enforce_eager"), _SWITCH),
    **dict.fromkeys(("enable_chunked_prefill", "enable_prefix_caching"), _SWITCH),
    "seed": ("an integer of at least 0", lambda value: _is_integer(value, 0)),
    "tensor_parallel_size": _POSITIVE,
    "gpu_memory_utilization": ("above 0 and at most 1", lambda x: _is_number(x, 0, 1) and x > 0),
    "target_inter_token_latency_ms": (
        f"0 for no target, or milliseconds from 1 to {_LARGEST_TARGET_MS}",
        lambda value: _is_number(value, 0, 0) or _is_number(value, 1, _LARGEST_TARGET_MS),
    ),
}


@dataclass(frozen=True)
class EngineConfig:
    """What the engine is started with; each field is the command-line flag of the same name.

    Attributes:
        model: folder of a checkpoint in Hugging Face format; None is the demo model.
        served_model_name: names that requests may use; empty is the folder's name.
        tokenizer: folder of the tokenizer and its chat template; None is the model's.
        load_format: where weights come from: `safetensors` files, which `auto` means too, or
            `dummy`, random numbers, for measurements without a checkpoint.
        index_topk: keys that the indexer chooses for a token; None is the model's number.
        allow_unknown_config_fields: load a model whose config.json has fields that fd_dsa does not
            know, with one warning; otherwise they are refused.
        device: where the model runs: "cpu", "gpu" (the first that CUDA_VISIBLE_DEVICES shows), or
            "auto", a GPU where Paddle has one and the CPU otherwise: the values of the flag. In
            Python also the place of a custom device of Paddle, such as "name:0".
        tensor_parallel_size: processes that share the model, each with a GPU of its own, or with
            some of the CPU's cores.
        dtype: type of activations and of weights that are not FP8; `auto` is bfloat16 on a GPU and
            float32 on a CPU, which has no other.
        kv_cache_dtype: type of the caches; `auto` is the type of the activations, `fp8_ds_mla`
            is e4m3 with scales, 788 bytes a token and layer; `fp8` is another name for it.
        max_model_len: longest prompt plus output, tokens; None is the model's own limit.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; None is 512 of prompts beside one of each
            sequence.
        target_inter_token_latency_ms: most milliseconds between two tokens of an answer while
            prompts are computed beside it; 0 = no target. A server's own default is
            `DEFAULT_TARGET_MS`: nobody reads along with a program that waits for whole answers.
        block_size: tokens per cache block.
        kv_cache_memory_bytes: size of the caches, a number or a text such as `8G`.
        gpu_memory_utilization: share of a GPU's memory that weights and caches may take, 0 to 1.
        num_gpu_blocks_override: number of cache blocks, instead of `kv_cache_memory_bytes`.
        enable_prefix_caching: whether requests share the cache blocks of prompts that begin alike.
        enable_chunked_prefill: True alone: prompts are split at `max_num_batched_tokens`.
        async_scheduling: whether a step on a GPU is prepared and queued while the one before runs.
        enforce_eager: whether decode steps on a GPU are launched kernel by kernel, and not replayed
            from CUDA graphs.
        cudagraph_capture_sizes: numbers of rows for which decode steps are captured, a step of
            fewer is padded; None is 1, 2, 4, 8, then every eighth number up to `max_num_seqs`.
        speculative_config: how drafts are made, see SpeculativeConfig; "none" makes none. None is
            three drafts of the demo model's own layer on a CPU, and otherwise none.
        generation_config: defaults of requests: "auto", what generation_config.json of the model's
            folder proposes, or "vllm", the defaults of the API.
        seed: seed of requests which bring none.
        chat_template: Jinja file that renders conversations; None is what the folder has.

    Raises:
        ConfigError: a value is not allowed; the message names the flag.
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
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    target_inter_token_latency_ms: float = 0.0
    block_size: int = 64
    kv_cache_memory_bytes: int | str | None = None
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    enforce_eager: bool = False
    cudagraph_capture_sizes: tuple[int, ...] | None = None
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
            if not isinstance(one, str) or not one:
                raise flag_error("served_model_name", one, "a non-empty name")
        if isinstance(self.kv_cache_dtype, str):
            cache_dtype = _CACHE_DTYPE_ALIASES.get(self.kv_cache_dtype, self.kv_cache_dtype)
            self._set("kv_cache_dtype", cache_dtype)
        if isinstance(self.kv_cache_memory_bytes, str):
            try:
                self._set("kv_cache_memory_bytes", parse_bytes(self.kv_cache_memory_bytes))
            except ConfigError as error:
                raise ConfigError(f"--kv-cache-memory-bytes: {error}") from None
        for name, (allowed, is_allowed) in _RULES.items():
            if not is_allowed(getattr(self, name)):
                raise flag_error(name, getattr(self, name), allowed)
        if self.max_num_batched_tokens is None:
            self._set("max_num_batched_tokens", DEFAULT_PROMPT_TOKENS + self.max_num_seqs)
        given = self.speculative_config
        if given not in (None, NO_DRAFTS) and not isinstance(given, SpeculativeConfig):
            self._set("speculative_config", SpeculativeConfig.read(given))
        drafts = self.speculation
        if drafts is not None and drafts.method == "mtp" and self.tensor_parallel_size > 1:
            hint = "its layer runs on one rank only"
            allowed = "ngram with --tensor-parallel-size"
            raise flag_error("speculative_config.method", "mtp", allowed, hint)
        self._check_together()
        self._check_capture_sizes()
        template = self.chat_template
        # a number would be the descriptor of an open file
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
        """The same with `device`, both types and drafts as they are there, none left open.

        Raises:
            ConfigError: the device does not compute in `dtype`.
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
        # where nobody says how, the demo model drafts, on one rank
        is_whole = self.tensor_parallel_size == 1 and self.load_format != "dummy"
        if drafts is None and device == "cpu" and is_whole and self.model_path == demo_model_path():
            drafts = SpeculativeConfig("mtp", 3)
        resolved: dict[str, Any] = {
            "dtype": dtype,
            "kv_cache_dtype": cache_dtype,
            "speculative_config": drafts,
        }
        return replace(self, device=device, **resolved)

    @property
    def num_batched_tokens(self) -> int:
        """`max_num_batched_tokens`, resolved, as the plain int that it is after construction."""
        return int(self.max_num_batched_tokens)  # type: ignore[arg-type]

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config` as what it is after construction."""
        given = self.speculative_config
        return given if isinstance(given, SpeculativeConfig) else None

    @property
    def most_drafts(self) -> int:
        """Most drafts of a request in a step."""
        return self.speculation.num_speculative_tokens if self.speculation else 0

    @property
    def most_decode_tokens(self) -> int:
        """Most tokens of a step that only decodes, drafts included."""
        return min((1 + self.most_drafts) * self.max_num_seqs, self.num_batched_tokens)

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        """Numbers of rows for which decode steps are captured on a GPU, ascending."""
        if self.enforce_eager:
            return ()
        if self.cudagraph_capture_sizes is not None:
            return self.cudagraph_capture_sizes
        most = min(self.most_decode_tokens, _MOST_CAPTURED)
        # as vLLM has them
        sizes = (1, 2, 4, *range(8, 256, 8), *range(256, _MOST_CAPTURED, 16))
        return (*(size for size in sizes if size < most), most)

    def resolve_max_model_len(self, max_position_embeddings: int) -> int:
        """Longest sequence that will be served, tokens.

        Raises:
            ConfigError: `max_model_len` is beyond what the model was made for.
        """
        if self.max_model_len is None:
            return max_position_embeddings
        if self.max_model_len > max_position_embeddings:
            raise flag_error(
                "max_model_len",
                self.max_model_len,
                f"at most {max_position_embeddings}, the model's max_position_embeddings",
                "lower it",
            )
        return self.max_model_len

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _checked_folder(self, name: str) -> Path | None:
        path = getattr(self, name)
        if path is None:
            return None
        if not isinstance(path, (str, os.PathLike)):
            raise flag_error(name, path, "a path of a local folder")
        folder = Path(os.path.abspath(os.path.expanduser(path)))
        if not folder.is_dir():
            file = "config.json" if name == "model" else "tokenizer.json"
            hint, text = "give an existing folder", os.fspath(path)
            if name == "model" and HUB_NAME.fullmatch(text):
                hint = (
                    "if that is a model of a hub, give the folder that "
                    f"huggingface_hub.snapshot_download({text!r}) returns"
                )
            allowed = f"a local folder in Hugging Face format with {file}"
            raise flag_error(name, text, allowed, hint)
        return folder

    def _check_together(self) -> None:
        """Refuse values beyond this release, alone or beside another flag."""
        if self.tensor_parallel_size > _MOST_RANKS:
            allowed = f"at most {_MOST_RANKS}, the GPUs of one machine"
            hint = "--engine fastdeploy serves on several machines"
            raise flag_error("tensor_parallel_size", self.tensor_parallel_size, allowed, hint)
        if self.kv_cache_dtype == "fp8_ds_mla" and self.block_size != FP8_BLOCK_SIZE:
            allowed = f"{FP8_BLOCK_SIZE} with --kv-cache-dtype fp8_ds_mla"
            raise flag_error("block_size", self.block_size, allowed, "leave it out")
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
        sizes = self.cudagraph_capture_sizes
        if sizes is None:
            return
        name, most = "cudagraph_capture_sizes", self.most_decode_tokens
        if isinstance(sizes, str) or not isinstance(sizes, Sequence):
            raise flag_error(name, sizes, "several integers")
        if self.enforce_eager:
            raise ConfigError(
                f"--cudagraph-capture-sizes: got {list(sizes)} together with --enforce-eager, "
                "which captures nothing; give one of them"
            )
        for size in sizes:
            if not _is_integer(size, 1, most):
                raise flag_error(
                    name,
                    size,
                    f"integers from 1 to {most}, the rows that a decode step can have",
                    "leave them out, or raise --max-num-seqs",
                )
        if not sizes:
            raise flag_error(name, [], "at least one integer", "or take --enforce-eager")
        self._set("cudagraph_capture_sizes", tuple(sorted(set(sizes))))
