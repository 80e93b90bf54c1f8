"""`python -m fd_dsa.serve` on the demo model: a real process, a real model, the real client."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from tests.serve.processes import command, finish, serving

pytestmark = pytest.mark.slow

# of several sentences, so that a stream has several events
HELLO = [{"role": "user", "content": "Hello! Tell me a story about a fox."}]


def greedy(client: openai.OpenAI, **fields: Any) -> Any:
    """A short greedy answer to HELLO."""
    short = {"model": "demo_model", "messages": HELLO, "max_tokens": 40, "temperature": 0}
    return client.chat.completions.create(**{**short, **fields})


def test_greedy_chat_is_readable_repeatable_and_streamed(tmp_path: Path) -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    with serving(tmp_path) as demo, demo.client() as client:
        (model,) = client.models.list().data
        assert model.id == "demo_model"
        assert model.max_model_len == config["max_position_embeddings"]
        first, second = greedy(client), greedy(client)
        chunks = list(greedy(client, stream=True, stream_options={"include_usage": True}))
    text = first.choices[0].message.content
    assert re.search(r"[A-Za-z]+ [a-z]+ [a-z]+", text)
    assert "<|" not in text and "�" not in text
    assert second.choices[0].message.content == text
    assert first.usage == second.usage == chunks[-1].usage
    assert 0 < first.usage.completion_tokens <= 40
    texts = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(texts) == text and sum(map(bool, texts)) > 3
    assert chunks[-2].choices[0].finish_reason == first.choices[0].finish_reason


def link_demo(folder: Path, *without: str) -> Path:
    """A model folder with links to the demo's files, some left out."""
    folder.mkdir()
    for file in demo_model_path().iterdir():
        if file.name not in without:
            (folder / file.name).symlink_to(file)
    return folder


def failed_start(folder: Path, *flags: str) -> str:
    """The one error line of a start that must fail."""
    done = finish(folder, command("--port", "0", *flags), 2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("fd_dsa: error: ")]
    assert done.stderr.splitlines()[-1:] == lines
    return lines[0]


def test_damaged_folders_are_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in failed_start(tmp_path, str(empty))
    folder = link_demo(tmp_path / "no_weights", "model.safetensors")
    assert "safetensors" in failed_start(tmp_path, str(folder))
    folder = link_demo(tmp_path / "no_tokenizer", "tokenizer.json")
    assert "tokenizer.json" in failed_start(tmp_path, str(folder))
    folder = link_demo(tmp_path / "cut", "model.safetensors")
    with (demo_model_path() / "model.safetensors").open("rb") as whole:
        (folder / "model.safetensors").write_bytes(whole.read(1 << 20))
    assert "model.safetensors" in failed_start(tmp_path, str(folder))


