"""IFEval's scores, by the checkers of lm-eval (`lm_eval.tasks.ifeval`), offline and repeatable.

Strict takes the answer as it is; loose takes, for each instruction, the best of eight variants:
whole, without its first line, without its last, without both, each as it is and without `*`.
An empty answer follows nothing.

The checkers draw from Python's global random numbers in one place (`random_keys`) and langdetect
draws its own. Both are seeded before every prompt, so a score depends on the prompt and its answer
alone and not on the prompts before it, and put back after it.

Source: Zhou et al. 2023, arXiv 2311.07911.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

from fd_dsa.accuracy import punkt
from fd_dsa.accuracy.prompts import Prompt
from fd_dsa.accuracy.types import Answer, PromptScore
from fd_dsa.errors import BackendUnavailable, ConfigError, FdDsaError

SEED = 0
_PACKAGES = ("lm-eval", "nltk", "langdetect")
_LETTERS = "keywords:letter_frequency"

_Checkers = Callable[[dict[str, Any], list[str]], dict[str, Any]]


def ready(prompts: Sequence[Prompt]) -> dict[str, str]:
    """What will score these prompts: versions of the checkers and SHA-256 of the sentence model.

    To be called before the first request: afterwards `score` lacks nothing.

    Raises:
        BackendUnavailable: the checkers or the sentence model are not installed.
        ConfigError: the checkers refuse the arguments of a prompt.
    """
    check = _checkers()
    for prompt in prompts:
        try:
            with _seeded():
                check(_document(prompt), [""])
        except Exception as error:
            raise ConfigError(
                f"prompt {prompt.key!r}: the checkers refuse it ({_cause(error)}); "
                f"its arguments are {list(prompt.kwargs)}"
            ) from error
    versions = {name.replace("-", "_"): metadata.version(name) for name in _PACKAGES}
    return {**versions, "punkt_tab_sha256": punkt.resolve()}


def score(prompts: Sequence[Prompt], answers: Sequence[Answer | str]) -> list[PromptScore]:
    """Scores of the answers, one for each prompt and in the same order.

    Args:
        prompts: any, in any order.
        answers: one for each prompt; one with an error counts as empty.

    Raises:
        BackendUnavailable: as `ready`.
        ConfigError: more or fewer answers than prompts, or the key of another prompt.
        FdDsaError: a checker breaks down on an answer; the message names the prompt.
    """
    if len(prompts) != len(answers):
        raise ConfigError(f"{len(answers)} answers for {len(prompts)} prompts; one each is needed")
    check = _checkers()
    return [_score(check, *pair) for pair in zip(prompts, answers, strict=True)]


def random_keys(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Keys of the prompts whose grade is drawn: 1122 and 1129 of the official set.

    They ask for a frequency of `#` and of `!`; the checker replaces what is no letter by a random
    one. Every public scorer shares it, so unseeded passes over the same answers can differ.
    Source: google-research/google-research #3427, allenai/olmo-eval #320.
    """
    return tuple(
        prompt.key
        for prompt in prompts
        if any(
            name == _LETTERS and not _is_letter(given["letter"])
            for name, given in zip(prompt.instruction_ids, prompt.kwargs, strict=True)
        )
    )


def _score(check: _Checkers, prompt: Prompt, answer: Answer | str) -> PromptScore:
    """The score of one answer."""
    if isinstance(answer, str):
        answer = Answer(prompt.key, answer, None, None, None, 0.0)
    if answer.key != prompt.key:
        raise ConfigError(f"the answer to {answer.key!r} stands at the place of {prompt.key!r}")
    text = "" if answer.error else answer.text
    try:
        with _seeded():
            result = check(_document(prompt), [text])
    except Exception as error:
        raise FdDsaError(
            f"prompt {prompt.key!r}: the checkers break down on its answer ({_cause(error)})"
        ) from error
    return PromptScore(
        prompt.key,
        prompt.instruction_ids,
        tuple(map(bool, result["inst_level_strict_acc"])),
        tuple(map(bool, result["inst_level_loose_acc"])),
        answer.finish_reason,
        answer.prompt_tokens,
        answer.completion_tokens,
        # a server may cut a character in two
        hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
    )


def _document(prompt: Prompt) -> dict[str, Any]:
    """The prompt as lm-eval's task reads it, its own copy each time."""
    return {
        "key": prompt.key,
        "prompt": prompt.text,
        "instruction_id_list": list(prompt.instruction_ids),
        "kwargs": [dict(given) for given in prompt.kwargs],
    }


@cache
def _checkers() -> _Checkers:
    """lm-eval's `process_results`: a document and its answers to lists of what holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval  # noqa: F401

            # before the next import, which would download the model where it finds none
            punkt.resolve()
            from lm_eval.tasks.ifeval import utils
    except BackendUnavailable:
        raise
    except ImportError as error:
        raise BackendUnavailable(
            f"IFEval's checkers are not installed ({error}); pip install 'fd_dsa[accuracy]'"
        ) from None
    process: _Checkers = utils.process_results
    return process


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed what the checkers draw from; afterwards both are as they were."""
    from langdetect import DetectorFactory

    state, seed = random.getstate(), DetectorFactory.seed
    random.seed(SEED)
    DetectorFactory.seed = SEED
    try:
        yield
    finally:
        random.setstate(state)
        DetectorFactory.seed = seed


def _is_letter(text: str) -> bool:
    """Whether the letter checker counts this letter itself."""
    return len(text) == 1 and "a" <= text.lower() <= "z"


def _cause(error: Exception) -> str:
    """An exception of the checkers in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
