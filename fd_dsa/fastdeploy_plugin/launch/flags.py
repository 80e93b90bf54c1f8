"""From flags of `python -m fd_dsa.serve` to flags of FastDeploy's OpenAI server.

Source of FastDeploy's flags: `fastdeploy/engine/args_utils.py` (`EngineArgs.add_cli_args`) and
`fastdeploy/entrypoints/openai/{api_server,utils,multi_api_server}.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from fd_dsa.errors import ConfigError

BLOCK_SIZE = 64
_MULTI_SERVER = "python -m fastdeploy.entrypoints.openai.multi_api_server"

# our flag -> FastDeploy's flag of the same meaning
MAPPED = {
    "model": "--model",
    "served_model_name": "--served-model-name",
    "host": "--host",
    "port": "--port",
    "tensor_parallel_size": "--tensor-parallel-size",
    "data_parallel_size": "--data-parallel-size",
    "enable_expert_parallel": "--enable-expert-parallel",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "block_size": "--block-size",
    "num_gpu_blocks_override": "--num-gpu-blocks-override",
    "enable_prefix_caching": "--enable-prefix-caching",
    "shutdown_timeout": "--timeout-graceful-shutdown",
    "api_key": "--api-key",
    "max_concurrency": "--max-concurrency",
    "tokenizer": "--tokenizer",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "chat_template": "--chat-template",
}
# our flag -> the values that say what FastDeploy does anyway, so that no flag is needed
IMPLIED = {
    "device": ("auto", "gpu"),
    "dtype": ("auto",),
    "kv_cache_dtype": ("auto", "fp8", "fp8_ds_mla"),
    "load_format": ("auto", "safetensors"),
    "enable_chunked_prefill": (True,),
    "log_requests": (False,),
    "disable_ui": (False,),
    "log_json": (False,),
    "tool_call_parser": ("auto",),
    "reasoning_parser": ("auto",),
}
# our flag -> why another value (None: any value) has no counterpart, and what is near to it
NO_COUNTERPART = {
    "device": "FastDeploy has no --device, it takes the GPUs of CUDA_VISIBLE_DEVICES and no CPU; "
    "allowed: auto, gpu",
    "dtype": "FastDeploy has no --dtype, it takes the type from config.json; allowed: auto",
    "kv_cache_dtype": "FD_ATTENTION_BACKEND=DSA_ATTN has one kind of cache; allowed: auto, "
    "fp8_ds_mla",
    "kv_cache_memory_bytes": "FastDeploy has no size in bytes; take --gpu-memory-utilization or "
    "--num-gpu-blocks-override",
    "enforce_eager": "FastDeploy's own flag is --graph-optimization-config, to be given after --, "
    """with '{"use_cudagraph": false}'""",
    "cudagraph_capture_sizes": "FastDeploy's own flag is --graph-optimization-config, to be given "
    """after --, with '{"use_cudagraph": true, "cudagraph_capture_sizes": [...]}'""",
    "tool_call_parser": "FastDeploy's parsers have names of their own; give its --tool-call-parser "
    "after --",
    "reasoning_parser": "FastDeploy's parsers have names of their own; give its --reasoning-parser "
    "after --",
    "trust_request_chat_template": "FastDeploy decides itself about templates of requests",
    "seed": "FastDeploy's --seed is another thing: a request without a seed gets a random one "
    "there; put `seed` into the request",
    "load_format": "FastDeploy reads the weights of the folder, by its own --load-choices after "
    "--; allowed: auto, safetensors",
    "index_topk": "FastDeploy takes the number from config.json of the folder",
    "enable_chunked_prefill": "FastDeploy has its own switch, FD_DISABLE_CHUNKED_PREFILL; "
    "allowed: True",
    "target_inter_token_latency_ms": "FastDeploy's scheduler keeps to no time; what is near to it "
    "is --max-num-batched-tokens",
    "max_body_size": "FastDeploy has no limit of a body; put a proxy with one in front of it",
    "max_body_values": "FastDeploy has no such flag; put a proxy with a limit of bodies in front "
    "of it",
    "max_answer_scores": "FastDeploy has no such flag",
    "max_connections": "FastDeploy does not limit connections; put a proxy in front that does",
    "allowed_host": "FastDeploy does not look at the Host header; put a proxy that does in front",
    "max_prompt_bytes": "FastDeploy tokenizes texts of any length; put a proxy with a limit of "
    "bodies in front of it",
    "log_requests": "FastDeploy writes its requests to log/api_server.log in any case",
    "log_json": "FastDeploy's log has one form",
    "disable_ui": "FastDeploy's server has no page to leave out",
}
# flags that the launcher uses itself
LAUNCHER = ("config", "dry_run", "engine", "log_level")

# flags of FastDeploy's without a value -> how its parser takes them
_SWITCHES: dict[str, Any] = {
    "--enable-expert-parallel": "store_true",
    "--enable-prefix-caching": argparse.BooleanOptionalAction,
}
# flags of FastDeploy's whose values are read here, or that replace one of ours
_KNOWN = (
    *(flag for flag in MAPPED.values() if flag not in _SWITCHES),
    "--metrics-port",
    "--engine-worker-queue-port",
    "--cache-queue-port",
    "--ips",
    "--graph-optimization-config",
    "--config",
    # else the parser would read it as an abbreviation of --timeout-graceful-shutdown
    "--timeout",
)
_OF_MULTI_SERVER = ("--num-servers", "--ports", "--metrics-ports", "--controller-ports", "--args")


@dataclass(frozen=True)
class PassedFlags:
    """What the user gave after `--`.

    Attributes:
        arguments: as given; they go to FastDeploy unchanged.
        values: FastDeploy's flag -> its last value, for the flags that matter here; those of the
            file after `--config` too, which the command line overrides.
    """

    arguments: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, arguments: Sequence[str]) -> PassedFlags:
        """Look at the arguments as FastDeploy's parser will, abbreviated flags included.

        Raises:
            ConfigError: a flag lacks its value, or belongs to FastDeploy's server for several
                processes; the file after `--config` cannot be read.
        """
        parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
        for flag in _KNOWN:
            short = ["-tp"] if flag == "--tensor-parallel-size" else []
            parser.add_argument(flag, *short, dest=flag)
        for flag, action in _SWITCHES.items():
            parser.add_argument(flag, dest=flag, action=action)
        known, unknown = parser.parse_known_args(arguments)
        for argument in unknown:
            if argument.partition("=")[0] in _OF_MULTI_SERVER:
                raise ConfigError(
                    f"{argument} (after --) belongs to FastDeploy's launcher of several servers; "
                    "start it by itself, it takes the plug-in from the environment: "
                    f"FD_ATTENTION_BACKEND=DSA_ATTN FD_PLUGINS=fd_dsa {_MULTI_SERVER} ..."
                )
        given = vars(known)
        return cls(tuple(arguments), {**_config_file(given.get("--config")), **given})

    def number(self, flag: str, default: int) -> int:
        """Value of a flag as a whole number.

        Raises:
            ConfigError: it is none.
        """
        value = self.values.get(flag, default)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{flag} (after --): got {value!r}, allowed: a whole number"
            ) from None

    @property
    def num_nodes(self) -> int:
        """Machines that `--ips` names, 1 without it."""
        ips = self.values.get("--ips") or ""
        return len(ips) if isinstance(ips, list) else ips.count(",") + 1


def translate(args: Mapping[str, Any], given: frozenset[str], passed: PassedFlags) -> list[str]:
    """FastDeploy's arguments for the flags that were given, ports and model left out.

    Args:
        args: parsed flags of ours, defaults included.
        given: names of those which the user gave.
        passed: what stands after `--`.

    Returns:
        arguments in the order of `MAPPED`, with `--block-size 64` in any case.

    Raises:
        ConfigError: a flag has no counterpart, is given on both sides of `--`, or has a value that
            DSA cannot be served with; the message names both flags.
    """
    for name in given:
        _check_counterpart(name, args[name])
        if MAPPED.get(name, "") in passed.values:
            flag = MAPPED[name]
            ours, theirs = repr(args[name]), repr(passed.values[flag])
            if name == "api_key":
                ours = theirs = "***"
            raise ConfigError(
                f"{_flag(name)}: got {ours}, and {flag} {theirs} after --, which is FastDeploy's "
                "flag for it; give one of them"
            )
    _check_model_len(args, given, passed)
    _check_block_size(args, given, passed)
    found: list[str] = []
    for name, flag in MAPPED.items():
        if name in ("model", "served_model_name", "host", "port", "block_size"):
            continue
        if name in given:
            found += _argument(flag, name, args[name])
    if "--block-size" not in passed.values:
        found += ["--block-size", str(BLOCK_SIZE)]
    return found


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments for a log: the values of keys and passwords are left out."""
    found: list[str] = []
    hide_next = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        secret = flag.startswith("--") and flag.endswith(("-key", "-password"))
        found.append("***" if hide_next else f"{flag}=***" if secret and equals else argument)
        hide_next = secret and not equals
    return found


