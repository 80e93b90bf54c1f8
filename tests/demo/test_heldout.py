"""The held-out prompts: none is trained on, how answers are judged, and the recorded counts."""

from __future__ import annotations

import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from demo_training import heldout
from demo_training.heldout import ask_all, is_held_out, judge, judge_call, read, table
from demo_training.served import rates

TOOLS = Path(__file__).resolve().parents[2] / "tools/demo_training"
RESULTS = {name: TOOLS / f"heldout_{name}.json" for name in ("first", "fifth", "shipped")}


def group(category: str, language: str = "en") -> dict:
    """A group of the file."""
    found = (x for x in read()["groups"] if (x["category"], x["language"]) == (category, language))
    return next(found)


def test_the_file_has_the_kinds_of_prompts_that_a_page_invites():
    prompts, calls = heldout.prompts(), len(read()["calls"])
    assert len(prompts) - calls >= 300
    assert calls == 100
    assert len(set(map(heldout.plain, prompts))) == len(prompts)
    languages = Counter(g["language"] for g in read()["groups"] for _ in g["items"])
    assert min(languages.values()) >= 100


def test_a_document_with_a_held_out_prompt_is_drawn_again(generator, monkeypatch):
    asked = "tell me about the fd_dsa project"
    assert is_held_out(asked)
    documents = [[("user", text), ("assistant", "Yes.")] for text in (asked, asked, "Hello?")]
    drawn = iter(documents)
    monkeypatch.setattr(generator, "_document", lambda: next(drawn))
    assert generator.document() == documents[2]


@pytest.mark.parametrize(
    ("category", "language", "expected", "answer", "right"),
    [
        ("capitals", "en", "Berlin", "The capital of Germany is Berlin.", True),
        ("capitals", "en", "Berlin", "I am sorry, I do not know Berlin.", False),
        ("capitals", "en", "Berlin", "The capital is Bonn.", False),
        ("capitals", "zh", "巴黎", "法国的首都是巴黎。", True),
        ("capitals", "zh", "巴黎|Paris", "The capital of France is Paris.", False),
        ("arithmetic", "en", "-3", "4 - 7 = -3.", True),
        ("arithmetic", "en", "3", "10 - 7 = 3.", True),
        ("arithmetic", "en", "625", "25 x 20 + 25 x 5 = 500 + 125 = 625.", True),
        ("arithmetic", "en", "25", "25 x 20 = 500.", False),
        ("arithmetic", "en", "25", "There is none.", False),
        ("haiku", "en", "snow", "Snow falls,\na road,\nan evening.", True),
        ("haiku", "en", "snow", "Snow falls, a road, an evening.", False),
        ("story", "en", "mouse", "A mouse.", False),
        ("refuse code", "en", "", "I am sorry, I am too small to write or explain code.", True),
        ("refuse code", "en", "", "I am sorry, I do not know the answer to that.", True),
        ("refuse code", "en", "", "I am sorry, this task is too hard for me.", True),
        ("refuse code", "en", "", "I am sorry, I cannot translate.", False),
        ("refuse code", "en", "", "I am sorry, I do not know. I am sorry.", False),
        ("refuse code", "en", "", "def f(): return 1", False),
        ("refuse code", "zh", "", "对不起，我太小了，不会写代码。", True),
        ("refuse code", "zh", "", "对不起，我不会翻译。", False),
        ("refuse code", "zh", "", "I am sorry, I am too small to write code.", False),
    ],
)
def test_an_answer_is_right_or_wrong(category, language, expected, answer, right):
    assert judge(group(category, language), expected, answer) == right


def message(arguments: object, name: str = "water_plants", content: str = "") -> dict:
    """A message with one call."""
    call = {"function": {"name": name, "arguments": json.dumps(arguments)}}
    return {"content": content, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (message({"room": "hall"}), True),
        (message({"room": "the hall"}), True),
        (message({"room": "hall need water"}), False),
        (message({"room": "hall", "x": 1}), False),
        (message({"room": "hall"}, name="feed_animal"), False),
        (message({"room": "hall"}, content="I water them."), False),
        (message([]), False),
        ({"content": "", "tool_calls": message({"room": "hall"})["tool_calls"] * 2}, False),
        ({"content": "I am sorry, I have no tool for that."}, False),
    ],
)
def test_a_call_is_right_or_wrong(answer, right):
    assert judge_call("water_plants", "hall|the hall", answer) == right


