"""IFEval's scores by the checkers of lm-eval, offline and repeatable.

Strict scores use the unchanged answer. Loose scores use, for each instruction, the best of eight
variants: whole, without its first line, without its last, without both, each with and without `*`.
An empty answer follows no instruction.

The checkers use Python's global random numbers in one place, and langdetect has its own. Both are
seeded before every prompt and restored after it. So a score depends only on its prompt and answer,
not on earlier prompts.

The place is the frequency of a character. The checker replaces one that is not a letter by a random
letter, as for `#` in the official prompt 1122 and `!` in 1129. All public scorers do so
(google-research/google-research #3427, allenai/olmo-eval #320).

Source: Zhou et al. 2023, arXiv 2311.07911.
"""

from __future__ import annotations

import atexit
import hashlib
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.scores import PromptScore, prompt_score
from fd_dsa.client.questions import Answer, Question
from fd_dsa.commands import extra_command
from fd_dsa.errors import BackendUnavailable, ConfigError, describe_error

SEED = 0
_PACKAGES = ("lm-eval", "nltk", "langdetect")
CARRIER = "llama-index-core"
"""The PyPI package whose wheel contains the model.

Its files are read, its code is not run.
"""
_CACHE = "llama_index/core/_static/nltk_cache"
_MODEL = "tokenizers/punkt_tab/english"
_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


def ready(prompts: Sequence[Question | Answer]) -> dict[str, str]:
    """Prepare the scorer.

    Returns versions of the checkers and SHA-256 of the sentence model.

    Call it before the first request, so that everything `score` needs is present.
    """
    for prompt in prompts:
        _check(prompt, "")
    versions = {name.replace("-", "_"): metadata.version(name) for name in _PACKAGES}
    return {**versions, "punkt_tab_sha256": sentence_model()}


def score(answers: Sequence[Answer]) -> list[PromptScore]:
    """Return the scores of the answers, in the same order."""
    scores = []
    for answer in answers:
        found = _check(answer, answer.text)
        strict, loose = (
            tuple(map(bool, found[f"inst_level_{kind}_acc"])) for kind in ("strict", "loose")
        )
        names = tuple(answer.metadata["instruction_ids"])
        scores.append(prompt_score(answer, names, strict, loose))
    return scores


def _check(prompt: Question | Answer, text: str) -> dict[str, Any]:
    """Return the checkers' results for an answer."""
    names, kwargs = (prompt.metadata[name] for name in ("instruction_ids", "kwargs"))
    document = {
        "key": prompt.key,
        "prompt": prompt.messages[-1]["content"],
        "instruction_id_list": names,
        "kwargs": [dict(given) for given in kwargs],
    }
    check = _checkers()
    try:
        with _seeded():
            return check(document, [text])
    except Exception as error:
        raise ConfigError(
            f"prompt {prompt.key!r}: the checkers refuse it ({describe_error(error)}); its "
            f"arguments are {kwargs}"
        ) from error


@cache
def _checkers() -> Callable[[dict[str, Any], list[str]], dict[str, Any]]:
    """Return lm-eval's `process_results`: from a document and answers to their results."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval  # noqa: F401

            # before the next import, which would otherwise download the model
            sentence_model()
            from lm_eval.tasks.ifeval.utils import process_results
    except BackendUnavailable:
        raise
    except ImportError as error:
        raise BackendUnavailable(
            f"IFEval's checkers are not installed ({error}); {extra_command('accuracy')}"
        ) from None
    process: Callable[[dict[str, Any], list[str]], dict[str, Any]] = process_results
    return process


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the random numbers of the checkers, and restore them afterwards."""
    from langdetect import DetectorFactory

    state, seed = random.getstate(), DetectorFactory.seed
    random.seed(SEED)
    DetectorFactory.seed = SEED
    try:
        yield
    finally:
        random.setstate(state)
        DetectorFactory.seed = seed


@cache
def sentence_model() -> str:
    """Make the sentence model readable for NLTK.

    Returns the SHA-256 of its files, hexadecimal.

    NLTK then reads a private copy of the model in `CARRIER` until the process ends. It refuses
    files with hard links, which some installers make, and folders that others may write.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nltk
        folder = metadata.distribution(CARRIER).locate_file(_CACHE)
        files = {name: Path(str(folder), _MODEL, name).read_bytes() for name in _FILES}
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"IFEval's checkers need nltk, and its sentence model punkt_tab from {CARRIER} "
            f"({error}); {extra_command('accuracy')}"
        ) from None
    own = tempfile.mkdtemp(prefix="fd_dsa_punkt_")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    model = Path(own) / _MODEL
    model.mkdir(parents=True, mode=0o700)
    for name, content in files.items():
        (model / name).write_bytes(content)
    nltk.data.path.insert(0, own)
    return hashlib.sha256(b"".join(files.values())).hexdigest()
