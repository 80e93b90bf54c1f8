"""A model of the embedded engine, driven by hand: one sequence in chunks, every hidden state.

The engine gives logits of the tokens that it samples. What is measured here needs those of all
tokens, or what the layers did on the way, so the engine's runner is driven directly, by the same
steps that the engine would make of one request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.config import EngineConfig
from fd_dsa.environment import prepare_cpu_runtime
from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer
    from fd_dsa.models.config import ModelConfig


class OneSequence:
    """Runs one sequence on a ModelRunner that nobody else uses meanwhile.

    Row 0 of its batch and all blocks of its caches are taken.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        batch = runner.input_batch
        count = min(int(runner.caches[0].shape[0]), batch.block_tables.shape[1])
        self.block_table = np.arange(count, dtype=np.int32)
        self.length = 0

    def run(self, token_ids: Sequence[int], *, decode: bool = False) -> Any:
        """Run the next tokens of the sequence in one step, as a chunk of a prompt or a decode row.

        Returns:
            float32 [n, hidden_size] where the model runs: an array on a CPU, else a tensor.
        """
        import paddle

        runner, batch = self.runner, self.runner.input_batch
        end, room = self.length + len(token_ids), len(self.block_table) * int(batch.block_size)
        if end > room:
            raise ValueError(f"token_ids: {end} tokens, the caches have room for {room}")
        batch.begin_step()
        batch.set_blocks(0, self.block_table)
        batch.add_row(0, token_ids, self.length, is_prefill=not decode)
        with paddle.no_grad():
            runner.initialize_forward_meta()
            meta = runner.forward_meta
            hidden = runner.model(meta.ids_remove_padding, meta)
        self.length = end
        return hidden

    def chunks(self, token_ids: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Begin a sequence by a prompt, at most `max_num_tokens` tokens a step.

        What a sequence does not write, it never reads.

        Yields:
            The offset of the step's tokens, and their hidden states.
        """
        self.length = 0
        size = int(self.runner.input_batch.max_num_tokens)
        for start in range(0, len(token_ids), size):
            yield start, self.run(token_ids[start : start + size])

    def logits(self, hidden: Any) -> np.ndarray:
        """float32 [n, vocab_size] of hidden states [n, hidden_size] that `run` gave."""
        import paddle

        with paddle.no_grad():
            logits = self.runner.model.compute_logits(hidden)
        return logits if isinstance(logits, np.ndarray) else logits.numpy()


@dataclass(frozen=True)
class OpenModel:
    """A loaded model; `model_config` has `index_topk` as asked for, `engine_config` real types."""

    sequence: OneSequence
    tokenizer: Tokenizer
    model_config: ModelConfig
    engine_config: EngineConfig
    max_model_len: int

    @property
    def device(self) -> str:
        return self.engine_config.device


def read_config(model: str | os.PathLike[str] | None, index_topk: int | None = None) -> ModelConfig:
    """What config.json says of a model, before anything of it is loaded."""
    asked = EngineConfig(model=model, index_topk=index_topk)
    prepare_cpu_runtime()
    from fd_dsa.models import registry
    from fd_dsa.models.config import ModelConfig

    config = registry.read_config(asked.model_path)
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{asked.model_path / 'config.json'}: model_type: got {config.model_type!r}; must be a "
            "family with the layers of DeepSeek-V3.2, whose attention these commands measure"
        )
    return config if index_topk is None else replace(config, index_topk=index_topk)


def open_model(
    model: str | os.PathLike[str] | None = None,
    *,
    index_topk: int | None = None,
    max_model_len: int | None = None,
    **engine_config: Any,
) -> OpenModel:
    """Load a model for one sequence at a time; None is the demo model, or the model's own number.

    `index_topk` is the keys that the indexer chooses: as many as the context make attention dense.
    """
    config = read_config(model, index_topk)
    fields = {"model": model, "index_topk": index_topk, "max_num_seqs": 1, **engine_config}
    asked = EngineConfig(max_model_len=max_model_len, **fields)
    length = asked.resolve_max_model_len(config.max_position_embeddings)
    from fd_dsa.device.resolve import resolve_device
    from fd_dsa.startup.build import build_engine

    blocks = -(-length // asked.block_size)
    engine = build_engine(replace(asked, max_model_len=length, num_gpu_blocks_override=blocks))
    here = asked.on_device(resolve_device(asked.device))
    return OpenModel(OneSequence(engine.runner), engine.tokenizer, config, here, length)
