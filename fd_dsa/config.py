"""Configuration of the engine, typed and checked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fd_dsa.errors import ConfigError

DEFAULT_NUM_BATCHED_TOKENS = 512
"""Tokens of a step on a CPU: enough for full-speed products, short enough for smooth streams."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
DEVICES = ("auto", "cpu", "gpu")
# or a custom device of Paddle
_DEVICE_PATTERN = re.compile(rf"{'|'.join(DEVICES)}|[A-Za-z_]\w*:\d+")
_DTYPES = ("auto", "float32", "bfloat16")
_CACHE_DTYPES = (*_DTYPES, "fp8_ds_mla")
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


@dataclass(frozen=True)
class EngineConfig:
    """What the engine is started with; each field is the command-line flag of the same name.

    Attributes:
        model: folder of a checkpoint in Hugging Face format; None is the demo model.
        served_model_name: names that requests may use; empty is the folder's name.
        device: where the model runs: "cpu", "gpu" (the first that CUDA_VISIBLE_DEVICES shows), or
            "auto", a GPU where Paddle has one and the CPU otherwise: the values of the flag. In
            Python also the place of a custom device of Paddle, such as "name:0".
        dtype: type of weights and activations; `auto` is float32, the only one so far.
        kv_cache_dtype: type of the caches; `auto` is the type of the activations, `fp8_ds_mla`
            is e4m3 with scales, 788 bytes a token and layer.
        max_model_len: longest prompt plus output, tokens; None is the model's own limit.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; None is 512, the default on a CPU.
        block_size: tokens per cache block.
        kv_cache_memory_bytes: size of the caches, a number or a text such as `8G`.
        num_gpu_blocks_override: number of cache blocks, instead of `kv_cache_memory_bytes`.
        enable_prefix_caching: whether requests share the cache blocks of prompts that begin alike.
        seed: seed of requests which bring none.

    Raises:
        ConfigError: a value is not allowed; the message names the flag.
    """

    model: str | os.PathLike[str] | None = None
    served_model_name: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    kv_cache_memory_bytes: int | str | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._set("model", self._checked_folder())
        names = self.served_model_name
        names = (names,) if isinstance(names, str) else tuple(names)
        self._set("served_model_name", names or (self.model_path.name,))
        if not all(isinstance(name, str) and name for name in self.served_model_name):
            raise _flag_error("served_model_name", names, "non-empty names", "")
        if not _DEVICE_PATTERN.fullmatch(str(self.device)):
            raise _flag_error(
                "device",
                self.device,
                f"{', '.join(DEVICES)}, in Python also a custom device of Paddle as name:number",
                "",
            )
        self._check_dtypes()
        if self.max_num_batched_tokens is None:
            self._set("max_num_batched_tokens", DEFAULT_NUM_BATCHED_TOKENS)
        if isinstance(self.kv_cache_memory_bytes, str):
            self._set("kv_cache_memory_bytes", self._parsed_cache_bytes())
        self._check_numbers()
        if not isinstance(self.enable_prefix_caching, bool):
            raise _flag_error("enable_prefix_caching", self.enable_prefix_caching, "a bool", "")

    @property
    def model_path(self) -> Path:
        """Folder of the checkpoint, absolute."""
        return Path(self.model)  # type: ignore[arg-type]

    @property
    def compute_dtype(self) -> str:
        """Type of weights and activations, `auto` resolved."""
        return "float32"

    @property
    def cache_dtype(self) -> str:
        """Type in which the caches are stored, `auto` resolved."""
        return self.compute_dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def num_batched_tokens(self) -> int:
        """`max_num_batched_tokens`, resolved, as the plain int that it is after construction."""
        return int(self.max_num_batched_tokens)  # type: ignore[arg-type]

    def resolve_max_model_len(self, max_position_embeddings: int) -> int:
        """Longest sequence that will be served, tokens.

        Raises:
            ConfigError: `max_model_len` is beyond what the model was made for.
        """
        if self.max_model_len is None:
            return max_position_embeddings
        if self.max_model_len > max_position_embeddings:
            raise _flag_error(
                "max_model_len",
                self.max_model_len,
                f"at most {max_position_embeddings}, the model's max_position_embeddings",
                "lower it",
            )
        return self.max_model_len

    def _set(self, name: str, value: object) -> None:
        """Store a normalised value in the frozen dataclass."""
        object.__setattr__(self, name, value)

    def _checked_folder(self) -> Path:
        """The model folder as an absolute path."""
        if self.model is None:
            return demo_model_path()
        folder = Path(os.path.abspath(Path(self.model).expanduser()))
        if not folder.is_dir():
            raise _flag_error(
                "model",
                os.fspath(self.model),
                "a local folder in Hugging Face format with config.json",
                "give an existing folder (models are not downloaded)",
            )
        return folder

    def _check_dtypes(self) -> None:
        """Refuse types which this device or this release cannot serve."""
        if self.dtype not in _DTYPES:
            raise _flag_error("dtype", self.dtype, ", ".join(_DTYPES), "")
        if self.dtype == "bfloat16":
            raise _flag_error(
                "dtype",
                self.dtype,
                "auto or float32, in which the engine computes: Paddle's CPU build has no bfloat16 "
                "kernels",
                "bfloat16 checkpoints are converted while loading",
            )
        if self.kv_cache_dtype not in _CACHE_DTYPES:
            raise _flag_error("kv_cache_dtype", self.kv_cache_dtype, ", ".join(_CACHE_DTYPES), "")
        if self.kv_cache_dtype == "fp8_ds_mla" and self.block_size != FP8_BLOCK_SIZE:
            raise _flag_error(
                "block_size",
                self.block_size,
                f"{FP8_BLOCK_SIZE} with --kv-cache-dtype fp8_ds_mla",
                "leave it out",
            )

    def _parsed_cache_bytes(self) -> int:
        """`kv_cache_memory_bytes` as a number."""
        try:
            return parse_bytes(str(self.kv_cache_memory_bytes))
        except ConfigError as error:
            raise ConfigError(f"--kv-cache-memory-bytes: {error}") from None

    def _check_numbers(self) -> None:
        """Refuse counts and sizes out of range, and two answers to one question."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _check_integer(name, getattr(self, name), minimum=1)
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), minimum=1)
        _check_integer("seed", self.seed, minimum=0)
        if self.kv_cache_memory_bytes is not None and self.num_gpu_blocks_override is not None:
            raise ConfigError(
                f"--num-gpu-blocks-override: got {self.num_gpu_blocks_override} together with "
                f"--kv-cache-memory-bytes {self.kv_cache_memory_bytes}; both set the size of the "
                "caches: give one of them"
            )


def _check_integer(name: str, value: object, minimum: int) -> None:
    """Refuse what is no integer, or is below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _flag_error(name, value, f"an integer of at least {minimum}", "")


def _flag_error(name: str, got: object, allowed: str, hint: str) -> ConfigError:
    """The error of one flag: what, got, allowed, what to do."""
    text = f"--{name.replace('_', '-')}: got {got!r}, allowed: {allowed}"
    return ConfigError(f"{text}; {hint}" if hint else text)
