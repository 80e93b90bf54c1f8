"""Writes tests/data/fastdeploy/demo_tokens.json: Hugging Face's answers to the demo prompts.

    python -m tests.fastdeploy_plugin.hugging_face_answers

Needs torch and transformers (`pip install '.[oracle]'`).
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import DeepseekV32ForCausalLM

from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from tests.fastdeploy_plugin.demo_prompts import FILE, LEAST_LEAD, MOST_TOKENS, TEXTS


def load_model(folder: Path) -> DeepseekV32ForCausalLM:
    """The demo model in transformers, float32 on the CPU."""
    return DeepseekV32ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def answer(model: DeepseekV32ForCausalLM, token_ids: list[int]) -> list[int]:
    """Greedy tokens up to the first one that leads by less than LEAST_LEAD."""
    ids, past, tokens = torch.tensor([token_ids]), None, []
    while len(tokens) < MOST_TOKENS:
        out = model(ids, past_key_values=past, use_cache=True)
        best = out.logits[0, -1].topk(2)
        if float(best.values[0] - best.values[1]) < LEAST_LEAD:
            break
        tokens.append(int(best.indices[0]))
        ids, past = best.indices[:1][None], out.past_key_values
    return tokens


def main() -> int:
    """Write the file; prints one line a prompt."""
    folder = demo_model_path()
    model, tokenizer = load_model(folder), Tokenizer.from_folder(folder)
    prompts = {}
    for name, text in TEXTS.items():
        token_ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        tokens = answer(model, token_ids)
        prompts[name] = {"token_ids": token_ids, "answer": tokens}
        print(f"{name}: {len(token_ids)} tokens, {len(tokens)} more: {tokenizer.decode(tokens)!r}")
    made_by = f"torch {version('torch')}, transformers {version('transformers')}"
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps({"made_by": made_by, "prompts": prompts}) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
