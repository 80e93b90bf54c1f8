"""`--download`: fetches a model into huggingface_hub's cache and verifies its bytes."""

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

# files that serving needs, without the same weights in other formats
_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "encoding/*.py"]
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 10.0
AGAIN = "the same command continues with the missing files"


def download(name: str, *, any_family: bool = False, allow_unknown: bool = False) -> Path:
    """Download the missing files of a model from the hub and return its folder.

    HF_ENDPOINT names the hub. huggingface_hub resumes a file after a broken connection (before 1.0
    only in the next command), and keeps complete files of an interrupted download. config.json is
    fetched before the weights, so that an unsupported model costs no large download. Without a
    network an earlier download is used.

    Args:
        any_family: also download models that this engine does not serve.
        allow_unknown: see `read_config`.

    Raises:
        ConfigError: unknown model, no access, no network, no disk space, a file with a wrong hash,
            or an unsupported family.
    """
    from huggingface_hub import snapshot_download

    from fd_dsa.serve.hub_answers import check_hub_answers

    check_hub_answers()
    for client in ("httpx", "httpx2"):
        # httpx logs a line for each request, between the progress bars
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
    """Refuse a download that does not fit on the disk of the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")
    # partly downloaded files count too
    there = sum(path.stat().st_size for path in blobs.iterdir())
    try:
        files = HfApi().model_info(name, files_metadata=True, timeout=_TIMEOUT_S).siblings or []
    except ConfigError:
        raise
    except Exception:
        # an earlier download may be complete, otherwise the next request reports the error
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
    """Compare a cached file with the hash in its name.

    The hash is a SHA-256, or git's SHA-1 for small files.

    A disk without symbolic links stores files under their own names, so there is no hash to
    compare.
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
            f"--download: {path}: its name in the cache is {expected!r:.80}, which is no hash to "
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
