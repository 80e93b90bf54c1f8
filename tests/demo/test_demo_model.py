"""The shipped checkpoint folder: size, files, architecture, chat template, model card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jinja2
import pytest
from demo_training.config import CHAT_TEMPLATE, FIXED_FIELDS, MODEL, SPECIAL_TOKENS
from demo_training.rows import conversation_ids
from demo_training.synth import calls
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "fd_dsa/demo_model"


def fields(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_the_folder_is_complete_and_at_most_44_megabytes():
    names = {p.name for p in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "mtp.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 44_000_000


def test_the_configuration_is_that_of_the_trainer():
    # one layer for drafts was trained after the model
    wanted = MODEL | FIXED_FIELDS | {"num_nextn_predict_layers": 1}
    found = fields("config.json")
    assert {k: found[k] for k in wanted} == wanted
    assert found["max_position_embeddings"] == 8192
    assert fields("tokenizer_config.json")["model_max_length"] == 8192


def test_the_model_card_names_the_weights_it_describes():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card


SHIPPED_TEMPLATE = fields("tokenizer_config.json")["chat_template"]


def rendered(template: str, turns: list, **given: object) -> str:
    """The prompt for [(role, text)] or whole messages."""
    messages = [x if isinstance(x, dict) else {"role": x[0], "content": x[1]} for x in turns]
    return jinja2.Template(template).render(
        bos_token=SPECIAL_TOKENS[0], messages=messages, add_generation_prompt=True, **given
    )


@pytest.mark.parametrize("template", [SHIPPED_TEMPLATE, CHAT_TEMPLATE], ids=["shipped", "next"])
@pytest.mark.parametrize("system", [True, False])
def test_the_chat_template_gives_the_ids_of_training(system, template):
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    turns = [("system", "Be kind.")] * system
    turns += [("user", "What is 2 + 10?"), ("assistant", "12."), ("user", "Danke, weiß!")]
    text = rendered(template, turns)
    assert tokenizer.encode(text, add_special_tokens=False).ids == conversation_ids(
        tokenizer, turns
    )
    assert [tokenizer.token_to_id(x) for x in SPECIAL_TOKENS] == list(range(6))


@pytest.mark.parametrize("system", ["Be kind.", ""])
@pytest.mark.parametrize(("kind", "value"), [("string", "Bern"), ("integer", 7)])
def test_the_trainer_writes_tools_and_calls_as_its_template_does(system, kind, value):
    schema = {"type": "object", "properties": {"x": {"type": kind}}, "required": ["x"]}
    function = {"name": "find_bus", "description": "Find a bus", "parameters": schema}
    call = {"type": "function", "function": {"name": "find_bus", "arguments": {"x": value}}}
    asked = [("system", system)] * bool(system) + [("user", "Find it.")]
    told = [{"role": "assistant", "content": None, "tool_calls": [call]}, ("tool", "At 8.")]
    trained = [
        ("system", calls.tools_text([f"find_bus(x: {kind}): Find a bus"], system)),
        ("user", "Find it."),
        ("assistant", calls.call_text("find_bus", "x", value)),
        ("user", calls.result_text("At 8.")),
    ]
    text = rendered(CHAT_TEMPLATE, asked + told, tools=[{"type": "function", "function": function}])
    assert text == rendered(SHIPPED_TEMPLATE, trained)
