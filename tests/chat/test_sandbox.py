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
from fd_dsa.chat import budget
from fd_dsa.chat.budget import PromptTooLong, bounded_rendering
from fd_dsa.chat.template import ChatTemplate
from fd_dsa.errors import ConfigError
from tests.chat import templates
from tests.chat.template_attacks import ATTACKS

# of a model with a context of 4,096 tokens
MAX_CHARS = 16 * 4096
MAX_MIB, MAX_SECONDS = 100, 2.0
MESSAGES = [{"role": "user", "content": "Hi"}]
LIMITS = re.compile(
    "would (make|compare|look up|read)|takes|nests too deeply|is not available|No filter"
)


def render(source: str, max_chars: int = MAX_CHARS, **variables: Any) -> str:
    """The prompt of a template on a server with this bound."""
    with bounded_rendering(max_chars):
        return ChatTemplate(source, {}).render(MESSAGES, **variables)


# runs all attacks in a process of its own, whose memory is measured
MEASURE = """
import json, resource, time
from tests.chat.test_sandbox import ATTACKS, render
for name, source in ATTACKS.items():
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    try:
        answer = f"a prompt of {len(render(source))} characters"
    except ValueError as error:
        answer = str(error)
    seconds = time.thread_time() - begin
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([name, answer, seconds, mib]), flush=True)
"""


def test_an_attack_ends_soon_with_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (measured[-1], done.stderr)
    assert [name for name, *_ in measured] == list(ATTACKS)
    for name, answer, seconds, mib in measured:
        assert answer.startswith("chat template: "), (name, answer)
        assert LIMITS.search(answer), (name, answer)
        assert len(answer) < 1100, name
        assert seconds < MAX_SECONDS, name
        assert mib < MAX_MIB, name


def test_a_step_without_large_values_ends_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.05)
    with pytest.raises(ValueError, match=r"chat template: takes more than 0.05 s of processor"):
        render(ATTACKS["loops"], 10**9)


def test_rendering_ends_when_its_client_leaves() -> None:
    stop, errors = threading.Event(), list[BaseException]()

    def work() -> None:
        with cancelled_by(stop), pytest.raises(Cancelled) as caught:
            render(ATTACKS["loops"], 10**9)
        errors.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    stop.set()
    thread.join(5)
    assert len(errors) == 1


def test_a_prompt_has_at_most_its_characters() -> None:
    source = "{% for i in range(10) %}aé{% endfor %}{{ messages[0].content }}"
    assert len(render(source, 22)) == 22
    with pytest.raises(PromptTooLong, match="would make a prompt of more than 21 characters"):
        render(source, 21)


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


@pytest.mark.parametrize("source", [templates.V31, templates.GLM, COLLECTING])
@pytest.mark.parametrize("num_messages", [40, 4096])
def test_long_conversations_are_rendered(source: str, num_messages: int) -> None:
    # of a model with a context of 160,000 tokens, in which each has six letters
    text = "Größe " * (160_000 // num_messages)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i in range(num_messages)]
    if source == COLLECTING:
        # each message copies all messages before it
        messages = messages[:300]
    with bounded_rendering(16 * 160_000):
        prompt = ChatTemplate(source, {"bos_token": "<s>"}).render(messages)
    assert prompt.count("Größe") >= len(messages) * (160_000 // num_messages)
