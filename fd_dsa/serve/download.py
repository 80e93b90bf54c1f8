"""`--download`: a model of a hub into huggingface_hub's cache, every byte of it checked."""

from __future__ import annotations

import hashlib
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fd_dsa.errors import ConfigError, describe_error
from fd_dsa.models.registry import read_config
from fd_dsa.startup.memory import format_bytes

logger = logging.getLogger("fd_dsa.serve")

# what a folder needs to be served; not the same weights in other formats
_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "encoding/*.py"]
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 10.0
AGAIN = "the same command goes on with the files that are missing"


def download(name: str, *, any_family: bool = False, allow_unknown: bool = False) -> Path:
    """The folder of a model of the hub that HF_ENDPOINT names, downloaded as far as it is missing.

    huggingface_hub goes on with a file whose connection broke (before 1.0 in the next command), and
    keeps the complete files of an interrupted one. config.json comes first, so that a model that
    cannot be served costs nothing; without a network an earlier download serves.

    Args:
        any_family: download models that this engine does not serve, too.
        allow_unknown: as of `read_config`.

    Raises:
        ConfigError: no such model, no access, no network, no space, a file that is not what the hub
            says, or a family that is not served.
    """
    from huggingface_hub import snapshot_download

    from fd_dsa.serve.hub_answers import check_hub_answers

    check_hub_answers()
    for client in ("httpx", "httpx2"):
        # a line for each request, beside the bars
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json"]))
        if not any_family:
            read_config(folder, allow_unknown=allow_unknown)
        _check_space(name)
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--download: {name}: {_reason(error)}") from error
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _check_file(path)
    logger.info("%s is in %s", name, folder)
    return folder


def _check_space(name: str) -> None:
    """Refuse a download that the disk of the cache has no room for."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")
    # parts of files are among them
    there = sum(path.stat().st_size for path in blobs.iterdir())
    try:
        files = HfApi().model_info(name, files_metadata=True, timeout=_TIMEOUT_S).siblings or []
    except ConfigError:
        raise
    except Exception:
        # an earlier download may serve, or the next one says why not
        logger.debug("the hub lists no files", exc_info=True)
        return
    wanted = [file for file in files if any(fnmatch(file.rfilename, one) for one in _PATTERNS)]
    needed, free = sum(file.size or 0 for file in wanted) - there, shutil.disk_usage(blobs).free
    if needed > free:
        raise ConfigError(
            f"--download: {name}: needs {format_bytes(needed)} more in {blobs}, which has "
            f"{format_bytes(free)} free; make room, or set HF_HOME to a folder on another disk"
        )


def _check_file(path: Path) -> None:
    """Compare a file of the cache with its name there: a SHA-256, or git's SHA-1 of small files.

    A disk without symbolic links holds files under their own names, so they have no hash there.
    """
    if not path.is_symlink():
        return
    blob = path.resolve()
    expected = blob.name
    if len(expected) == 64:
        digest: Any = hashlib.sha256()
    elif len(expected) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    else:
        raise ConfigError(
            f"--download: {path}: the cache holds it as {expected!r:.80}, which is no hash to "
            "check its bytes by; remove the model's folder of the cache, then run the command again"
        )
    with blob.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        blob.unlink()
        path.unlink()
        raise ConfigError(
            f"--download: {path.name}: the hash of its bytes is {digest.hexdigest()}, the hub says "
            f"{expected}; the file is removed, run the command again"
        )


def _reason(error: Exception) -> str:
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return "the hub has no such model, or not for you; set HF_TOKEN where it asks for access"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{ENDPOINT} cannot be reached, and there is no earlier download; {AGAIN}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}; {AGAIN}"
    return f"{describe_error(error)}; {AGAIN}"
