"""Configuration of the engine and of the process; the only module that reads the environment."""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from fd_dsa.errors import ConfigError

DEFAULT_NUM_BATCHED_TOKENS = 512
"""Tokens of a step on a CPU: enough for full-speed products, short enough for smooth streams."""

DEFAULT_OVERLAP_MAX_TOKENS = 256
"""Most tokens of a captured step whose indexer projections run on a second stream.

Read from measurements (docs/performance.md).
"""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
DEVICES = ("auto", "cpu", "gpu")
# or a custom device of Paddle
_DEVICE_PATTERN = re.compile(rf"{'|'.join(DEVICES)}|[A-Za-z_]\w*:\d+")
_DTYPES = ("auto", "float32", "bfloat16")
_CACHE_DTYPES = (*_DTYPES, "fp8_ds_mla")
OP_PROVIDERS = {"step_metadata": ("custom_op", "triton"), "topk": ("custom_op", "triton")}
"""Operators that have more than one provider on a GPU, and those that may be asked for."""

_SWITCH = {"0": False, "false": False, "1": True, "true": True}
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


def prepare_cpu_runtime() -> None:
    """Set what Paddle's CPU build reads from the environment; call it before importing paddle.

    Its MKL takes a slow path on AMD processors unless told that AVX2 is there (2.6 times faster
    float32 products measured), and keeps one order of sums for any number of rows if told so. A
    value that the user has set stays. Paddle's advice to install ccache is silenced.
    """
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        vendor_is_amd = False
    if vendor_is_amd:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if batch_invariant():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def has_nvidia_gpu() -> bool:
    """True where the NVIDIA driver shows this process a device; no driver call is made."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def choose_triton_mode() -> bool:
    """True if Triton kernels of this process run in Triton's interpreter, False if compiled.

    Triton decides at its own import, for good: call this before. On a machine without a GPU it
    sets TRITON_INTERPRET=1, unless the user has set the variable or Triton is loaded already.
    """
    value = os.environ.get("TRITON_INTERPRET")
    if value is None and "triton" not in sys.modules and not has_nvidia_gpu():
        os.environ["TRITON_INTERPRET"] = value = "1"
    return (value or "").lower() in ("1", "true", "yes", "on", "y")


def step_checks_requested() -> bool:
    """True if FD_DSA_CHECK=1 asks for checks that read device tensors back; as `_switch`."""
    return _switch("FD_DSA_CHECK") or False


def batch_invariant() -> bool:
    """True if FD_DSA_BATCH_INVARIANT=1: a token's numbers depend on its row alone; as `_switch`."""
    return _switch("FD_DSA_BATCH_INVARIANT") or False


def fastdeploy_plugin_wanted() -> bool:
    """True where the plug-in shall take FastDeploy's DSA path over.

    That is with FD_ATTENTION_BACKEND=DSA_ATTN, FastDeploy's own switch, and without
    FD_DSA_DISABLE=1.

    Raises:
        ConfigError: FD_DSA_DISABLE is none of 0, 1, false and true, in any case.
    """
    chosen = os.environ.get("FD_ATTENTION_BACKEND") == "DSA_ATTN"
    return chosen and not fastdeploy_plugin_disabled()


def fastdeploy_plugin_disabled() -> bool:
    """True if FD_DSA_DISABLE=1: FastDeploy serves by its own DSA path; as `_switch`."""
    return _switch("FD_DSA_DISABLE") or False


def indexer_rope_interleave() -> bool | None:
    """Pairing of the indexer's RoPE that FD_DSA_INDEXER_ROPE_INTERLEAVE asks for; None = nothing.

    Raises:
        ConfigError: the variable is none of 0, 1, false and true, in any case.
    """
    return _switch("FD_DSA_INDEXER_ROPE_INTERLEAVE")


def _switch(name: str) -> bool | None:
    """Value of a variable that is 0 or 1; None where it is unset or empty.

    Raises:
        ConfigError: it is none of 0, 1, false and true, in any case.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    try:
        return _SWITCH[value.lower()]
    except KeyError:
        raise ConfigError(f"{name}: got {value!r}, allowed: 0, 1, false, true, or unset") from None


def overlap_max_tokens() -> int | None:
    """Most tokens of a step whose indexer projections run on a second stream; 0 = never.

    FD_DSA_OVERLAP_MAX_TOKENS, which holds for eager steps too; None where it is not set.

    Raises:
        ConfigError: the variable is no number of at least 0.
    """
    value = os.environ.get("FD_DSA_OVERLAP_MAX_TOKENS", "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise ConfigError(
            f"FD_DSA_OVERLAP_MAX_TOKENS: got {value!r}, allowed: a number of tokens, 0 for no "
            f"second stream; leave it unset for {DEFAULT_OVERLAP_MAX_TOKENS} in graphs alone"
        )
    return int(value)


def op_provider(operator: str) -> str | None:
    """Provider of an operator on a GPU that FD_DSA_OP_PROVIDER asks for; None = none.

    The variable holds pairs such as `topk=triton`, separated by commas.

    Raises:
        ConfigError: a pair of another form, an unknown operator, or a provider that it has not.
    """
    text, wanted = os.environ.get("FD_DSA_OP_PROVIDER", ""), None
    for pair in filter(None, map(str.strip, text.split(","))):
        name, _, provider = pair.partition("=")
        if provider not in OP_PROVIDERS.get(name, ()):
            allowed = ", ".join(f"{op}={p}" for op, served in OP_PROVIDERS.items() for p in served)
            raise ConfigError(
                f"FD_DSA_OP_PROVIDER: got {pair!r} in {text!r}, allowed: {allowed}, separated by "
                "commas, or unset"
            )
        if name == operator:
            wanted = provider
    return wanted


def openai_api_key() -> str | None:
    """Key for servers that ask for one, OPENAI_API_KEY; None where it is unset or empty."""
    return os.environ.get("OPENAI_API_KEY", "").strip() or None


def told_commit() -> str | None:
    """Commit that FD_DSA_COMMIT tells a copy of the tree without git; None where it is unset."""
    return os.environ.get("FD_DSA_COMMIT", "").strip() or None


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, such as a child may get with changes."""
    return dict(os.environ)


def usable_cpus() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def set_cpu_threads(num_threads: int | None = None) -> int:
    """Give Paddle's CPU kernels this many threads and return the number.

    Args:
        num_threads: threads; None is one per processor that this process may run on.

    Raises:
        ConfigError: fewer than one thread.
    """
    if num_threads is None:
        num_threads = usable_cpus()
    _check_integer("num_threads", num_threads, minimum=1)
    import paddle

    paddle.base.core.set_num_threads(num_threads)
    return num_threads


def _check_integer(name: str, value: object, minimum: int) -> None:
    """Refuse what is no integer, or is below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _flag_error(name, value, f"an integer of at least {minimum}", "")


def _flag_error(name: str, got: object, allowed: str, hint: str) -> ConfigError:
    """The error of one flag: what, got, allowed, what to do."""
    text = f"--{name.replace('_', '-')}: got {got!r}, allowed: {allowed}"
    return ConfigError(f"{text}; {hint}" if hint else text)
