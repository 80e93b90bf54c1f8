"""Errors of fp8_ds_mla caches, against float32 caches of the same model and texts.

    python -m benchmarks.fp8_error             # about ten minutes on 2 cores

Prints and writes benchmarks/results/accuracy/fp8_cache.json, from which `benchmarks.report` makes
the tables of docs/concepts/fp8-cache.md:

- of each layer, given the same inputs: how many of the selected keys are the same, and how far the
  attention output is off, with the same selection and with its own;
- of the whole model: how far its logits are off, and how often the likeliest token is another;
- greedy answers to retrieval questions, right or wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, ROOT, environment, write_json
from benchmarks.report import region
from fd_dsa import LLM, SamplingParams
from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig
from fd_dsa.config import EngineConfig
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.ops.query import prepare_on_host
from fd_dsa.startup.build import build_engine
from tools.demo_training.evalset import read

RESULT = RESULTS / "accuracy" / "fp8_cache.json"
EVALUATION = ROOT / "tools" / "demo_training" / "demo_eval.jsonl"
FORMATS = "float32", "fp8_ds_mla"
CHUNK = 512
# about tokens of a text -> texts of it
LAYER_TEXTS = {1024: 3, 2048: 3, 3072: 2}
QUESTIONS = {512: 20, 1024: 20, 2048: 10, 3072: 5}


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Return the squared difference and the squared reference, which are added up."""
    difference = found.astype(np.float64) - wanted
    return float((difference**2).sum()), float((wanted.astype(np.float64) ** 2).sum())


