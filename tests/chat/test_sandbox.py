"""Templates that would make large values, take a long time, or go on after their client left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from typing import Any

import pytest

from fd_dsa.cancellation import Cancelled, cancelled_by
from fd_dsa.chat import sandbox, template_process
from fd_dsa.chat.sandbox import PromptTooLong, bounded_rendering
from fd_dsa.chat.template import ChatTemplate
from fd_dsa.chat.template_child import MEMORY_MIB
from fd_dsa.chat.template_process import TemplateProcess
from fd_dsa.errors import ConfigError
from tests.chat import templates
from tests.chat.template_attacks import ATTACKS

# of a model with a context of 4,096 tokens
MAX_CHARS = 16 * 4096
# of the process of a template, which has 30 MiB before
MAX_MIB = MEMORY_MIB + 50
MAX_SECONDS = 0.3
MESSAGES = [{"role": "user", "content": "Hi"}]
LIMITS = re.compile("takes more than|would make a prompt|nests too deeply|than there is memory for")


def render(source: str, max_chars: int = MAX_CHARS, **variables: Any) -> str:
    """The prompt of a template of the operator on a server with this bound."""
    with bounded_rendering(max_chars):
        return ChatTemplate(source, {}).render(MESSAGES, **variables)


def of_client(source: str) -> ChatTemplate:
    """A template of a client."""
    return ChatTemplate(source, {}, compiler=TemplateProcess)


class Hurried(TemplateProcess):
    """A process that also compiles for a short time only."""

    COMMAND = (
        *(sys.executable, "-c"),
        "from fd_dsa.chat import template_child as child; child.MAX_SECONDS = 0.6; child.main()",
    )


# renders the attacks in processes of their own, whose memory is measured
MEASURE = f"""
import json, resource
from fd_dsa.chat.sandbox import bounded_rendering
from fd_dsa.chat.template import ChatTemplate
from tests.chat.test_sandbox import ATTACKS, MESSAGES, Hurried
for name, source in ATTACKS.items():
    try:
        with bounded_rendering({MAX_CHARS}, {MAX_SECONDS}):
            template = ChatTemplate(source, {{}}, compiler=Hurried)
            answer = f"a prompt of {{len(template.render(MESSAGES))}} characters"
    except ValueError as error:
        answer = str(error)
    mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps([name, answer, mib]), flush=True)
"""


def test_an_attack_ends_with_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (measured[-1:], done.stderr)
    assert [name for name, *_ in measured] == list(ATTACKS)
    for name, answer, mib in measured:
        assert answer.startswith("chat template"), (name, answer)
        assert LIMITS.search(answer), (name, answer)
        assert len(answer) < 1100, name
        assert mib < MAX_MIB, name


def test_a_process_renders_what_this_process_renders() -> None:
    template = of_client(templates.GLM)
    expected = ChatTemplate(templates.GLM, {})
    call = {"function": {"name": "f", "arguments": '{"a": "b"}'}}
    history = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for messages in (MESSAGES, history):
        assert template.render(messages) == expected.render(messages)
    with pytest.raises(ValueError, match=r"^chat template: a{1000}$"):
        of_client("{{ raise_exception('a' * 1000000) }}").render(MESSAGES)
    with pytest.raises(ConfigError, match="of the request: line 2 is no valid Jinja: Encountered"):
        of_client("a\n{% unknown %}")


def test_a_process_that_has_ended_starts_again() -> None:
    template = of_client("{% for i in range(n) %}{{ 'a'.ljust(10**9) | length }}{% endfor %}b")
    with bounded_rendering(MAX_CHARS, MAX_SECONDS):
        with pytest.raises(ValueError, match="makes more than there is memory for"):
            template.render(MESSAGES, n=1)
        assert template.render(MESSAGES, n=0) == "b"
    slow = of_client("{{ ('a' * 1000000).rfind('ab' + 'a' * n) }}")
    with (
        bounded_rendering(MAX_CHARS, MAX_SECONDS),
        pytest.raises(ValueError, match="takes more than 10 s of processor time or 256 MiB"),
    ):
        slow.render(MESSAGES, n=500_000)
    with bounded_rendering(MAX_CHARS):
        assert slow.render(MESSAGES, n=2) == "-1"


def test_one_killed_rendering_ends_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples of a role are rendered before the conversation."""
    started = list[Any]()
    start = template_process.ChildProcess
    monkeypatch.setattr(
        template_process, "ChildProcess", lambda *args: started.append(args) or start(*args)
    )
    slow = of_client("{{ messages[0].content }}{{ ('a' * 1000000).rfind('ab' + 'a' * 500000) }}")
    with bounded_rendering(MAX_CHARS, 0.1), pytest.raises(ValueError, match="processor time"):
        slow.render(MESSAGES)
    assert len(started) == 1


