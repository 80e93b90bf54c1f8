"""The flags of `python -m fd_dsa.serve`, and the options of a server that they set.

`--help` imports neither Paddle nor the server.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

from fd_dsa import __version__
from fd_dsa.chat.parser import AUTO, NONE, REASONING_FORMATS, TOOL_FORMATS
from fd_dsa.command_line import values
from fd_dsa.command_line.parser import Parser
from fd_dsa.commands import own_command
from fd_dsa.config import DEFAULT_TARGET_MS, DEVICES, GENERATION_CONFIGS, EngineConfig

DEFAULT_MAX_CONNECTIONS = 4096
PROMPT_BYTES_PER_TOKEN = 16
"""Bytes of a prompt's text per token of the context, without --max-prompt-bytes."""
_SIZE_FORMS = "32k is 32,000, 32K is 32,768"


class Limits(TypedDict):
    """Limits of requests."""

    max_body_bytes: int
    max_body_values: int
    max_answer_scores: int
    max_prompt_bytes: int
    max_concurrency: int
    max_connections: int


@dataclass(frozen=True)
class ServerOptions:
    """Access, limits, log and chat formats of a server.

    Each field except `hosts` and `body_timeout_s` is the flag of the same name.

    Attributes:
        max_prompt_bytes: UTF-8 bytes of a prompt's text. None means `PROMPT_BYTES_PER_TOKEN` for
            each token of max_model_len.
        hosts: raises ApiError for a refused Host header. None accepts every host.
        body_timeout_s: time that a client has to send a body, seconds.
    """

    api_key: Sequence[str] = ()
    max_body_size: int = 16 << 20
    max_body_values: int = 1 << 21
    max_answer_scores: int = 1 << 19
    max_prompt_bytes: int | None = None
    max_concurrency: int = 512
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    timeout_keep_alive: int = 75
    sse_ping_interval: float = 15.0
    log_requests: bool = False
    disable_ui: bool = False
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    trust_request_chat_template: bool = False
    allow_special_tokens_in_text: bool = False
    hosts: Callable[[str], None] | None = None
    body_timeout_s: float = 60.0

    def limits(self, max_model_len: int) -> Limits:
        """Return the limits of requests by name, for a model with a context of max_model_len."""
        return {
            "max_body_bytes": self.max_body_size,
            "max_body_values": self.max_body_values,
            "max_answer_scores": self.max_answer_scores,
            "max_prompt_bytes": self.prompt_bytes(max_model_len),
            "max_concurrency": self.max_concurrency,
            "max_connections": self.max_connections,
        }

    def prompt_bytes(self, max_model_len: int) -> int:
        """Return the maximum UTF-8 bytes of a prompt's text for a context of max_model_len."""
        return self.max_prompt_bytes or PROMPT_BYTES_PER_TOKEN * max_model_len


# options of a server that are resolved at its start
_RESOLVED = ("api_key", "body_timeout_s", "hosts", "max_connections")
DEFAULTS: dict[str, Any] = {
    **{f.name: f.default for f in fields(ServerOptions) if f.name not in _RESOLVED},
    **dict.fromkeys(("download", "dry_run", "enable_expert_parallel", "log_json"), False),
    **dict.fromkeys(("data_parallel_size", "tensor_parallel_size"), 1),
    "engine": AUTO,
    "host": "127.0.0.1",
    "log_level": "info",
    "port": 8000,
    "shutdown_timeout": 30.0,
    "target_inter_token_latency_ms": DEFAULT_TARGET_MS,
}
"""Defaults by name of a flag. Those of the engine are in its configuration."""

