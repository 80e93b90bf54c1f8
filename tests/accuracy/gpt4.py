"""GPT-4's answers to the official prompts, and what they must score."""

from __future__ import annotations

from pathlib import Path

import orjson

FILE = Path(__file__).parent.parent / "data" / "ifeval" / "gpt4_responses.jsonl"

# prompt strict, instruction strict, prompt loose, instruction loose
PASSED = (417, 698, 430, 713)
# strict, loose, total
BY_TYPE = {
    "change_case:capital_word_frequency": (17, 19, 25),
    "change_case:english_capital": (19, 19, 25),
    "change_case:english_lowercase": (36, 37, 39),
    "combination:repeat_prompt": (26, 26, 41),
    "combination:two_responses": (22, 24, 24),
    "detectable_content:number_placeholders": (25, 25, 27),
    "detectable_content:postscript": (26, 26, 26),
    "detectable_format:constrained_response": (8, 8, 10),
    "detectable_format:json_format": (17, 17, 17),
    "detectable_format:multiple_sections": (13, 13, 14),
    "detectable_format:number_bullet_lists": (27, 27, 31),
    "detectable_format:number_highlighted_sections": (45, 45, 48),
    "detectable_format:title": (37, 37, 37),
    "keywords:existence": (38, 38, 39),
    "keywords:forbidden_words": (42, 44, 49),
    "keywords:frequency": (38, 39, 42),
    "keywords:letter_frequency": (21, 20, 33),
    "language:response_language": (30, 30, 31),
    "length_constraints:nth_paragraph_first_word": (9, 11, 12),
    "length_constraints:number_paragraphs": (23, 23, 27),
    "length_constraints:number_sentences": (35, 35, 52),
    "length_constraints:number_words": (37, 39, 52),
    "punctuation:no_comma": (44, 48, 66),
    "startend:end_checker": (22, 22, 26),
    "startend:quotation": (41, 41, 41),
}


def rows() -> list[dict[str, str]]:
    """Each line's prompt and response, in the order of the official prompts."""
    return [orjson.loads(line) for line in FILE.read_bytes().splitlines()]
