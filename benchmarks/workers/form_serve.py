"""`python -m fd_dsa.serve` in a form that the package does not have, by the same flags.

FD_DSA_FORM is "once", or "every layer": each layer but the first makes the metadata of the step
again and reads what it made, as engines did before PaddlePaddle/FastDeploy #7367. FD_DSA_RIG serves
on the device of the test plug-in. The engine's process is this module again.
"""

from __future__ import annotations

import os
import sys
from dataclasses import astuple
from functools import cache
from typing import Any

from benchmarks.workers.rig_serve import ENGINE, load_device, serve

FORMS = ("once", "every layer")
STEP_INPUTS = "seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables"


def read_again_in_every_layer() -> None:
    """Change the backend: `write`, the first call of a layer, makes what the layer then reads."""
    from fd_dsa.attention.backend import DSAAttentionBackend
    from fd_dsa.step import StepHints, StepMetadataBuilder

    write = DSAAttentionBackend.write

    @cache
    def another(builder: StepMetadataBuilder) -> StepMetadataBuilder:
        return StepMetadataBuilder(*astuple(builder.limits), device=builder.device)

    def build_and_write(self: Any, *keys_and_layer: Any) -> None:
        layer, step = keys_and_layer[-2:]
        if layer.layer_id:
            meta = step.fd_dsa_step
            arrays = tuple(getattr(meta, name) for name in STEP_INPUTS)
            num_tokens = meta.num_prefill_tokens + meta.num_decode_tokens
            hints = StepHints(
                num_tokens, meta.num_prefill_tokens, meta.max_seqlen_k, meta.position_ids.shape[0]
            )
            self.attention_metadata = another(self.builder).build_from(arrays, hints)
        write(self, *keys_and_layer)

    DSAAttentionBackend.write = build_and_write  # type: ignore[method-assign, assignment]


def main() -> Any:
    """Serve, or run the engine of a server. Returns the exit status."""
    on_rig = "FD_DSA_RIG" in os.environ
    if sys.argv[1:2] != [ENGINE]:
        return serve("benchmarks.workers.form_serve", sys.argv[1:], on_rig=on_rig)
    if on_rig:
        load_device()
    if os.environ["FD_DSA_FORM"] == "every layer":
        read_again_in_every_layer()
    from fd_dsa.serve import engine_child

    del sys.argv[1]
    return engine_child.main()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
