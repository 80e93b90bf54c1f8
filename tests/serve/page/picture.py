"""Makes docs/img/page.png, the picture of the page, and its record, page.json.

    python -m tests.serve.page.picture

The command serves the demo model, clicks the example with a number in a long text, and takes a
picture of the answer. page.json has a digest of the page's files and one of the picture;
tests/serve/test_page.py fails if either has changed, so a picture that is out of date is noticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fd_dsa.serve
from benchmarks._harness import parser_of

STATIC = Path(fd_dsa.serve.__file__).parent / "static"
PICTURE = Path(__file__).resolve().parents[3] / "docs" / "img" / "page.png"
RECORD = PICTURE.with_suffix(".json")
# a busy machine computes 2,000 tokens slowly
TIMEOUT_MS = 300_000


def digests() -> dict[str, str]:
    """SHA-256 of all files of the page, vendored ones included, and of the picture."""
    page = hashlib.sha256()
    for path in sorted(path for path in STATIC.rglob("*") if path.is_file()):
        content = path.read_bytes()
        page.update(f"{path.relative_to(STATIC).as_posix()} {len(content)}\n".encode() + content)
    return {"page": page.hexdigest(), "picture": hashlib.sha256(PICTURE.read_bytes()).hexdigest()}


def main() -> None:
    """Make the picture and its record."""
    # the test of the record needs neither a browser nor a model
    from playwright.sync_api import sync_playwright

    from fd_dsa.config import EngineConfig
    from fd_dsa.startup.build import build_engine
    from tests.engine.threaded import threaded
    from tests.serve.conftest import running
    from tests.serve.page.conftest import launched, opened

    engine = threaded(build_engine(EngineConfig(max_num_seqs=4)))
    with (
        sync_playwright() as playwright,
        launched(playwright) as browser,
        running(engine, names=("demo",)) as live,
        opened(browser, live, viewport={"width": 1100, "height": 980}, locale="en") as page,
    ):
        # the same text and the same figures each time
        page.evaluate("Math.random = () => 0")
        page.click("text=Find the number hidden in a long text")
        page.locator(".found.caption").wait_for(timeout=TIMEOUT_MS)
        page.evaluate("document.fonts.ready")
        page.screenshot(path=PICTURE)
    RECORD.write_text(json.dumps(digests(), indent=1) + "\n")
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    parser_of(__doc__).parse_args()
    main()
