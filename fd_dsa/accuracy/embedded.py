"""A model of the embedded engine, run by hand: one sequence, chunk by chunk, every hidden state.

The engine gives logits of the tokens that it samples. What is measured here needs those of all
tokens, or what the layers did on the way, so the engine's runner is driven directly, by the same
steps that the engine would make of one request.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from fd_dsa.config import EngineConfig
from fd_dsa.environment import prepare_cpu_runtime
from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer
    from fd_dsa.models.config import ModelConfig


class OneSequence:
    """Runs one sequence on a runner that nobody else uses meanwhile.

    Args:
        runner: a ModelRunner; row 0 of its batch and all blocks of its caches are taken.

    Attributes:
        length: tokens in the cache.
        block_table: int32 [n]; physical block of each logical one.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        batch = runner.input_batch
        count = min(int(runner.caches[0].shape[0]), batch.block_tables.shape[1])
        self.block_table = np.arange(count, dtype=np.int32)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens for which there is room in the cache."""
        return len(self.block_table) * int(self.runner.input_batch.block_size)

    def restart(self) -> None:
        """Begin another sequence; what it does not write, it never reads."""
        self.length = 0

    def run(self, token_ids: Sequence[int], *, decode: bool = False) -> Any:
        """Run the next tokens of the sequence in one step.

        Args:
            token_ids: at least one, at most the runner's `max_num_tokens`.
            decode: they are a decode row, not a chunk of a prompt.

        Returns:
            float32 [n, hidden_size] where the model runs: an array on a CPU, else a tensor.

        Raises:
            CapacityError: more tokens than a step takes.
            ValueError: more tokens than the caches have room for, or none.
        """
        import paddle

        runner, batch = self.runner, self.runner.input_batch
        end = self.length + len(token_ids)
        if end > self.capacity:
            raise ValueError(f"token_ids: {end} tokens, the caches have room for {self.capacity}")
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
        """Run a prompt, at most `max_num_tokens` tokens a step: their offset and hidden states."""
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
    """A loaded model.

    Attributes:
        sequence: runs tokens on it.
        tokenizer: of its folder.
        model_config: as read, `index_topk` as asked for.
        engine_config: with which it was opened.
        max_model_len: longest sequence, tokens.
    """

    sequence: OneSequence
    tokenizer: Tokenizer
    model_config: ModelConfig
    engine_config: EngineConfig
    max_model_len: int

    @property
    def device(self) -> str:
        """Where the model runs, such as "cpu" or "gpu:0"."""
        from fd_dsa.runner.device import resolve_device

        return resolve_device(self.engine_config.device)


def read_config(model: str | os.PathLike[str] | None, index_topk: int | None = None) -> ModelConfig:
    """What config.json says of a model, before anything of it is loaded.

    Args:
        model, index_topk: as of `open_model`.

    Raises:
        ConfigError: the folder or its config.json cannot be served, or `index_topk` is below 1.
    """
    if index_topk is not None and index_topk < 1:
        raise ConfigError(f"--index-topk: got {index_topk}, allowed: a number of keys, at least 1")
    folder = EngineConfig(model=model).model_path
    prepare_cpu_runtime()
    from fd_dsa.models.config import ModelConfig

    # first as it is: what is wrong with the folder is told of the folder
    config = ModelConfig.from_folder(folder)
    if index_topk is None:
        return config
    with _folder_with(folder, index_topk) as changed:
        return ModelConfig.from_folder(changed)


def open_model(
    model: str | os.PathLike[str] | None = None,
    *,
    index_topk: int | None = None,
    max_model_len: int | None = None,
    **engine_config: Any,
) -> OpenModel:
    """Load a model for one sequence at a time.

    Args:
        model: folder of a checkpoint; None is the demo model.
        index_topk: keys that the indexer chooses, in the place of the model's own number; as many
            as the context has tokens make attention dense.
        max_model_len: longest sequence, tokens; None is the model's own limit.
        engine_config: further fields of EngineConfig, such as `device` or `kv_cache_dtype`.

    Raises:
        ConfigError: a field, the folder or its checkpoint cannot be served.
        BackendUnavailable: Paddle is missing, or has no such device.
    """
    config = read_config(model, index_topk)
    asked = EngineConfig(model=model, max_model_len=max_model_len, **engine_config)
    length = asked.resolve_max_model_len(config.max_position_embeddings)
    from fd_dsa.engine.factory import build_engine

    with _folder_with(asked.model_path, index_topk) as folder:
        fields = {
            **engine_config,
            "model": folder,
            "max_model_len": length,
            "max_num_seqs": 1,
            "num_gpu_blocks_override": -(-length // asked.block_size),
        }
        engine = build_engine(EngineConfig(**fields))
    return OpenModel(OneSequence(engine.runner), engine.tokenizer, config, asked, length)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; gives the function that moves it on by one."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def _folder_with(folder: Path, index_topk: int | None) -> Iterator[Path]:
    """The folder, or one of links to its files whose config.json has another `index_topk`."""
    if index_topk is None:
        yield folder
        return
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="fd_dsa_") as name:
        changed = Path(name)
        for file in folder.iterdir():
            if file.name != "config.json":
                (changed / file.name).symlink_to(file)
        fields["index_topk"] = index_topk
        (changed / "config.json").write_text(json.dumps(fields), "utf-8")
        yield changed
