"""Arrays that a foreign runner has filled for a step."""

from __future__ import annotations

from fd_dsa.attention.protocol import FilledStep
from fd_dsa.errors import MissingStepError
from fd_dsa.tensor import StepArray


def step_inputs(forward_meta: FilledStep) -> tuple[StepArray, ...]:
    """Return the four arrays of a step that the runner has filled.

    Raises:
        MissingStepError: an array is None, or the object does not have it.
    """
    missing: str | None = None
    try:
        inputs = {
            "seq_lens_encoder": forward_meta.seq_lens_encoder,
            "seq_lens_decoder": forward_meta.seq_lens_decoder,
            "seq_lens_this_time": forward_meta.seq_lens_this_time,
            "block_tables": forward_meta.block_tables,
        }
    except AttributeError as error:
        missing = error.name
    else:
        missing = next((name for name, value in inputs.items() if value is None), None)
        if missing is None:
            return tuple(inputs.values())
    raise MissingStepError(
        f"forward_meta.{missing} is None: the runner's initialize_forward_meta must fill it "
        "before init_attention_metadata"
    )
