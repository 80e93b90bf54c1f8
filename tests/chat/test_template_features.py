"""The template environment against that of transformers, a feature at a time."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.version import Version

from fd_dsa.chat.template import ChatTemplate
from tests.chat.template_features import (
    FEATURES,
    MESSAGES,
    PARTS,
    REFUSED,
    SINCE_5_23,
    TOOLS,
    VARIABLES,
)

VARIANTS = pytest.mark.parametrize("name", FEATURES)


def inputs(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools of a feature."""
    messages = [*MESSAGES, PARTS] if name == "parts" else MESSAGES
    return messages, TOOLS if "tools" in name else None


def of_transformers(source: str, name: str) -> str:
    """The prompt of transformers."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages, tools = inputs(name)
    rendered, _ = utils.render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True, **VARIABLES
    )
    return str(rendered[0])


@VARIANTS
def test_prompt_of_a_feature(name: str) -> None:
    source, expected = FEATURES[name]
    messages, tools = inputs(name)
    assert ChatTemplate(source, VARIABLES).render(messages, tools=tools) == expected


@pytest.mark.oracle
@VARIANTS
def test_transformers_makes_the_same_prompt(name: str) -> None:
    source, expected = FEATURES[name]
    assert of_transformers(source, name) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_refused_templates(name: str) -> None:
    source, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"^chat template: .*{words}"):
        ChatTemplate(source, VARIABLES).render(MESSAGES)


@pytest.mark.oracle
@pytest.mark.parametrize("name", REFUSED)
def test_transformers_refuses_the_same_templates(name: str) -> None:
    source, words = REFUSED[name]
    transformers = pytest.importorskip("transformers")
    if name in SINCE_5_23 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 renders this template")
    with pytest.raises(Exception, match=words):
        of_transformers(source, name)