def test_numbers_are_given_as_numbers():
    assert judge_call("set_timer", 25, message({"minutes": 25}, "set_timer"))
    assert not judge_call("set_timer", 25, message({"minutes": "25"}, "set_timer"))


def test_every_tool_is_offered_between_others():
    tools = read()["tools"]
    for _, tool, _ in read()["calls"]:
        names = [x["function"]["name"] for x in heldout.offered(tool)]
        assert len(names) == 3
        assert tool in names
    assert {tool for _, tool, _ in read()["calls"]} == set(tools)


class Server(ThreadingHTTPServer):
    """A server that holds as many connections as there are requests at a time."""

    request_queue_size = 64


class Handler(BaseHTTPRequestHandler):
    """Knows one capital, never ends a poem, and takes no tools."""

    def do_POST(self):
        """Answers a chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        text, reason = "The capital of Portugal is Lisbon.", "stop"
        if "poem" in prompt:
            text, reason = "autumn winter " * 30, "length"
        choice = {"finish_reason": reason, "message": {"content": text}}
        self.send_response(400 if body.get("tools") else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_):
        """Stays silent."""


def test_a_server_is_asked_every_prompt():
    with Server(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = ask_all(f"http://127.0.0.1:{server.server_port}/v1", TOOLS / "demo_eval.jsonl")
        server.shutdown()
    assert result["categories"]["capitals en"] == (1, len(group("capitals")["items"]))
    assert result["categories"]["poem en"][0] == 0 < result["endless"]
    assert result["categories"]["tool call"] == (0, 100)
    assert sum(total for _, total in result["categories"].values()) == len(result["answers"])
    # the second one's answer may name any of the model's subjects
    right = {"capital of Portugal?", "Give me an example of what I can ask."}
    assert {r["prompt"] for r in result["answers"] if r["right"]} == right


def test_a_server_has_the_rates_of_its_answers():
    known = "The capital of Portugal is Lisbon."
    needle = {"length": 256, "prompt": "Where?", "answer": known}
    items = [needle, needle | {"answer": "Lisbon."}, needle | {"length": 512, "prompt": "A poem."}]
    items.append(needle | {"task": "keys"})
    chats = [
        {"id": name, "group": "fact", "messages": [{"role": "user", "content": "Where?"}]}
        | {"checks": [["equals", value]]}
        for name, value in (("right", known), ("wrong", "Lisbon."))
    ]
    with Server(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        found = rates(f"http://127.0.0.1:{server.server_port}/v1", items, chats)
        server.shutdown()
    # an answer that reaches the limit has no end
    assert found["retrieval"] == {"served": {256: 0.5, 512: 0.0}}
    assert found["keys"] == {"served": {256: 1.0}}
    assert found["chat"] == {"fact": (1, 2)}
    assert found["answers"] == {"right": known, "wrong": known}


@pytest.mark.parametrize("path", RESULTS.values(), ids=RESULTS)
def test_recorded_answers_are_judged_as_they_were(path):
    """The answers of all groups; those that were cut in the file are left out."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    rows = iter(recorded["answers"])
    for found in read()["groups"]:
        for prompt, *expected in found["items"]:
            row = next(rows)
            assert row["prompt"] == prompt[-200:]
            if len(row["answer"]) < 400:
                right = judge(found, expected[0] if expected else "", row["answer"])
                assert row["right"] == right, row


def test_the_card_has_the_counts_of_its_model():
    counts = json.loads(RESULTS["shipped"].read_text(encoding="utf-8"))["languages"]
    card = (TOOLS.parents[1] / "fd_dsa/demo_model/README.md").read_text(encoding="utf-8")
    (right, total), (chinese, all_chinese) = counts["en"], counts["zh"]
    assert f"Of {total} held-out requests in English it answers {right} rightly" in card
    assert f"of {all_chinese} in Chinese {chinese}." in card


def test_the_pages_table_is_that_of_the_recorded_counts():
    recorded = {k: json.loads(v.read_text(encoding="utf-8")) for k, v in RESULTS.items()}
    for result in recorded.values():
        rights = sum(row["right"] for row in result["answers"])
        assert rights == sum(right for right, _ in result["categories"].values())
    assert table(recorded) in (TOOLS / "README.md").read_text(encoding="utf-8")
