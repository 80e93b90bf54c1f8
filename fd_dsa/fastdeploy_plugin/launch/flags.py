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

# flags of ours that FastDeploy has under the same name, and all that it has -> its flag
_SAME_NAME = (
    "model served_model_name host port tensor_parallel_size data_parallel_size "
    "enable_expert_parallel max_model_len max_num_seqs max_num_batched_tokens block_size "
    "num_gpu_blocks_override enable_prefix_caching api_key max_concurrency tokenizer "
    "gpu_memory_utilization chat_template"
)
MAPPED = {name: f"--{name.replace('_', '-')}" for name in _SAME_NAME.split()}
MAPPED["shutdown_timeout"] = "--timeout-graceful-shutdown"
_CHOSEN_BY_LAUNCHER = ("model", "served_model_name", "host", "port", "block_size")
_PARSERS = "FastDeploy's parsers have names of their own; give its {} after --"
_GRAPHS = "FastDeploy's own flag is --graph-optimization-config, to be given after --, with '{}'"
_BODIES = "put a proxy with a limit of bodies in front of it"
# our flag -> why FastDeploy has no counterpart and what is near to it
NO_COUNTERPART = {
    "device": "FastDeploy has no --device, it takes the GPUs of CUDA_VISIBLE_DEVICES and no CPU",
    "dtype": "FastDeploy has no --dtype, it takes the type from config.json",
    "kv_cache_dtype": "FD_ATTENTION_BACKEND=DSA_ATTN has one kind of cache",
    "kv_cache_memory_bytes": (
        "FastDeploy has no size in bytes; take --gpu-memory-utilization or "
        "--num-gpu-blocks-override"
    ),
    "enforce_eager": _GRAPHS.format('{"use_cudagraph": false}'),
    "cudagraph_capture_sizes": _GRAPHS.format(
        '{"use_cudagraph": true, "cudagraph_capture_sizes": [...]}'
    ),
    "tool_call_parser": _PARSERS.format("--tool-call-parser"),
    "reasoning_parser": _PARSERS.format("--reasoning-parser"),
    "allow_special_tokens_in_text": (
        "FastDeploy decides itself whether texts become control tokens; leave the flag out"
    ),
    "trust_request_chat_template": "FastDeploy decides itself about templates of requests",
    "seed": (
        "FastDeploy's --seed is another thing: a request without a seed gets a random one there; "
        "put `seed` into the request"
    ),
    "load_format": (
        "FastDeploy reads the weights of the folder, by its own --load-choices after --"
    ),
    "allow_unknown_config_fields": "FastDeploy refuses no field of config.json",
    "index_topk": "FastDeploy takes the number from config.json of the folder",
    "speculative_config": ("FastDeploy's own flag of this name takes other keys; give it after --"),
    "async_scheduling": "FastDeploy has schedulers of its own",
    "enable_chunked_prefill": "FastDeploy has its own switch, FD_DISABLE_CHUNKED_PREFILL",
    "target_inter_token_latency_ms": (
        "FastDeploy's scheduler keeps to no time; what is near to it is --max-num-batched-tokens"
    ),
    "max_body_size": f"FastDeploy has no limit of a body; {_BODIES}",
    "max_body_values": f"FastDeploy has no such flag; {_BODIES}",
    "max_answer_scores": "FastDeploy has no such flag",
    "max_connections": "FastDeploy does not limit connections; put a proxy in front that does",
    "timeout_keep_alive": "FastDeploy has no such flag",
    "sse_ping_interval": "FastDeploy sends no comments in its streams",
    "allowed_host": "FastDeploy does not look at the Host header; put a proxy that does in front",
    "max_prompt_bytes": f"FastDeploy tokenizes texts of any length; {_BODIES}",
    "log_requests": "FastDeploy writes its requests to log/api_server.log in any case",
    "log_json": "FastDeploy's log has one form",
    "disable_ui": "FastDeploy's server has no page to leave out",
}
# the values of these that say what FastDeploy does anyway
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "device": ("auto", "gpu"),
    "dtype": ("auto",),
    "kv_cache_dtype": ("auto", "fp8_ds_mla", "fp8"),
    "tool_call_parser": ("auto",),
    "reasoning_parser": ("auto",),
    "load_format": ("auto", "safetensors"),
    "enable_chunked_prefill": (True,),
    **dict.fromkeys(("log_requests", "log_json", "disable_ui"), (False,)),
}
# flags that the launcher uses itself
LAUNCHER = ("config", "download", "dry_run", "engine", "log_level")

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
        on_line = vars(known)
        return cls(tuple(arguments), {**_config_file(on_line.get("--config")), **on_line})

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


