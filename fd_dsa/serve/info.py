"""GET /server_info: versions, settings and providers that determine the answers."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

import fd_dsa
from fd_dsa.chat.parser import AUTO, NONE
from fd_dsa.chat.renderers import NO_TEMPLATE
from fd_dsa.config import EngineConfig
from fd_dsa.environment import batch_invariant, nvidia_smi, variable
from fd_dsa.serve.flags import Limits, ServerOptions

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine
    from fd_dsa.engine.tokenizer import Tokenizer

logger = logging.getLogger("fd_dsa.serve")

INFO = "info"
"""Name of the question to the engine's process that `engine_info` answers."""


class EngineInfo(TypedDict):
    """Facts that only the engine's process knows. None = unknown."""

    paddle: str
    device: str
    device_name: str | None
    dtype: str
    kv_cache_dtype: str
    speculative_config: dict[str, Any] | None
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    sampling: str
    providers: dict[str, dict[str, str]]
    provider_reasons: dict[str, dict[str, dict[str, str]]]


class ChatFormats(TypedDict):
    """Origin of the chat template and names of the parsers, all None without chat."""

    chat_template: str | None
    tool_call_parser: str | None
    reasoning_parser: str | None


class ServerInfo(EngineInfo, Limits, ChatFormats):
    """Versions, device, types, limits and providers of a server. None = unknown."""

    engine: str
    version: str
    commit: str | None
    tensor_parallel_size: int
    max_model_len: int
    target_inter_token_latency_ms: float
    has_chat_template: bool
    enable_prefix_caching: bool
    batch_invariant: bool
    cudagraph_capture_sizes: list[int]


def engine_info(config: EngineConfig) -> EngineInfo:
    """Collect the facts that only the engine's process knows."""
    import paddle

    from fd_dsa.device.resolve import resolve_device
    from fd_dsa.models.registry import read_config
    from fd_dsa.ops.providers import table

    here, choices = config.on_device(resolve_device(config.device)), table()
    model = read_config(config.model_path, allow_unknown=config.allow_unknown_config_fields)
    return {
        "paddle": paddle.__version__,
        "device": here.device,
        "device_name": _device_name(here.device),
        "dtype": here.dtype,
        "kv_cache_dtype": here.kv_cache_dtype,
        "speculative_config": None if here.speculation is None else asdict(here.speculation),
        "max_num_seqs": here.num_seqs,
        "max_num_batched_tokens": here.num_batched_tokens,
        "block_size": here.with_blocks(model.default_block_size).tokens_per_block,
        "sampling": "NumPy" if here.device == "cpu" else "Triton",
        "providers": {
            op: {kind: c.provider for kind, c in by.items()} for op, by in choices.items()
        },
        "provider_reasons": {
            op: {kind: c.rejected for kind, c in by.items() if c.rejected}
            for op, by in choices.items()
        },
    }


async def server_info(
    config: EngineConfig, engine: AsyncEngine, options: ServerOptions
) -> ServerInfo:
    """Collect versions, device, types, limits and providers. None = unknown.

    Args:
        config: the configuration of the engine. The answer contains no path of it.
    """
    facts: EngineInfo = await engine.ask(INFO)
    return {
        "engine": "fd_dsa",
        "version": fd_dsa.__version__,
        # runs git in a thread, because the process takes a while
        "commit": variable("FD_DSA_COMMIT") or await asyncio.to_thread(_commit),
        **facts,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": engine.max_model_len,
        "target_inter_token_latency_ms": config.target_inter_token_latency_ms,
        **options.limits(engine.max_model_len),
        "has_chat_template": engine.tokenizer.has_chat_template,
        **chat_formats(engine.tokenizer, options),
        "enable_prefix_caching": config.enable_prefix_caching,
        "batch_invariant": batch_invariant(),
        "cudagraph_capture_sizes": list(engine.captured_sizes),
    }


def chat_formats(tokenizer: Tokenizer, options: ServerOptions) -> ChatFormats:
    """Return the chat template's origin and the parsers' names, all None without chat.

    Args:
        options: of the server. "auto" is resolved by the template and the model's generation.
    """
    renderer = tokenizer.chat_renderer
    if renderer is None:
        return {"chat_template": None, "tool_call_parser": None, "reasoning_parser": None}
    return {
        "chat_template": renderer.origin,
        "tool_call_parser": renderer.tool_format_name(options.tool_call_parser),
        "reasoning_parser": renderer.reasoning_format_name(options.reasoning_parser),
    }


def log_chat(tokenizer: Tokenizer, options: ServerOptions) -> None:
    """Log `chat_formats`, or the reason why the model has no chat."""
    if tokenizer.chat_renderer is None:
        is_broken = tokenizer.why_no_chat != NO_TEMPLATE
        message = "chat: none, %s; --chat-template FILE replaces the template"
        logger.log(logging.WARNING if is_broken else logging.INFO, message, tokenizer.why_no_chat)
        return
    formats = chat_formats(tokenizer, options)
    logger.info(
        "chat: prompts by %(chat_template)s, tool calls %(tool_call_parser)s, "
        "reasoning %(reasoning_parser)s",
        formats,
    )
    parser = options.tool_call_parser
    if parser not in (AUTO, NONE) and "tools" not in tokenizer.chat_renderer.source:
        logger.warning(
            "chat: --tool-call-parser %s reads calls, but the chat template shows no tools, so the "
            "tools of a request do not reach the model",
            parser,
        )


def _commit() -> str | None:
    """Return the commit of the package's working tree, with `-dirty` after local changes."""
    root = Path(fd_dsa.__file__).resolve().parents[1]
    # an installed package may be inside the tree of another project
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}-dirty" if _git(root, "status", "--porcelain", "--", "fd_dsa") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *command: str) -> str:
    asked = ("git", "-C", str(root), *command)
    return subprocess.check_output(asked, stderr=subprocess.DEVNULL, text=True, timeout=20).strip()


def _device_name(device: str) -> str | None:
    if device != "cpu":
        return next(iter(nvidia_smi("name", device.partition(":")[2] or "0")), None)
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
