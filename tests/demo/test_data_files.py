"""The text files from outside the repository, the evaluation file, and packing into rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from demo_training.config import ASSISTANT, BOS, EOS, PAD, USER
from demo_training.evalset import TASKS, prompt_of, read
from demo_training.rows import TRAINED, encode, pack
from demo_training.sources import DATA_FILES, Sources, changed_files
from demo_training.synth import check

from .samples import Bytes

EVALUATION = Path(__file__).resolve().parents[2] / "tools/demo_training/demo_eval.jsonl"


def test_missing_texts_are_named_with_their_origin(tmp_path):
    for file in DATA_FILES[1:]:
        (tmp_path / file.name).write_text("{}")
    with pytest.raises(FileNotFoundError) as error:
        Sources.load(tmp_path)
    assert DATA_FILES[0].name in str(error.value)
    assert DATA_FILES[0].origin in str(error.value)
    assert DATA_FILES[1].name not in str(error.value)


def test_texts_are_read_from_a_folder(tmp_path):
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    task = {"instruction": "Greet.", "instances": [{"input": "", "output": "Hello."}]}
    texts = ['{"question": "q", "answer": "a"}\n', json.dumps([record]), json.dumps(task)]
    for file, text in zip(DATA_FILES, [*texts, "The  tale of one\tfox. " * 9, "PLAY"], strict=True):
        (tmp_path / file.name).write_text(text)
    found = Sources.load(tmp_path)
    assert found.problems == [("q", "a")]
    assert found.instructions == [("Add.\n1 and 2", "3"), ("Greet.", "Hello.")]
    assert found.tales.startswith("The tale of one fox.")
    assert changed_files(tmp_path) == [f.name for f in DATA_FILES]


def test_the_evaluation_file_is_complete_and_small():
    retrieval, chat = read(EVALUATION)
    assert EVALUATION.stat().st_size <= 600_000
    lengths = [x["length"] for x in retrieval if "task" not in x]
    assert Counter(lengths) == dict.fromkeys((256, 512, 1024, 2048, 3072, 4000, 6000, 8000), 40)
    for task in TASKS:
        lengths = [x["length"] for x in retrieval if x.get("task") == task]
        assert Counter(lengths) == dict.fromkeys((257, 1024, 4000, 8000), 10)
    groups = {x["group"] for x in chat}
    assert groups >= {"fact", "reading", "unknown", "talk", "arithmetic", "memory", "copying"}
    assert len({x["id"] for x in (*retrieval, *chat)}) == len(retrieval) + len(chat)


def test_known_answers_of_the_evaluation_file_pass_their_checks():
    retrieval, chat = read(EVALUATION)
    for item in chat:
        assert item["messages"][-1]["role"] == "user"
        assert bool(item["checks"]) == (item["group"] != "sample")
        for kind, arg in item["checks"]:
            assert check(kind, arg, item["answer"]), item
    for item in retrieval:
        assert item["value"] in item["answer"]
        places = [item["prompt"].find(sentence) for _, sentence in item["needles"]]
        assert min(places, default=0) >= 0
        if item.get("task"):
            assert places == sorted(places)  # the text has a chain in its order
        assert item["prompt"].endswith(item["question"])


def test_needles_go_in_at_their_offsets():
    item = {"haystack": "h", "start": 1, "end": 9, "intro": "I. ", "question": "Q?"}
    item["needles"] = [[3, "N1."], [0, "N2."]]
    assert prompt_of(item, {"h": "xab cd ef."}) == "I. N2. ab N1. cd ef\n\nQ?"


def test_only_answers_and_passages_are_trained_on():
    ids = encode(Bytes(), [("user", "ab"), ("assistant", "c")])
    assert ids[0] == BOS
    assert [t & (TRAINED - 1) for t in (ids[1], ids[4], ids[-1])] == [USER, ASSISTANT, EOS]
    assert [t >= TRAINED for t in ids] == [False] * 5 + [True, True]
    assert all(t >= TRAINED for t in encode(Bytes(), [("raw", "abc")])[1:])


def test_rows_hold_whole_documents():
    chance = random.Random(5)

    def draw():
        return [BOS, *[chance.randint(6, 90)] * chance.randint(0, 39)]

    rows = pack(draw, 64, 50)
    assert rows.shape == (50, 64)
    for row in rows:
        starts = np.flatnonzero(row == BOS)
        assert row[0] == BOS
        for piece in np.split(row, starts[1:]):
            body = piece[1:][piece[1:] != PAD]
            assert len(set(body.tolist())) <= 1  # one document: one value
    assert (rows == PAD).mean() < 0.2


def test_documents_longer_than_a_row_are_left_out():
    lengths = iter([100, 10, 100] + [60] * 20)
    rows = pack(lambda: [BOS] * next(lengths), 64, 3)
    assert (rows != PAD).sum(1).tolist() == [60, 60, 60]