def translate(args: argparse.Namespace, passed: PassedFlags) -> list[str]:
    """FastDeploy's arguments for the flags that were given, ports and model left out.

    Args:
        args: flags of ours, as `fd_dsa.serve.flag_sources.parse_args` gives them.
        passed: what stands after `--`.

    Returns:
        arguments in the order of `MAPPED`, with `--block-size 64` in any case.

    Raises:
        ConfigError: a flag has no counterpart, is given on both sides of `--`, or has a value that
            DSA cannot be served with; the message names both flags.
    """
    for name in args.given:
        _check_counterpart(name, getattr(args, name), passed)
    length = passed.number("--max-model-len", _given(args, "max_model_len", BLOCK_SIZE))
    if past := length % BLOCK_SIZE:
        # FastDeploy's buffers are made for whole blocks
        raise ConfigError(
            f"--max-model-len: got {length}, allowed with --engine fastdeploy: a multiple of "
            f"{BLOCK_SIZE}, the tokens of a cache block; take {length - past + BLOCK_SIZE}"
        )
    block_size = passed.number("--block-size", _given(args, "block_size", BLOCK_SIZE))
    if block_size != BLOCK_SIZE:
        raise ConfigError(
            f"--block-size: got {block_size}, allowed with --engine fastdeploy: {BLOCK_SIZE}; "
            "leave it out"
        )
    translated: list[str] = []
    for name, flag in MAPPED.items():
        if name in args.given and name not in _CHOSEN_BY_LAUNCHER:
            translated += _argument(flag, name, getattr(args, name))
    if "--block-size" not in passed.values:
        translated += ["--block-size", str(BLOCK_SIZE)]
    return translated


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments for a log: the values of keys and passwords are left out."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        secret = flag.startswith("--") and flag.endswith(("-key", "-password"))
        shown.append("***" if hide_next else f"{flag}=***" if secret and equals else argument)
        hide_next = secret and not equals
    return shown


def _given(args: argparse.Namespace, name: str, default: Any) -> Any:
    """The value of a flag of ours where the user gave it."""
    return getattr(args, name) if name in args.given else default


def _argument(flag: str, name: str, value: Any) -> list[str]:
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


def _check_counterpart(name: str, value: Any, passed: PassedFlags) -> None:
    """Refuse a flag, or a value of it, that FastDeploy does not have, or that it has already."""
    own, flag = f"--{name.replace('_', '-')}", MAPPED.get(name, "")
    accepted = _ACCEPTED.get(name, ())
    if name in NO_COUNTERPART and value not in accepted:
        allowed = f"; allowed: {', '.join(map(str, accepted))}" if accepted else ""
        reason = f"{NO_COUNTERPART[name]}{allowed}"
        raise ConfigError(f"{own}: got {value!r} with --engine fastdeploy: {reason}")
    if flag in passed.values:
        ours, theirs = repr(value), repr(passed.values[flag])
        if name == "api_key":
            ours = theirs = "***"
        raise ConfigError(
            f"{own}: got {ours}, and {flag} {theirs} after --, which is FastDeploy's flag for it; "
            "give one of them"
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
    known = (*_KNOWN, *_SWITCHES)
    return {flag: value for flag, value in flags.items() if flag in known and value is not None}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"after --: {message}")