def parallel_size(args: Mapping[str, Any], passed: PassedFlags) -> tuple[int, int]:
    """Tensor and data parallel size, from whichever side of `--` has them."""
    tensor = passed.number("--tensor-parallel-size", args["tensor_parallel_size"])
    data = passed.number("--data-parallel-size", args["data_parallel_size"])
    return tensor, data


def _argument(flag: str, name: str, value: Any) -> list[str]:
    """One flag of FastDeploy's with its value."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, list):
        return [word for one in value for word in (flag, str(one))]
    if name == "shutdown_timeout":
        if value != int(value) or value < 1:
            raise ConfigError(
                f"--shutdown-timeout: got {value:g}, {flag} of FastDeploy takes whole seconds and "
                "reads 0 as no limit; give 1 or more"
            )
        value = int(value)
    return [flag, str(value)]


def _check_counterpart(name: str, value: Any) -> None:
    """Refuse a flag, or a value of it, that FastDeploy does not have."""
    if name in NO_COUNTERPART and value not in IMPLIED.get(name, ()):
        raise ConfigError(
            f"{_flag(name)}: got {value!r} with --engine fastdeploy: {NO_COUNTERPART[name]}"
        )


def _check_model_len(args: Mapping[str, Any], given: frozenset[str], passed: PassedFlags) -> None:
    """A context must be whole blocks: FastDeploy's buffers are made for those."""
    own = args["max_model_len"] if "max_model_len" in given else BLOCK_SIZE
    length = passed.number("--max-model-len", own)
    if length % BLOCK_SIZE:
        next_length = -(-length // BLOCK_SIZE) * BLOCK_SIZE
        raise ConfigError(
            f"--max-model-len: got {length}, allowed with --engine fastdeploy: a multiple of "
            f"{BLOCK_SIZE}, the tokens of a cache block; take {next_length}"
        )


def _check_block_size(args: Mapping[str, Any], given: frozenset[str], passed: PassedFlags) -> None:
    """The caches of DSA_ATTN have one block size."""
    own = args["block_size"] if "block_size" in given else BLOCK_SIZE
    size = passed.number("--block-size", own)
    if size != BLOCK_SIZE:
        raise ConfigError(
            f"--block-size: got {size}, allowed with --engine fastdeploy: {BLOCK_SIZE}; leave it "
            "out"
        )


def _config_file(path: object) -> dict[str, Any]:
    """Flags in the YAML file after `--config`, as FastDeploy reads it; {} without one."""
    if path is None:
        return {}
    try:
        with open(str(path), encoding="utf-8") as file:
            loaded = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--config (after --): {reason}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config (after --): {path} holds no names with values")
    flags = {f"--{str(key).replace('_', '-')}": value for key, value in loaded.items()}
    known = (*_KNOWN, *MAPPED.values())
    return {flag: value for flag, value in flags.items() if flag in known and value is not None}


def _flag(name: str) -> str:
    """A flag of ours as it is typed."""
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"after --: {message}")
