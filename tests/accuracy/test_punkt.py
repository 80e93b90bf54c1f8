"""The sentence model is found where it is installed; one line names what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from fd_dsa.accuracy.scorer import CARRIER, sentence_model
from fd_dsa.commands import extra_command
from fd_dsa.errors import BackendUnavailable

MODEL = "tokenizers/punkt_tab/english"
CACHE = "llama_index/core/_static/nltk_cache"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def digest() -> Iterator[str]:
    yield sentence_model()
    sentence_model.cache_clear()


def _copy(target: Path, link: bool = False) -> Path:
    """The installed model below `target`, as copies or as hard links to copies."""
    import nltk

    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        text = (Path(str(nltk.data.find(f"{MODEL}/"))) / name).read_bytes()
        file = target / MODEL / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
        if link:
            os.link(file, target / f"second name of {name}")
    return target


def _carrier(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """The installed carrier is in this folder, and NLTK has no model yet."""
    import nltk

    sentence_model.cache_clear()

    def distribution(name: str) -> SimpleNamespace:
        if folder is None or name != CARRIER:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda path: folder / path)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(nltk.data, "path", [])


@pytest.mark.parametrize("link", [False, True], ids=["others may write", "hard-linked"])
def test_carrier_is_read_however_it_was_installed(
    link: bool, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    (_copy(tmp_path / CACHE, link) / MODEL).chmod(0o700 if link else 0o777)
    _carrier(monkeypatch, tmp_path)
    assert sentence_model() == sentence_model() == digest
    assert len(nltk.data.path) == 1
    assert nltk.tokenize.PunktTokenizer().tokenize("Dr. No came. He left.") == [
        "Dr. No came.",
        "He left.",
    ]


@pytest.mark.parametrize("installed", [False, True], ids=["no carrier", "carrier without it"])
def test_missing_model(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    _carrier(monkeypatch, tmp_path if installed else None)
    with pytest.raises(BackendUnavailable) as caught:
        sentence_model()
    text = str(caught.value)
    assert "punkt_tab from llama-index-core (" in text
    assert text.endswith(f"; {extra_command('accuracy')}")
    assert "\n" not in text
    assert nltk.data.path == []


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=own, cwd="/"
    )


@pytest.mark.parametrize("absent", ["nltk", "lm_eval"])
def test_missing_package(absent: str) -> None:
    result = _python(
        f"import sys; sys.modules[{absent!r}] = None\n"
        "from fd_dsa.accuracy import prompts, scorer\n"
        "from fd_dsa.errors import BackendUnavailable\n"
        "try: scorer.ready(prompts.read_prompts()[:1])\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("IFEval's checkers ")
    assert absent in line
    assert " -m pip install " in line and "lm-eval" in line


@pytest.mark.slow
def test_scores_without_a_network_and_imports_nothing_early(tmp_path: Path) -> None:
    result = _python(
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('opened a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "import fd_dsa.accuracy.cli\n"
        "from fd_dsa.accuracy import prompts, scorer\n"
        "late = {'lm_eval', 'nltk', 'langdetect', 'matplotlib', 'llama_index'}\n"
        "early = late & sys.modules.keys()\n"
        "chosen = [p for p in prompts.read_prompts() if any(\n"
        "    i == 'length_constraints:number_sentences' for i in p.metadata['instruction_ids'])]\n"
        "assert not early, early\n"
        "scorer.ready(chosen)\n"
        "from fd_dsa.client.questions import Answer\n"
        "fields = [(p.key, p.messages, p.metadata) for p in chosen]\n"
        "scores = scorer.score([Answer(k, 'One. Two.', messages=m, metadata=d) "
        "for k, m, d in fields])\n"
        "print(len(scores), 'llama_index' in sys.modules)\n",
        HOME=str(tmp_path),
        NLTK_DATA="",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "46 False\n"
    assert result.stderr == ""