# group of --help -> flag, with its metavar -> help
_FLAGS = {
    "": {
        "--config FILE": "YAML file with flags as its keys",
        "--dry-run": "print the resolved configuration and the memory plan, load no weights, and "
        "end",
    },
    "model": {
        "MODEL": "folder in Hugging Face format (default: the demo model of the package)",
        "--model DIR": "the same as MODEL",
        "--download": "MODEL is the name of a hub's model, such as org/name; download the missing "
        "files",
        "--served-model-name NAME": "name for the `model` field of requests; may be repeated "
        "(default: folder name)",
        "--tokenizer DIR": "folder of the tokenizer (default: the model's)",
        "--load-format FORMAT": "auto, safetensors, or dummy for random weights (default: auto)",
        "--index-topk N": "keys that the indexer selects for a token (default: the model's)",
        "--allow-unknown-config-fields": "load a model whose config.json has fields that fd_dsa "
        "does not know, and that may change its results",
        "--device": "device of the model; auto is a GPU if Paddle has one (default: auto)",
        "--dtype": "auto, float32 or bfloat16 (default: auto, bfloat16 on a GPU)",
        "--engine": "engine of the model: embedded, or fastdeploy, an installed FastDeploy; auto "
        "is fastdeploy for flags that only FastDeploy has (default: auto)",
        "--generation-config": "defaults of requests: auto, those of generation_config.json in the "
        "folder, or vllm, only those of the API (default: auto)",
        "--seed": "seed of requests without one (default: 0)",
    },
    "chat": {
        "--chat-template FILE": "Jinja template of conversations (default: the folder's)",
        "--trust-request-chat-template": "accept templates in requests; a template can keep a "
        "processor busy for 10 seconds",
        "--allow-special-tokens-in-text": "markers of control tokens in messages and tools become "
        "these tokens, so that a text can begin a message of another role",
        "--tool-call-parser NAME": f"format of tool calls: {', '.join(TOOL_FORMATS)}, none, or "
        "auto, by the template and the model's generation (default: auto)",
        "--reasoning-parser NAME": f"format of reasoning: {', '.join(REASONING_FORMATS)}, none, or "
        "auto, by the template and the model's generation (default: auto)",
    },
    "server": {
        "--host": "interface (default: 127.0.0.1)",
        "--port": "port; 0 = any free port (default: 8000)",
        "--shutdown-timeout S": "seconds that running requests get after the first signal "
        "(default: 30)",
        "--api-key KEY": "key that requests must send; may be repeated, and FD_DSA_API_KEY, with "
        "commas between keys, keeps it out of the list of processes (default: no key)",
        "--max-body-size BYTES": "longest body of a request, for example 32M; longer ones are a "
        "413 (default: 16M)",
        "--max-body-values N": "values in a body, each number counted once, each text, name, list "
        "and object eight times; more are a 413 (default: 2097152)",
        "--max-answer-scores N": "log-probabilities that an answer may have, over all of its "
        "choices; more are a 400 (default: 524288)",
        "--max-prompt-bytes BYTES": "longest text of a prompt, in UTF-8; longer ones are a 400 "
        f"before they are tokenized (default: {PROMPT_BYTES_PER_TOKEN} for each token of "
        "--max-model-len)",
        "--max-concurrency N": "running and waiting outputs at a time; more are a 429 "
        "(default: 512)",
        "--max-connections N": "connections that may have a request in progress; idle ones are "
        "closed to make room, any other request is a 503 (default: 4096, fewer if ulimit -n is "
        "lower)",
        "--timeout-keep-alive S": "seconds for which a connection stays open without a request; "
        "longer than a proxy in front keeps its connections (default: 75)",
        "--sse-ping-interval S": "seconds without a chunk after which a stream gets a comment, so "
        "that proxies keep it; 0 for none (default: 15)",
        "--allowed-host NAME": "name that the Host header of requests may have, like localhost and "
        "--host; may be repeated, * allows all (default: checked on loopback addresses only)",
        "--disable-ui": "do not serve the chat page at /",
    },
    "cache": {
        "--kv-cache-dtype DTYPE": "auto, float32, bfloat16 or fp8_ds_mla, also called fp8 "
        "(default: auto)",
        "--kv-cache-memory-bytes BYTES": "size of the caches, for example 8G (default: from free "
        "memory)",
        "--kv-offload-bytes BYTES": "host memory in addition, for prefix blocks that leave the "
        "caches, for example 64G (default: none)",
        "--gpu-memory-utilization SHARE": "share of a GPU's memory that weights and caches may "
        "take (default: 0.9)",
        "--num-gpu-blocks-override N": "number of cache blocks instead (on a CPU too)",
        "--block-size N": "tokens per cache block (default: 64, with DeepSeek-V4 128)",
        "--enable-prefix-caching": "share the cache blocks of prompts that begin alike "
        "(default: enabled)",
    },
    "scheduler": {
        "--max-model-len N": f"longest prompt plus output, tokens; {_SIZE_FORMS} "
        "(default: the model's)",
        "--max-num-seqs N": "sequences in a step (default: 64 on a CPU, 256 on a GPU)",
        "--max-num-batched-tokens N": "tokens in a step; longer prompts are split (default: 512 "
        "and --max-num-seqs on a CPU, 8192 on a GPU)",
        "--target-inter-token-latency-ms MS": "longest time between two tokens of an answer in "
        f"steps with prompts, 0 for no target (default: {DEFAULT_TARGET_MS:g})",
        "--enable-chunked-prefill": "split prompts at --max-num-batched-tokens; always on "
        "(default: enabled)",
        "--speculative-config JSON": "draft tokens and verify them in the next step, as "
        """'{"method": "ngram", "num_speculative_tokens": 3}', or none; """
        "tokens stay the same (default: the demo model's own layer on a CPU, otherwise none)",
        "--async-scheduling": "on a GPU, enqueue a step while the one before runs "
        "(default: enabled)",
    },
    "CUDA graphs (on a GPU)": {
        "--enforce-eager": "launch all steps kernel by kernel, without CUDA graphs",
        "--cudagraph-capture-sizes N": "rows of captured decode steps; fewer are padded (default: "
        "1 2 4 8 16 24 ... up to --max-num-seqs)",
        "--cudagraph-prompt-sizes N": "tokens of captured steps with prompts; fewer are padded, 0 "
        "alone captures none (default: 32 64 128 ... 2048 up to --max-num-batched-tokens)",
    },
    "parallel": {
        "--tensor-parallel-size -tp N": "GPUs that share each layer, or processes on a CPU "
        "(default: 1)",
        "--data-parallel-size N": "with FastDeploy: copies of the attention layers, each with "
        "requests of its own (default: 1)",
        "--enable-expert-parallel": "with FastDeploy: spread the experts over all GPUs",
    },
    "logging": {
        "--log-level": "debug also shows tracebacks of a failed start (default: info)",
        "--log-requests": "a line for each output that ended: counts and times, never texts",
        "--log-json": "each line of the log is a JSON object",
    },
}


