"""The recorded answers are those of the texts, and of Hugging Face where it is installed."""

from __future__ import annotations

import json

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from tests.fastdeploy_plugin.demo_prompts import FILE, MOST_TOKENS, TEXTS, demo_prompts


def test_prompts_are_the_texts_in_the_model_s_template() -> None:
    tokenizer = Tokenizer.from_folder(demo_model_path())
    asked = {name: [{"role": "user", "content": text}] for name, text in TEXTS.items()}
    wanted = {name: tokenizer.apply_chat_template(one) for name, one in asked.items()}
    assert {name: one.token_ids for name, one in demo_prompts().items()} == wanted


def test_answers_are_worth_comparing() -> None:
    """Long ones, and ones that the question's own words do not hold."""
    tokenizer = Tokenizer.from_folder(demo_model_path())
    for name, value in {"number": "61348", "longest": "61348", "bell": "museum"}.items():
        found = demo_prompts()[name]
        assert len(found.token_ids) > 256 and value in tokenizer.decode(found.answer)
    assert all(8 <= len(one.answer) < MOST_TOKENS for one in demo_prompts().values())
    for name in ("edge", "block"):
        found = demo_prompts()[name]
        assert len(found.token_ids) % 64 == 61 and len(found.answer) > 4, name
    assert json.loads(FILE.read_text("utf-8"))["made_by"].startswith("torch ")


@pytest.mark.oracle
def test_hugging_face_still_answers_so() -> None:
    from tests.fastdeploy_plugin.hugging_face_answers import answer, load_model

    model = load_model(demo_model_path())
    for name, one in demo_prompts().items():
        assert answer(model, one.token_ids) == one.answer, name
