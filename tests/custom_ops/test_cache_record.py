"""The records of fp8_ds_mla caches: C++ and Python have one definition."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from fd_dsa import cache_formats
from tests.custom_ops.building import SOURCES, compiler

HEADER = SOURCES / "csrc" / "cache_record.h"
IN_PYTHON = {
    "kRank": cache_formats.LATENT_WIDTH,
    "kRope": cache_formats.ROPE_WIDTH,
    "kScaled": cache_formats.TILE_WIDTH,
    "kWidth": cache_formats.LATENT_WIDTH + cache_formats.ROPE_WIDTH,
    "kScalesAt": cache_formats.LATENT_SCALES_AT,
    "kRopeAt": cache_formats.LATENT_ROPE_AT,
    "kRecord": cache_formats.LATENT_RECORD_BYTES,
    "kIndexWidth": cache_formats.INDEX_WIDTH,
    "kIndexRecord": cache_formats.INDEX_RECORD_BYTES,
}


def test_all_constants_of_the_header_are_those_of_python(tmp_path: Path) -> None:
    declarations = re.findall(r"^constexpr int (.*?);", HEADER.read_text(), re.MULTILINE)
    names = re.findall(r"\b(k\w+) = ", ", ".join(declarations))
    prints = "".join(f'  std::printf("%d\\n", fd_dsa::{name});\n' for name in names)
    source = tmp_path / "constants.cc"
    source.write_text(f'#include <cstdio>\n#include "{HEADER}"\nint main() {{\n{prints}}}\n')
    program = tmp_path / "constants"
    subprocess.run([compiler(), "-std=c++17", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert dict(zip(names, map(int, lines.split()), strict=True)) == IN_PYTHON
