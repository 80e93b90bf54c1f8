"""Errors repeat long values in part, and short ones whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa.chat.renderers import read_renderer
from fd_dsa.cli import main
from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError, flag_error, shorten, shorten_text
from fd_dsa.models.config_reader import read_json_object

LONG = "a" * 100_000


@pytest.mark.parametrize("value", ["short", "it's", 5, -1.5, None, (1, 2), ["a"], {"a": 1}])
def test_short_values_are_whole(value: object) -> None:
    assert shorten(value) == repr(value)
    assert str(flag_error("seed", value, "x")) == f"--seed: got {value!r}, allowed: x"
    assert shorten_text(str(value)) == str(value)


@pytest.mark.parametrize(
    "value",
    [LONG, 10**5000, -(10**5000), [LONG] * 100, {LONG: LONG}, LONG.encode(), Path(LONG)],
    ids=lambda value: type(value).__name__,
)
def test_long_values_are_cut(value: object) -> None:
    assert len(str(flag_error("seed", value, "x"))) < 2000
    assert "\n" not in shorten(value)


def test_a_long_text_keeps_its_ends() -> None:
    assert shorten_text("b" + LONG + "c").startswith("ba") and len(shorten_text(LONG)) < 500
    assert shorten_text("b" + LONG + "c").endswith("ac")


@pytest.mark.parametrize("field", ["model", "tokenizer", "device", "dtype", "chat_template"])
def test_errors_of_the_engine_are_short(field: str) -> None:
    for value in (LONG, 10**5000):
        with pytest.raises(ConfigError, match=f"^--{field.replace('_', '-')}: got ") as caught:
            EngineConfig(**{field: value})  # type: ignore[arg-type]
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (("serve", "--port", LONG), "--port: got 'aa"),
        (("serve", "--model", LONG), "--model: got 'aa"),
        (("serve", f"--{LONG}"), "unknown flag --aa"),
        (("serve", f"--log-json={LONG}"), "--log-json: ignored explicit argument 'aa"),
        (("serve", "--engine", LONG), "--engine: got 'aa"),
        (("serve", "--config", LONG), "--config: 'aa"),
        (("serve", "--help", LONG), "--help: no topic 'aa"),
        (("serve", "x", LONG), "unexpected argument 'aa"),
        (("serve", "--tokenizer-mode", LONG), "--tokenizer-mode: got 'aa"),
        ((LONG,), "unknown command 'aa"),
        (("bench", "--output", LONG), "--output: aa"),
        (("run-batch", "-i", LONG, "-o", "x"), "--input-file: 'aa"),
        (("accuracy", "score", LONG), "aa"),
        (("accuracy", "compare", LONG, LONG), "aa"),
        (("accuracy", "ifeval", "--out", LONG), "--out: aa"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_of_commands_are_short(
    line: tuple[str, ...], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fd_dsa: error: {flag}") and len(said) < 700


def test_a_file_that_cannot_be_read_is_named_once_without_a_number(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    path = file / "config.json"
    with pytest.raises(ConfigError) as refused:
        read_json_object(path)
    assert str(refused.value) == f"{path}: cannot be read (not a directory)"
    with pytest.raises(ConfigError) as refused:
        read_renderer(tmp_path, {}, {}, (), lambda token: False, path)
    assert str(refused.value).endswith("config.json: cannot be read: not a directory")
