"""Model folders' tokenizers and chat templates."""

from __future__ import annotations

import json
import re
import shutil
from datetime import datetime

import pytest
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from fd_dsa.config import demo_model_path
from fd_dsa.engine.detokenizer import new_detokenizer
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError
from tests.engine.tokenizer_kinds import KINDS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
]


@pytest.fixture(scope="module")
def demo():
    """Tokenizer of the demo model."""
    return Tokenizer.from_folder(demo_model_path())


@pytest.fixture
def folder(tmp_path):
    """A folder with the demo's tokenizer.json; `write(**config)` adds tokenizer_config.json."""
    shutil.copy(demo_model_path() / "tokenizer.json", tmp_path)
    return tmp_path


def with_config(folder, **config):
    """Tokenizer of the folder with this tokenizer_config.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def test_the_demo_tokenizer(demo):
    assert demo.vocab_size == 4096
    assert (demo.bos_token_id, demo.eos_token_id) == (0, 1)
    assert demo.decode(demo.encode("Hello, world")) == "Hello, world"
    assert demo.encode("<|eos|>") == [1]
    assert demo.decode([1, *demo.encode("x")]) == "x"
    assert demo.decode([1], skip_special_tokens=False) == "<|eos|>"


def test_the_demo_chat_template(demo):
    assert demo.has_chat_template
    ids = demo.apply_chat_template(MESSAGES)
    assert ids == demo.encode("<|bos|><|system|>Be brief.<|user|>Hello<|assistant|>")
    assert demo.apply_chat_template(MESSAGES, add_generation_prompt=False) == ids[:-1]


def test_a_folder_needs_tokenizer_json_alone(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert not tokenizer.has_chat_template
    assert tokenizer.eos_token_id is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\n{% endif %}", "line 2 is no valid Jinja"),
        (b"{{ 1 | no_filter }}", "line 1 is no valid Jinja: No filter named 'no_filter'"),
        (b"{% if 1 %}" * 3000 + b"{% endif %}" * 3000, "nests too deeply"),
        (b"\xff", "cannot be read"),
        (5, "chat_template of"),
        (["{{ 1 }}"], "must be a string or a list of named templates"),
        ([{"name": "default", "template": {}}], "must be a string or a list of named templates"),
        ("{% endif %}", "chat template of tokenizer_config.json: line 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_template_disables_chat(folder, content, reason):
    if isinstance(content, bytes):
        (folder / "chat_template.jinja").write_bytes(content)
        tokenizer = Tokenizer.from_folder(folder)
        with pytest.raises(ConfigError, match="--chat-template"):
            Tokenizer.from_folder(folder, folder / "chat_template.jinja")
    else:
        tokenizer = with_config(folder, chat_template=content)
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    with pytest.raises(ValueError, match=re.escape(reason)):
        tokenizer.apply_chat_template(MESSAGES)


def test_a_missing_or_damaged_file_is_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(empty)
    (empty / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(empty)
    for content in ("{", "[]", "[" * 100_000, r'{"bos_token": "\ud83d"}'):
        (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            Tokenizer.from_folder(folder)


def test_special_tokens_may_be_objects(folder):
    tokenizer = with_config(folder, bos_token={"content": "<|bos|>"}, eos_token="<|eos|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bos_token": 5}, "bos_token: got 5, allowed: a text, null, or an object"),
        ({"eos_token": {"content": 5}}, "eos_token: got {'content': 5}, allowed: a text"),
        ({"add_bos_token": "false"}, "add_bos_token: got 'false', allowed: true, false, null"),
        ({"add_bos_token": True}, "bos_token: got '', allowed: a token of tokenizer.json"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "bos_token: got '<s>', allowed: a token"),
    ],
)
def test_a_special_token_of_another_form_is_refused(folder, fields, message):
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json: {re.escape(message)}"):
        with_config(folder, **fields)


def test_add_bos_token_is_honoured_once(folder):
    tokenizer = with_config(folder, bos_token="<|bos|>", add_bos_token=True)
    plain = tokenizer.encode("Hi", add_special_tokens=False)
    assert tokenizer.encode("Hi") == [0, *plain]
    backend = tokenizer.backend
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    assert Tokenizer(backend, {"bos_token": "<|bos|>"}, None, True).encode("Hi") == [0, *plain]


def test_only_a_post_processor_ends_a_text(folder):
    fields = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    tokenizer = with_config(folder, **fields, add_bos_token=True, add_eos_token=True)
    plain = tokenizer.encode("Hi", add_special_tokens=False)
    assert tokenizer.encode("Hi") == [0, *plain]
    backend = tokenizer.backend
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", 1)]
    )
    assert Tokenizer(backend, fields, None, True).encode("Hi") == [0, *plain, 1]


def test_truncation_and_padding_of_the_file_are_off(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    file.write_text(json.dumps(content), encoding="utf-8")
    assert len(Tokenizer.from_folder(folder).encode("one two three four five six")) > 4


def test_the_template_file_goes_first_and_of_named_templates_the_default(folder):
    tokenizer = with_config(
        folder,
        chat_template=[
            {"name": "tool_use", "template": "tool"},
            {"name": "default", "template": "default"},
        ],
    )
    assert tokenizer.decode(tokenizer.apply_chat_template([])) == "default"
    (folder / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.apply_chat_template([])) == "from the file"
    (folder / "mine.jinja").write_text("of the flag", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder, folder / "mine.jinja")
    assert tokenizer.decode(tokenizer.apply_chat_template([])) == "of the flag"


def test_templates_render_as_those_of_hugging_face(folder):
    tokenizer = with_config(
        folder,
        bos_token="<|bos|>",
        chat_template=(
            "{{ bos_token }}\n"
            "    {% for m in messages %}\n"
            "{% if m.content == 'skip' %}{% continue %}{% endif %}\n"
            "{{ m.content | trim }}{{ {'k': 'é<'} | tojson }}\n"
            "    {% endfor %}\n"
            "{% if thinking %}T{% endif %}{% if tools %}U{% endif %}{{ strftime_now('%Y') }}"
        ),
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": " a "}, {"role": "user", "content": "skip"}], thinking=True
    )
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == f'<|bos|>\na{{"k": "é<"}}\nT{datetime.now().year}'


def test_special_tokens_have_ids(demo):
    assert demo.special_ids_of(["<|eos|>", "<|no token|>", "a"]) == {"<|eos|>": 1}


@pytest.mark.parametrize("model_type", ["deepseek_v32", "deepseek_v4"])
def test_a_folder_of_deepseek_needs_no_template(folder, model_type):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    assert not Tokenizer.from_folder(folder).has_chat_template
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<｜User｜>", "<｜Assistant｜>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, thinking=True)
    text = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜><think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


# in the alphabet that writes bytes as characters, and with marks that decoders change
ADDED = ["Bác", "Ġ", "é", "ÿ", "<Ġ>", "a▁b", "<0x41>", "##x", "  two", "<b▁c>", "plain"]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_added_token_is_its_content(kind, normalized, tmp_path):
    backend = KINDS[kind]()
    flags = {"normalized": normalized, "lstrip": True, "special": False}
    backend.add_tokens([AddedToken(text, **flags) for text in ADDED])
    backend.add_special_tokens(["<sù>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    texts = [*ADDED, "<sù>"]
    ids = [backend.token_to_id(text) for text in texts]
    assert tokenizer.decode_each(ids) == texts
    assert [tokenizer.piece_bytes(i).decode() for i in ids] == texts
    first, last = tokenizer.encode("fox", add_special_tokens=False), ids[-1]
    for token, text in zip(ids[:-1], ADDED, strict=True):
        some = [*first, token, token, last, *first, token]
        whole = tokenizer.decode(some, skip_special_tokens=False)
        assert whole.replace(" ", "").count(text.replace(" ", "")) == 3 and "<sù>" in whole
        without = tokenizer.decode(some)
        assert without.replace(" ", "") == whole.replace("<sù>", "").replace(" ", "")
        assert tokenizer.decode(some, kept=frozenset([last])) == whole
        detokenizer = new_detokenizer(tokenizer)
        assert "".join(map(detokenizer.append, some)) + detokenizer.flush() == without


def test_texts_with_an_added_token_come_back():
    """As with the letters that published DeepSeek tokenizers add: ø, ö, ú, ÿ and others."""
    backend = KINDS["deepseek"]()
    backend.add_tokens([AddedToken(char, normalized=True) for char in ["Bác", "øß", "ÿÿ"]])
    tokenizer = Tokenizer(backend)
    for text in ("der Bác søß", "漢Bác字ÿÿ", "a Bácá"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
