"""Addresses as they are printed, and the curl line for them."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import socket
import subprocess

import pytest

from fd_dsa.environment import format_address, local_url
from fd_dsa.errors import ConfigError
from fd_dsa.serve.server import bind_socket, curl_command, try_line


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "localhost")],
)
def test_url_is_one_that_this_machine_reaches(host: str, shown: str) -> None:
    with bind_socket(host, 0) as sock:
        port = sock.getsockname()[1]
        assert port > 0
        assert local_url(host, port) == f"http://{shown}:{port}"
    assert format_address("::1", 80) == "[::1]:80"


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_text_that_is_no_host_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"--host: got '{host}', which .*\(not a host name\)"):
        bind_socket(host, 0)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["demo", "it's", 'a "b" c', "模型"])
def test_the_curl_command_is_quoted_for_a_shell(name: str, chat: bool) -> None:
    words = shlex.split(curl_command("http://127.0.0.1:1", name, 8, chat))
    assert words[0] == "curl"
    assert words[1] == f"http://127.0.0.1:1/v1/{'chat/' if chat else ''}completions"
    body = json.loads(words[-1])
    assert body["model"] == name
    assert body["max_tokens"] == 1
    assert ("messages" in body) is chat


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("keys", [["k"], ["k1", "k2"]])
def test_the_curl_command_reads_the_key_from_the_variable_of_the_server(keys: list[str]) -> None:
    line = curl_command("http://[::1]:1", "it's", 8, True, len(keys))
    # a shell may look for files in brackets
    assert "'http://[::1]:1/v1/chat/completions'" in line
    asked = ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"]
    env = {"FD_DSA_API_KEY": ",".join(keys)}
    said = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout
    assert f"Authorization: Bearer {keys[0]}\n" in said
    assert (try_line(0), "FD_DSA_API_KEY=" in try_line(len(keys))) == ("Try:", True)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EADDRINUSE, "stop the process that has it"),
        (errno.EADDRNOTAVAIL, "no interface of this machine has it; choose another --host"),
        (errno.EACCES, "ports below 1024 need the right to it; choose another --port"),
        (errno.EPERM, "choose another --host or --port"),
    ],
)
def test_an_address_that_cannot_be_had_is_told_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    def bind(self: socket.socket, address: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fd_dsa.serve.server.socket.socket.bind", bind)
    with pytest.raises(ConfigError, match=re.escape(cure)) as caught:
        bind_socket("127.0.0.1", 80)
    assert str(caught.value).startswith(f"127.0.0.1:80: {os.strerror(number).lower()}")