def test_a_step_without_large_values_ends_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    for source in ("loops", "loops_test", "lists"):
        with pytest.raises(ValueError, match=r"chat template: takes more than 0.05 s of processor"):
            render(ATTACKS[source], 10**9)


@pytest.mark.parametrize("is_of_client", [False, True])
def test_rendering_ends_when_its_client_leaves(is_of_client: bool) -> None:
    stop, errors = threading.Event(), list[BaseException]()
    template = of_client(ATTACKS["loops"]) if is_of_client else ChatTemplate(ATTACKS["loops"], {})

    def work() -> None:
        with cancelled_by(stop), pytest.raises(Cancelled) as caught, bounded_rendering(10**9):
            template.render(MESSAGES)
        errors.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    stop.set()
    thread.join(5)
    assert len(errors) == 1


@pytest.mark.parametrize("make", [lambda source: ChatTemplate(source, {}), of_client])
def test_a_prompt_has_at_most_its_characters(make: Any) -> None:
    template = make("{% for i in range(10) %}aé{% endfor %}{{ messages[0].content }}")
    with bounded_rendering(22):
        assert len(template.render(MESSAGES)) == 22
    with (
        bounded_rendering(21),
        pytest.raises(PromptTooLong, match="would make a prompt of more than 21 characters"),
    ):
        template.render(MESSAGES)


def test_a_long_error_of_a_template_is_cut() -> None:
    with pytest.raises(ValueError, match=r"^chat template: a{1000}$"):
        render("{{ raise_exception('a' * 1000000) }}")


def test_a_long_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 65537 characters; it must have at most 65536"):
        ChatTemplate("a" * 65537, {})


# collects the text of a conversation in a namespace, and reads it through macros and filters
COLLECTING = """\
{% macro show(m) %}{% set text %}{{ m.content | trim }}{% endset %}{{ text }}{% endmacro %}
{% set ns = namespace(text='', parts=[]) %}
{% for m in messages %}
{% set content = m.content.split('</think>')[-1].lstrip('\\n') | replace('\\r', '') %}
{% set ns.text = ns.text ~ '<|' + m.role + '|>' + show(m) + content[:100] %}
{% set ns.parts = ns.parts + [m] %}
{% endfor %}
{{ ns.text }}{{ ns.parts | map(attribute='role') | unique | join }}"""


@pytest.mark.parametrize(
    "make", [lambda source: ChatTemplate(source, {"bos_token": "<s>"}), of_client]
)
@pytest.mark.parametrize("source", [templates.V31, templates.GLM, COLLECTING])
@pytest.mark.parametrize("num_messages", [40, 4096])
def test_long_conversations_are_rendered(source: str, num_messages: int, make: Any) -> None:
    # of a model with a context of 160,000 tokens, in which each has six letters
    text = "Größe " * (160_000 // num_messages)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i in range(num_messages)]
    if source == COLLECTING:
        # each message copies all messages before it
        messages = messages[:300]
    with bounded_rendering(16 * 160_000):
        prompt = make(source).render(messages)
    assert prompt.count("Größe") >= len(messages) * (160_000 // num_messages)