def _key(text: str) -> str:
    """Return an API key that a header can carry.

    An empty key, for example from an unset variable, would be no secret.
    """
    if not text or any(char.isspace() or not char.isprintable() for char in text):
        raise argparse.ArgumentTypeError("allowed is a text of one character or more, none a space")
    return text


def _parser_name(names: Sequence[str]) -> Callable[[str], str]:
    """Return a function that finds the name of a parser in SGLang's spelling too.

    SGLang writes `deepseek-v3` and `deepseekv32` for `deepseek_v3` and `deepseek_v32`.
    """
    spelled = {name.replace("_", ""): name for name in names}
    return lambda text: spelled.get(text.lower().replace("-", "").replace("_", ""), text)


_POSITIVE = values.number(int, 1)
_SIZE = values.number(int, 1, f"; {_SIZE_FORMS}")
# the configuration of the engine checks its range
_NUMBER = values.reader(float, "a number")
# readers of values that are not plain texts
_PARSERS = {
    "reasoning_parser": (AUTO, NONE, *REASONING_FORMATS),
    "tool_call_parser": (AUTO, NONE, *TOOL_FORMATS),
}
_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("block_size", "index_topk", "num_gpu_blocks_override"), _SIZE),
    **dict.fromkeys(("max_model_len", "max_num_batched_tokens", "max_num_seqs"), _SIZE),
    "cudagraph_capture_sizes": _POSITIVE,
    "cudagraph_prompt_sizes": values.number(int, 0),
    "seed": values.number(int, 0),
    **dict.fromkeys(("gpu_memory_utilization", "target_inter_token_latency_ms"), _NUMBER),
    **dict.fromkeys(("data_parallel_size", "tensor_parallel_size"), _POSITIVE),
    **dict.fromkeys(("max_answer_scores", "max_body_values"), _SIZE),
    **dict.fromkeys(("max_concurrency", "max_connections"), _POSITIVE),
    **dict.fromkeys(("max_body_size", "max_prompt_bytes"), values.size),
    "allowed_host": values.reader(
        str,
        "a name without a port, or *",
        lambda text: text and text.count(":") != 1 and not re.search(r"[/\s]", text),
    ),
    # the name on other servers
    "device": lambda text: "gpu" if text == "cuda" else text,
    **{flag: _parser_name(names) for flag, names in _PARSERS.items()},
    "api_key": _key,
    # the system reads an empty name, such as that of an unset variable, as every interface
    "host": values.reader(str, "a name or an address, 0.0.0.0 for all interfaces", str.strip),
    "port": values.reader(values.digits, "0 to 65535", lambda value: value <= 65535),
    **dict.fromkeys(("shutdown_timeout", "sse_ping_interval"), values.number(float, 0)),
    "timeout_keep_alive": _POSITIVE,
}
_CHOICES = {
    "device": DEVICES,
    "generation_config": GENERATION_CONFIGS,
    "engine": (AUTO, "embedded", "fastdeploy"),
    "log_level": ("debug", "info", "warning", "error"),
    **_PARSERS,
}
_ALL_DEFAULTS = {**{f.name: f.default for f in fields(EngineConfig)}, **DEFAULTS}
_MAY_BE_REPEATED = ("allowed_host", "api_key", "served_model_name")


