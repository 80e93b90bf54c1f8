"""Hugging Face's answers to the demo prompts are the recorded ones, and answer the questions.

    python -m tests.fastdeploy_plugin.test_demo_answers

writes tests/data/fastdeploy/demo_tokens.json; it needs the extra `oracle`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from tests.fastdeploy_plugin.demo_prompts import (
    FILE,
    LEAST_LEAD,
    MOST_TOKENS,
    TEXTS,
    DemoPrompt,
    demo_prompts,
)


def answers() -> dict[str, DemoPrompt]:
    """Greedy tokens in float32 up to the first one that leads by less than LEAST_LEAD."""
    import torch
    from transformers import DeepseekV32ForCausalLM

    from tests.parity.hugging_face import new_cache

    how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = DeepseekV32ForCausalLM.from_pretrained(demo_model_path(), **how).eval()
    found = {}
    for name, prompt in prompts().items():
        ids, cache, tokens = torch.tensor([prompt]), new_cache(model), []
        while len(tokens) < MOST_TOKENS:
            with torch.no_grad():
                out = model(ids, **cache)
            best = out.logits[0, -1].topk(2)
            if float(best.values[0] - best.values[1]) < LEAST_LEAD:
                break
            tokens.append(int(best.indices[0]))
            ids = best.indices[:1][None]
        found[name] = DemoPrompt(prompt, tokens)
    return found


def prompts() -> dict[str, list[int]]:
    """The texts in the model's template."""
    template = Tokenizer.from_folder(demo_model_path()).apply_chat_template
    return {name: template([{"role": "user", "content": text}]) for name, text in TEXTS.items()}


def test_answers_are_worth_comparing() -> None:
    """Of the texts; long ones, and ones that the question's own words do not hold."""
    tokenizer, found = Tokenizer.from_folder(demo_model_path()), demo_prompts()
    assert {name: one.token_ids for name, one in found.items()} == prompts()
    for name, value in {"number": "61348", "longest": "61348", "bell": "museum"}.items():
        assert len(found[name].token_ids) > 256 and value in tokenizer.decode(found[name].answer)
    assert all(8 <= len(one.answer) < MOST_TOKENS for one in found.values())
    for name in ("edge", "block"):
        assert len(found[name].token_ids) % 64 == 61 and len(found[name].answer) > 4, name


@pytest.mark.oracle
def test_hugging_face_still_answers_so() -> None:
    assert answers() == demo_prompts()


def main() -> int:
    """Write the file."""
    made_by = f"torch {version('torch')}, transformers {version('transformers')}"
    content = {"made_by": made_by, "prompts": {n: vars(one) for n, one in answers().items()}}
    FILE.write_text(json.dumps(content) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
