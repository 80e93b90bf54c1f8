"""A server whose folder has a broken chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx

from fd_dsa.config import EngineConfig
from tests.serve.processes import FAKE, serving
from tests.serve.test_errors import error_of


def test_a_broken_template_of_the_folder_disables_chat_only(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(EngineConfig().model_path / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}\n\n{% unknown %}")
    reason = "chat template of chat_template.jinja: line 3 is no valid Jinja"
    flags = ("--tokenizer", str(folder))
    with serving(tmp_path, *flags, body=FAKE, env={"FD_DSA_PORT": "0"}) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        error = error_of(httpx.post(f"{server.url}/v1/chat/completions", json=body), 400)
        assert error["message"].startswith(f"messages: {reason}")
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200
        log = server.ends()
    assert log.count(reason) == 1
    assert f"WARNING chat: none, {reason}" in log