class Shadowed(DSAAttentionBackend):
    """A float32 backend beside which another format gets the same inputs layer by layer.

    Args:
        config: configuration with float32 caches.
        layout: the other format.
        indexer_layers: for each layer whether it has an indexer.
    """

    def __init__(
        self, config: DSABackendConfig, layout: CacheLayout, indexer_layers: list[bool]
    ) -> None:
        super().__init__(config)
        self.other = DSAAttentionBackend(replace(config, cache_layout=layout))
        self.other_caches = self.other.allocate_caches(indexer_layers)
        layers = len(indexer_layers)
        self.shared, self.chosen = np.zeros(layers), np.zeros(layers)
        # [layer, same or own selection, difference or reference]
        self.errors = np.zeros((layers, 2, 2))
        self._shadow: Any = None
        self._selections: tuple[Any, Any] = (None, None)

    def build_step(self, forward_meta: Any, *known: Any) -> None:
        """Build the step of both backends."""
        super().build_step(forward_meta, *known)
        self._shadow = replace(
            forward_meta, caches=self.other_caches, attn_backend=self.other, fd_dsa_step=None
        )
        self.other.build_step(self._shadow, *known)

    def write(self, *args: Any) -> None:
        """Write into both caches."""
        super().write(*args)
        self.other.write(*args[:-1], self._shadow)

    def select(self, q: Any, weights: Any, layer_id: int, forward_meta: Any) -> Any:
        """Return the float32 selection, and count the shared part of the other selection."""
        layout = self.other.config.cache_layout
        # rotated already: a table of angles 0 leaves q as it is
        still = np.zeros((1, 2 * (q.shape[2] // 2)), np.float32)
        still[:, : q.shape[2] // 2] = 1.0
        other_q, other_weights = prepare_on_host(
            as_numpy(q).copy(),
            weights,
            np.zeros(len(q), np.int64),
            still,
            rope_interleave=False,
            quantized=layout.is_fp8,
            hadamard=layout.index_hadamard,
            scale_fmt=layout.index_scale_fmt,
        )
        theirs = self.other.select(other_q, other_weights, layer_id, self._shadow)
        ours = super().select(q, weights, layer_id, forward_meta)
        self._selections = ours, theirs
        positions = as_numpy(forward_meta.position_ids)
        for row in np.flatnonzero(positions >= self.config.index_topk):
            self.shared[layer_id] += len(np.intersect1d(as_numpy(ours)[row], as_numpy(theirs)[row]))
            self.chosen[layer_id] += self.config.index_topk
        return ours

    def attend(self, q: Any, selection: Any, layer_id: int, forward_meta: Any) -> Any:
        """Return the float32 output, and add up the error of the other output."""
        result = super().attend(q, selection, layer_id, forward_meta)
        out = as_numpy(result)
        for i, slots in enumerate(self._selections):
            found = as_numpy(self.other.attend(q, slots, layer_id, self._shadow))
            self.errors[layer_id, i] += relative_l2(found, out)
        return result


def prompts(lengths: dict[int, int]) -> list[dict[str, Any]]:
    """Return retrieval items of the evaluation file, the first ones of each length."""
    items, _ = read(EVALUATION)
    drawn = {length: [x for x in items if x["length"] == length] for length in lengths}
    return [item for length, count in lengths.items() for item in drawn[length][:count]]


def chat(item: dict[str, Any]) -> list[dict[str, str]]:
    """Return the messages of an item."""
    return [{"role": "user", "content": item["prompt"]}]


def logits_of(engine: Any, ids: list[int]) -> np.ndarray:
    """Return float32 [len(ids), vocab_size], in chunks of `CHUNK`."""
    runner, found = engine.runner, []
    batch = runner.input_batch
    batch.set_blocks(0, list(range(-(-len(ids) // batch.block_size))))
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        batch.begin_step()
        batch.add_row(0, part, start, True)
        found.append(runner.execute_model(np.arange(len(part))).copy())
    return np.concatenate(found)


def layers_and_logits() -> dict[str, Any]:
    """Return errors layer by layer with the same inputs, and of the logits of a whole run."""
    exact, fp8 = (
        build_engine(EngineConfig(kv_cache_dtype=name, max_num_seqs=1, speculative_config="none"))
        for name in FORMATS
    )
    config = exact.runner.model.config
    layout = fp8.runner.attn_backends[0].config.cache_layout
    has_indexer = [kind == "full" for kind in config.indexer_types]
    shadowed = Shadowed(exact.runner.attn_backends[0].config, layout, has_indexer)
    exact.runner.attn_backends[0] = shadowed
    template = exact.tokenizer.apply_chat_template
    texts = [template(chat(item)) for item in prompts(LAYER_TEXTS)]
    error, same, total = np.zeros(2), 0, 0
    for ids in texts:
        wanted, found = logits_of(exact, ids), logits_of(fp8, ids)
        error += relative_l2(found, wanted)
        same += int((found.argmax(1) == wanted.argmax(1)).sum())
        total += len(ids)
        print(f"text of {len(ids)} tokens done", flush=True)
    errors = np.sqrt(shadowed.errors[..., 0] / shadowed.errors[..., 1])
    return {
        "texts": [len(ids) for ids in texts],
        "index_topk": config.index_topk,
        "layers": [
            {
                "layer": layer,
                "recall": shadowed.shared[layer] / shadowed.chosen[layer],
                "output_error_same_selection": errors[layer, 0],
                "output_error": errors[layer, 1],
            }
            for layer in range(config.num_hidden_layers)
        ],
        "logits_error": float(np.sqrt(error[0] / error[1])),
        "same_likeliest_token": same / total,
        "bytes_per_token": {
            name: engine.runner.attn_backends[0].config.cache_layout.bytes_per_block(
                config.num_hidden_layers, config.num_indexer_layers
            )
            // layout.block_size
            for name, engine in zip(FORMATS, (exact, fp8), strict=True)
        },
    }


def retrieval() -> list[dict[str, Any]]:
    """Return right greedy answers by length and format, and the number of equal answers."""
    answers: dict[str, list[str]] = {}
    items = prompts(QUESTIONS)
    for name in FORMATS:
        llm = LLM(kv_cache_dtype=name, max_num_seqs=1, speculative_config="none")
        outputs = llm.chat(list(map(chat, items)), SamplingParams(temperature=0.0, max_tokens=40))
        answers[name] = [output.text.strip() for output in outputs]
        print(f"answers with {name} done", flush=True)
    rows = []
    for length in QUESTIONS:
        index = [i for i, item in enumerate(items) if item["length"] == length]
        right = {k: sum(x[i] == items[i]["answer"] for i in index) for k, x in answers.items()}
        same = sum(len({x[i] for x in answers.values()}) == 1 for i in index)
        rows.append({"length": length, "items": len(index), "right": right, "same": same})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write the result. Returns 0."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    measured = layers_and_logits() | {"retrieval": retrieval()}
    write_json(RESULT, {"name": "fp8_cache", "env": environment()} | measured)
    print(region("fp8_cache"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
