"""Configuration of speculative decoding: `--speculative-config`, typed and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fd_dsa.errors import ConfigError, flag_error, nearest_name, unique_object


@dataclass(frozen=True)
class SpeculativeConfig:
    """The method and number of drafts. Each field is a key of the flag's JSON.

    Attributes:
        method: "ngram" copies the tokens after an earlier occurrence of the last tokens. "mtp" uses
            the checkpoint's layer for multi-token prediction.
        num_speculative_tokens: maximum number of drafts of a request in a step, 1 to 3.
        prompt_lookup_max, prompt_lookup_min: maximum and minimum number of last tokens that must
            occur earlier, longer matches preferred. Only for ngram.
    """

    method: str
    num_speculative_tokens: int = 1
    prompt_lookup_max: int = 5
    prompt_lookup_min: int = 5

    @classmethod
    def read(cls, given: Mapping[str, Any] | str) -> SpeculativeConfig:
        """Parse a JSON text or its object. One bound of ngram sets both, as in vLLM.

        Raises:
            ConfigError: a key or value is not allowed.
        """
        name = "speculative_config"
        try:
            if isinstance(given, str):
                values = json.loads(given, object_pairs_hook=unique_object)
            else:
                values = dict(given)
            method = values.pop("method", None)
        except ConfigError as error:
            raise ConfigError(f"--speculative-config: {error}; give it once") from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            allowed = 'none or a JSON object, as {"method": "ngram"}'
            raise flag_error(name, given, allowed) from None
        known = [one.name for one in fields(cls)]
        if unknown := sorted(map(str, values.keys() - set(known))):
            near = nearest_name(unknown[0], known)
            hint = f"did you mean {near}?" if near else ""
            raise flag_error(name, unknown[0], f"the keys {', '.join(known)}", hint)
        if method not in ("mtp", "ngram"):
            raise flag_error(f"{name}.method", method, "mtp, ngram")
        for key, number in values.items():
            max_value = 3 if key == "num_speculative_tokens" else 32
            if max_value == 32 and method != "ngram":
                raise flag_error(f"{name}.{key}", number, "only with the method ngram")
            if type(number) is not int or not 1 <= number <= max_value:
                raise flag_error(f"{name}.{key}", number, f"an integer from 1 to {max_value}")
        longest = values.get("prompt_lookup_max", values.get("prompt_lookup_min", 5))
        shortest = values.get("prompt_lookup_min", longest)
        if shortest > longest:
            rule = f"at most prompt_lookup_max, {longest}"
            raise flag_error(f"{name}.prompt_lookup_min", shortest, rule)
        return cls(method, values.get("num_speculative_tokens", 1), longest, shortest)