def build_parser() -> Parser:
    """Return the parser with flags grouped as in `--help`.

    It parses flags of the command line only.
    """
    parser = Parser(
        prog=own_command("serve"),
        usage="%(prog)s [MODEL] [flags] [-- flags of FastDeploy]",
        description="Serve a model of DeepSeek-V3.2, GLM-5 or DeepSeek-V4 over the OpenAI API.",
        epilog="Each flag is also a variable, FD_DSA_PORT for --port, and a key of the file of "
        "--config; the command line overrides variables, which override the file.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"fd_dsa {__version__}")
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title) if title else parser
        for flag, text in flags.items():
            # set afterwards, because some versions of Python add the default, which is a marker
            # here
            _add(group, flag).help = text
    return parser


def _add(group: argparse._ActionsContainer, flag: str) -> argparse.Action:
    words = flag.split()
    names = [word for word in words if word.startswith("-")]
    if not names:
        return group.add_argument("positional_model", metavar=flag, nargs="?")
    name = names[0].removeprefix("--").replace("-", "_")
    default = _ALL_DEFAULTS.get(name)
    if isinstance(default, bool):
        # a switch that is on by default also has a flag that turns it off
        turned = argparse.BooleanOptionalAction if default else "store_true"
        return group.add_argument(*names, action=turned)
    return group.add_argument(
        *names,
        metavar=next(iter(words[len(names) :]), None),
        type=_READERS.get(name, str),
        choices=_CHOICES.get(name),
        action="append" if name in _MAY_BE_REPEATED else "store",
        nargs="+" if name.startswith("cudagraph_") else None,
    )
