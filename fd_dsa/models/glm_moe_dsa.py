"""GLM-5 family: DeepSeek-V3.2's decoder with other sizes and shared selections.

What differs is data, not code (docs/concepts/dsa.md, "What GLM-5 does otherwise"): the indexer's
RoPE is interleaved, RoPE has no YaRN, experts have no groups, and with IndexShare a layer of type
"shared" has no indexer and attends to the selection of the nearest "full" layer before it.
`ModelConfig` carries all of that.
"""

from __future__ import annotations

from fd_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM


class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    """GLM-5, GLM-5.1 and GLM-5.2."""
