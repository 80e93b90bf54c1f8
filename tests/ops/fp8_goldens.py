"""The goldens of tests/data/fp8_caches, as an operator takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import CacheWriteParams

FOLDER = Path(__file__).resolve().parents[1] / "data/fp8_caches"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
UNTOUCHED = 0xA5


@dataclass(frozen=True)
class Golden:
    """Arrays and options of one file, by name."""

    arrays: dict[str, np.ndarray]
    options: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> Golden:
        """The golden of a case."""
        with np.load(FOLDER / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        words = {"True": True, "False": False, "None": None}
        texts = {k: str(arrays.pop(k)) for k in list(arrays) if arrays[k].dtype.kind == "U"}
        options = {k: words.get(v, v) for k, v in texts.items()}
        for key in ("kv_norm_eps", "k_norm_eps"):
            options[key] = float(options[key])
        return cls(arrays, options)

    def params(self) -> CacheWriteParams:
        """Return the parameters that write the keys of this case."""
        given, arrays = self.options, self.arrays
        norms = {}
        if not given["ready"]:
            norms = {n: arrays[n] for n in ("kv_norm_weight", "k_norm_weight", "k_norm_bias")}
        return CacheWriteParams(
            "fp8_ds_mla",
            kv_norm_eps=given["kv_norm_eps"],
            k_norm_eps=given["k_norm_eps"],
            index_rope_interleave=given["interleave"],
            index_hadamard=given["hadamard"],
            index_scale_fmt=given["scale_fmt"],
            **norms,
        )

    def write_arguments(self) -> dict[str, Any]:
        """Arguments of `write_caches`, on new caches."""
        names = ("kv_a", "index_k", "position_ids", "slot_mapping", "cos_sin_cache")
        given = {name: self.arrays[name] for name in names}
        if self.options["ready"]:
            given |= {"position_ids": None, "cos_sin_cache": None}
        for name in ("latent_cache", "index_cache"):
            given[name] = np.full(self.arrays[name].shape, UNTOUCHED, np.uint8)
        return given | {"params": self.params()}

    def query_arguments(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Return the arguments of `prepare_indexer_query`, which overwrites the first on a CPU."""
        names = ("q", "weights", "position_ids", "cos_sin_cache")
        return [self.arrays[name].copy() for name in names], {
            "rope_interleave": self.options["interleave"],
            "quantized": True,
            "hadamard": self.options["hadamard"],
            "scale_fmt": self.options["scale_fmt"],
            "weights_scale": float(self.arrays["weights_scale"]),
        }