def test_what_this_machine_or_release_cannot_serve_is_one_line(tmp_path: Path) -> None:
    folder = link_demo(tmp_path / "llama", "config.json")
    config = json.loads((demo_model_path() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    line = failed_start(tmp_path, str(folder))
    assert all(word in line for word in ("model_type", "'llama'", "deepseek_v32", "glm_moe_dsa"))
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        line = failed_start(tmp_path, "--device", "gpu")
        assert "--device: got 'gpu'" in line and "--device cpu" in line


def test_metrics_count_what_the_model_did(tmp_path: Path) -> None:
    flags = "--index-topk", "16", "--speculative-config", "none"
    with serving(tmp_path, *flags) as server, server.client() as client:
        for _ in range(2):
            answer = greedy(client, max_tokens=30, extra_body={"ignore_eos": True})
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
    counts = dict(re.findall(r'^fd_dsa:(\w+)\{model_name="demo_model"\} (\S+)$', text, re.M))
    assert float(counts["generation_tokens_total"]) == 60
    # the first token of each answer comes from a step with its prompt
    assert float(counts["mask_offsets_launched_total"]) == 2
    assert float(counts["mask_offsets_skipped_total"]) == 58
    # all but the last token of an answer are computed
    num_tokens = answer.usage.total_tokens - 1
    assert float(counts["sparse_tokens_total"]) == 2 * (num_tokens - 16)
    pattern = r'^fd_dsa:step_prepare_seconds_count\{kind="(\w+)",model_name="demo_model"\} (\S+)$'
    assert dict(re.findall(pattern, text, re.M)) == {
        "prefill": "2.0",
        "decode": "58.0",
        "mixed": "0.0",
    }


def test_calls_are_forced(tmp_path: Path) -> None:
    """The demo model has never seen a tool; under the grammar it calls one, also streamed."""
    level = {"type": "integer", "minimum": 1, "maximum": 9}
    parameters = {
        "type": "object",
        "properties": {"level": level, "mode": {"enum": ["slow", "fast"]}},
        "required": ["level", "mode"],
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("start", "stop")
    ]
    prompt = Tokenizer.from_folder(demo_model_path()).apply_chat_template(HELLO, tools=tools)
    named = {"type": "function", "function": {"name": "stop"}}
    with serving(tmp_path, "--tool-call-parser", "glm47") as server, server.client() as client:
        for choice, names in (("required", ("start", "stop")), (named, ("stop",))):
            fields = {"tools": tools, "tool_choice": choice, "max_tokens": 400}
            whole = greedy(client, parallel_tool_calls=False, **fields)
            assert whole.usage.prompt_tokens == len(prompt)
            answer = whole.choices[0]
            assert answer.finish_reason == "tool_calls"
            (call,) = answer.message.tool_calls
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            assert arguments["level"] in range(1, 10)
            assert arguments["mode"] in ("slow", "fast")
            chunks = list(greedy(client, parallel_tool_calls=False, stream=True, **fields))
            parts = [p for chunk in chunks for p in chunk.choices[0].delta.tool_calls or []]
            assert "".join(part.function.arguments for part in parts) == call.function.arguments


def test_a_conversation_with_tools_by_both_other_apis(tmp_path: Path) -> None:
    """A forced call, its result, and an answer, streamed, by the clients of both makers."""
    schema = {
        "type": "object",
        "properties": {"level": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["level"],
    }
    question = {"role": "user", "content": "Set it to three."}
    short: Any = {"model": "demo_model", "temperature": 0}
    with serving(tmp_path, "--tool-call-parser", "glm47") as server, server.client() as client:
        asked: Any = {
            **short,
            "input": [question],
            "tools": [{"type": "function", "name": "set", "parameters": schema}],
            "parallel_tool_calls": False,
        }
        with client.responses.stream(**asked, tool_choice="required") as stream:
            output = stream.get_final_response().output
        call = output[-1]
        assert (call.type, call.name, call.status) == ("function_call", "set", "completed")
        assert json.loads(call.arguments)["level"] in range(1, 10)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        asked |= {"input": [question, *output, result], "max_output_tokens": 12}
        with client.responses.stream(**asked, tool_choice="none") as stream:
            events = list(stream)
        whole = client.responses.create(**asked, tool_choice="none")
        assert events[-1].response.output_text == whole.output_text != ""

        # a large package, which other workers need not load
        import anthropic

        with anthropic.Anthropic(base_url=server.url, api_key="none") as other:
            fields: Any = {
                "model": "demo_model",
                "max_tokens": 400,
                "messages": [question],
                "tools": [{"name": "set", "input_schema": schema}],
                "extra_body": {"temperature": 0},
            }
            choice: Any = {"type": "any", "disable_parallel_tool_use": True}
            with other.messages.stream(**fields, tool_choice=choice) as messages:
                answer = messages.get_final_message()
            use = answer.content[-1]
            assert (answer.stop_reason, use.type) == ("tool_use", "tool_use")
            assert use.input == json.loads(call.arguments)
            done = {"type": "tool_result", "tool_use_id": use.id, "content": "done"}
            history = [
                question,
                {"role": "assistant", "content": answer.content},
                {"role": "user", "content": [done]},
            ]
            fields |= {"messages": history, "max_tokens": 12}
            with other.messages.stream(**fields, tool_choice={"type": "none"}) as messages:
                assert messages.get_final_text() == whole.output_text
