"""How the V4 expansion is cut into programs: device time of each choice in a graph.

python -m benchmarks.v4_tiles           # what fd_dsa/v4_prepare/launch.py's numbers came from
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks import _gpu, _torch_device
from benchmarks._v4_steps import Decode, Size, config_of
from benchmarks.v4_prepare import Launches, least_bytes
from fd_dsa.v4_prepare import V4PrepareConfig
from fd_dsa.v4_prepare.launch import ExpandTiles, tiles_for

SIZES = (Size(1, 8192, 1), Size(32, 8192, 3), Size(128, 8192, 1), Size(256, 131072, 3))
CHOSEN = "chosen"
# each is tried with the others as chosen
TRIED = {
    "num_warps": (1, 2, 4, 8),
    "hca_tile": (128, 256, 512, 1024, 2048),
    "window_rows": (1, 2, 4),
    "hca_group": (1, 2, 4),
    "row_tile": (32, 64, 128, 256, 512),
}


def candidates(config: V4PrepareConfig) -> Iterator[tuple[str, ExpandTiles]]:
    """The cut that the package chooses, and cuts that differ from it in one number."""
    chosen = tiles_for(config)
    yield CHOSEN, chosen
    entries, tokens = config.max_model_len // config.hca_ratio, config.max_tokens_per_seq
    for name, values in TRIED.items():
        for value in values:
            tiles = replace(chosen, **{name: value})
            # tiles of one shape get one layout, and that of the rows does not fit unaligned lists
            if tiles == chosen or tiles.row_tile == tiles.hca_tile:
                continue
            # as many programs as there are rounds
            items = -(-entries // tiles.hca_tile) * -(-tokens // tiles.hca_group)
            windows = -(-tokens // tiles.window_rows)
            tiles = replace(tiles, hca_parts=min(items, 8), window_parts=windows)
            yield f"{name} {value}", tiles


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all choices; returns 0."""
    args = _gpu.arguments(__doc__, argv)
    _torch_device.register()
    with _gpu.Recorder("v4_tiles", args.out) as record:
        for size in SIZES[1:3] if args.quick else SIZES:
            config = config_of(size.batch, size.drafts)
            decode = Decode(config, size.context)
            least = least_bytes(config, decode)
            count = min(8, _gpu.num_sets(least))
            sides = {
                label: Launches(config, decode, count, tiles).calls
                for label, tiles in candidates(config)
            }
            times = _gpu.interleaved(sides, mode="graph", rounds=15)
            best = sorted(times, key=lambda label: times[label]["p50"])[:3]
            record.case(size.label, times, ours=CHOSEN, bytes_moved=least, best=best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
