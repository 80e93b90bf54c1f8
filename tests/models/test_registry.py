"""Entries of the registry name what the other rooms have."""

from __future__ import annotations

from typing import Any

import pytest

from fd_dsa.accuracy.embedded import read_config
from fd_dsa.chat.parser import TOOL_FORMATS
from fd_dsa.engine.caches import caches_class
from fd_dsa.errors import ConfigError
from fd_dsa.models.registry import FAMILIES, config_from_dict
from tests.v4_model.cases import CASES

# fields without a default
REQUIRED: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128]}
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_caches_and_chat_formats(name: str) -> None:
    config = config_from_dict({"model_type": name, **REQUIRED.get(name, {})})
    assert config.model_type == name
    assert config.vocab_size == FAMILIES[name].defaults.vocab_size
    assert caches_class(config) is not None
    assert config.cache_layout("float32", 128).block_size == 128
    formats = FAMILIES[name].chat_formats
    assert formats and set(formats) <= TOOL_FORMATS.keys()


def test_measurements_refuse_other_attention(tmp_path: Any) -> None:
    folder = CASES["mixed"].write(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: model_type: got 'deepseek_v4'; must be"):
        read_config(folder)
