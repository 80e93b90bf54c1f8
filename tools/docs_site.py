"""Build the documentation site in build/docs, from the pages as they are in the repository.

    python tools/docs_site.py

zensical reads build/pages (zensical.toml). Its search splits Chinese sentences into words only for
a Chinese site, because the search has only the language of the theme. So the finished index gets
Chinese as a second language. The browser then splits Chinese words by `Intl.Segmenter`, in the
pages and in the query, and English words as before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHINESE = "zh"


def lay_out(folder: Path) -> Path:
    """Copy the pages below `folder`, so that links between them are those of the repository.

    Returns:
        The folder of the pages.
    """
    pages = folder / "build/pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages / "docs")
    for path in [*ROOT.glob("*.md"), ROOT / "LICENSE"]:
        shutil.copy(path, pages)
    return pages


def build(folder: Path) -> bool:
    """Build the site of `folder`, which has zensical.toml and the pages.

    Returns:
        True if the builder has found no broken link and no other mistake.
    """
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=folder).returncode:
        return False
    mark_chinese(folder / "build/docs")
    return True


def mark_chinese(site: Path) -> None:
    """Add Chinese to the languages of the search, and name it in the Chinese pages.

    Raises:
        KeyError, ValueError: the builder has written another form of index or page.
    """
    path = site / "search.json"
    index = json.loads(path.read_text("utf-8"))
    index["config"]["lang"].append(CHINESE)
    path.write_text(json.dumps(index, ensure_ascii=False), "utf-8")
    for page in site.rglob("*.zh.html"):
        before, tag, after = page.read_text("utf-8").partition('<html lang="en"')
        if not tag:
            raise ValueError(f'{page}: no <html lang="en">')
        page.write_text(f'{before}<html lang="zh-CN"{after}', "utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    lay_out(ROOT)
    sys.exit(0 if build(ROOT) else 1)
