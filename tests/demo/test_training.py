"""The trainer on a tiny model: phases, gradients, export, parity with Hugging Face."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo_training.config import TINY

from .samples import Bytes

pytestmark = [
    pytest.mark.oracle,
    # torch and transformers announce changes of their own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: with more, the threads wait for each other longer than such small GEMMs take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(rows=4, length=64, seed=0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, TINY["vocab_size"], (rows, length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1), torch.ones(rows * length)


@pytest.fixture
def trainer():
    import torch
    from demo_training.model import DemoModel
    from demo_training.training import Settings, Trainer

    torch.manual_seed(0)
    return Trainer(Settings(seconds=60, warm_up=1), DemoModel(TINY), print)


def test_the_loss_falls_in_every_phase(trainer):
    before = float(trainer.step(batch(), "A", "short", 1.0)["loss"])
    for phase in ("A", "B", "C1", "C2"):
        for _ in range(6):
            seen = trainer.step(batch(), phase, "short", 1.0)
        assert float(seen["loss"]) < before, phase
        before = float(seen["loss"])


def test_the_indexer_learns_the_attention(trainer):
    first = float(trainer.step(batch(), "C1", "short", 0.0)["kl"])
    for _ in range(20):
        # the model stands still, the indexer moves
        seen = trainer.step(batch(), "C1", "short", 0.0)
    assert 0 < float(seen["kl"]) < first


def test_the_language_loss_does_not_reach_the_indexer_nor_the_kl_the_model(trainer):
    from demo_training.model import INDEXER, token_loss

    model = trainer.model
    ids, targets, weights = batch()
    out = model(ids, mode="sparse", topk=16)
    token_loss(out.hidden, model.norm, model.head, targets, weights).backward(retain_graph=True)
    assert all(layer[k].grad is None for layer in model.layers for k in INDEXER)
    for p in model.parameters():
        p.grad = None
    out.kl.backward()
    touched = {n.split(".")[-1] for n, p in model.named_parameters() if p.grad is not None}
    assert touched == set(INDEXER)


def test_selection_is_causal_and_exact():
    import torch
    from demo_training.attention import MASKED, select

    scores = torch.zeros(1, 8, 8)  # all tie: a threshold would keep every key
    i = torch.arange(8)
    scores = scores.masked_fill(i[None] > i[:, None], MASKED)
    keep = select(scores, 3)[0]
    assert keep.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    assert not keep.triu(1).any()


def test_rows_and_phases_follow_the_time():
    from demo_training.training import phase_at, rows_of

    shares = (40.0, 15.0, 10.0, 35.0)
    found = [phase_at(x, shares)[0] for x in (0.0, 0.39, 0.41, 0.6, 0.7, 1.0)]
    assert found == ["A", "A", "B", "C1", "C2", "C2"]
    assert phase_at(0.5, (0.0, 0.0, 0.0, 1.0)) == ("C2", 0.5)
    for through, each in ((0.1, 15), (0.9, 5)):
        kinds = [rows_of("C2", n, through) for n in range(60)]
        assert [kinds.count(k) for k in ("short", "long", "longest")] == [60 - 2 * each, each, each]


def test_a_run_cut_into_stages_goes_on_where_it_was(trainer, tmp_path):
    import torch
    from demo_training.model import DemoModel
    from demo_training.training import Settings, Trainer

    for n in range(3):
        trainer.step(batch(seed=n), "C2", "short", 1.0)
    trainer.tokens, trainer.spent = 777, 5.5
    trainer.save(tmp_path / "state.pt")
    torch.manual_seed(9)
    later = Trainer(Settings(seconds=60, warm_up=1), DemoModel(TINY), print)
    later.resume(tmp_path / "state.pt")
    assert (later.steps, later.tokens, later.spent) == (3, 777, 5.5)
    for n in range(3, 6):
        a, b = (t.step(batch(seed=n), "C2", "short", 0.5) for t in (trainer, later))
        assert torch.equal(a["loss"], b["loss"])
        assert torch.equal(a["kl"], b["kl"])
    for p, q in zip(trainer.model.parameters(), later.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_command_in_stages_trains_exports_and_evaluates(tmp_path, monkeypatch):
    """The dry configuration with prepared rows instead of data processes."""
    import json

    import numpy as np
    from demo_training import __main__ as tool
    from demo_training import config
    from demo_training.rows import KINDS, TRAINED, row_lengths

    out, shards = tmp_path / "out", tmp_path / "shards"
    words = Path(__file__).resolve().parents[2] / "fd_dsa/demo_model/tokenizer.json"
    out.mkdir()
    shards.mkdir()
    shutil.copy(words, out)
    small = TINY | {"vocab_size": 4096}
    monkeypatch.setitem(config.CONFIGS, "dry", small)

    def write_shards(*_):
        for kind in KINDS:
            rows = np.random.default_rng(1).integers(6, 4096, (40, row_lengths(128)[kind] + 1))
            np.save(shards / f"{kind}_0.npy", (rows | TRAINED).astype(np.uint16))
        return []

    monkeypatch.setattr(tool, "_start_workers", write_shards)
    items = tmp_path / "eval.jsonl"
    hay = {"kind": "haystack", "id": "h", "text": "It rains. It is cold."}
    item = {"kind": "retrieval", "id": "x", "length": 32, "haystack": "h", "start": 0, "end": 21}
    item |= {"needles": [], "intro": "", "question": "Is it warm?", "answer": "No.", "value": "No"}
    items.write_text(json.dumps(hay) + "\n" + json.dumps(item))
    command = f"all --data nowhere --out {out} --shards {shards} --device cpu --config dry"
    command += f" --minutes 0.03 --tokens 256 --evalset {items}"
    for stage in ("--stop-after 1.5", "--stop-after 60 --evaluation-seconds 99", ""):
        tool.main(f"{command} {stage}".split())
        left = (out / "model.safetensors").exists(), (out / "results.json").exists()
        assert left == {"": (True, True)}.get(stage, (stage.endswith("99"), False))
    assert "from step 0" not in (out / "train.log").read_text().splitlines()[-5]
    found = json.loads((out / "results.json").read_text())["retrieval"]
    assert found["top256"] in ({"32": 0.0}, {"32": 1.0})


def test_an_export_loads_in_hugging_face_with_the_same_logits(trainer, tmp_path):
    import torch
    from demo_training import checkpoint
    from demo_training.reports import parity

    torch.nn.init.normal_(trainer.model.bias, std=0.1)
    for layer in trainer.model.layers:
        for name in ("ln1", "ln2", "q_a_ln", "kv_a_ln", "k_w", "k_b"):
            torch.nn.init.normal_(layer[name], mean=1.0, std=0.2)
    for _ in range(3):
        trainer.step(batch(), "C2", "short", 1.0)
    checkpoint.save(trainer.model, tmp_path)
    rows = parity(str(tmp_path))
    assert all(r["same_argmax"] for r in rows)
    assert max(r["difference"] / r["largest_logit"] for r in rows) < 1e-4
    assert rows[-1]["dense_difference"] > 100 * rows[-1]["difference"]


def test_greedy_answers_and_retrieval_rates_of_a_model_that_learned_one_text(trainer):
    from demo_training.evaluate import answers, retrieval_rates
    from demo_training.rows import TRAINED, encode

    torch = pytest.importorskip("torch")
    words = Bytes()
    document = [("user", "What is it?"), ("assistant", "It is a fox.")]
    tokens = torch.tensor(encode(words, document)) & (TRAINED - 1)
    ids, targets = tokens[None, :-1], tokens[1:]
    for _ in range(60):
        trainer.step((ids, targets, torch.ones(len(targets))), "A", "short", 1.0)
    assert answers(trainer.model, words, [document[:1]], 20, "dense") == ["It is a fox."]
    item = {"length": 32, "prompt": "What is it?", "answer": "It is a fox."}
    wrong = {"length": 32, "prompt": "What is it?", "answer": "It is a cat."}
    assert retrieval_rates(trainer.model, words, [item, wrong], "dense") == {32: 0.5}


def test_a_layer_for_multi_token_prediction_learns_and_serves_as_trained(tmp_path, monkeypatch):
    import itertools
    import json
    from types import SimpleNamespace

    import numpy as np
    import torch
    from demo_training import checkpoint, mtp
    from demo_training.model import DemoModel

    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.loader import load_weights, validate
    from fd_dsa.models.mtp_layer import add_mtp_layer
    from fd_dsa.models.registry import create_model, read_config
    from fd_dsa.models.weights import HostWeights
    from tests.runner.tiny import tiny_runner

    torch.manual_seed(0)
    # all rows are short of a selection, as in training
    model = DemoModel(TINY | {"index_topk": 64})
    # a model that is sure of what it says
    model.head.data *= 10
    monkeypatch.setattr(mtp, "LENGTH", 48)
    checkpoint.save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    sources = mtp.own_sources()
    others = mtp.Generator(1, sources)
    drawn = mtp.pack(lambda: mtp.encode(Bytes(), others.document()), mtp.LENGTH + 1, 248)
    rows = torch.from_numpy(drawn.astype(np.int64))
    rows[rows == (mtp.PAD | mtp.TRAINED)] = mtp.PAD
    rows, unseen = rows[:240], rows[240:]
    untrained = mtp.loss_of(mtp.Predictor(model), model, unseen)
    # as many steps on every machine
    monkeypatch.setattr(mtp, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    predictor = mtp.train(model, rows, 60, lambda _: None)
    trained = mtp.loss_of(predictor, model, unseen)
    assert trained[0] < untrained[0] and trained[1] < untrained[1] and trained[2] > untrained[2]
    mtp.save(predictor, model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    config = read_config(tmp_path)
    with Checkpoint.open(tmp_path) as stored:
        config = add_mtp_layer(stored, config)
        validate(stored, config)
        weights = HostWeights()
        served = create_model(config, weights)
        load_weights(stored, config, weights.loaders)
    runner, ids = tiny_runner(served), np.arange(6, 47)
    runner.input_batch.begin_step()
    runner.input_batch.add_row(0, ids[:-1].tolist(), 0, True)
    runner.execute_model(np.array([0]))
    hidden = torch.tensor(runner.forward_meta.hidden_states)
    found = runner.predict_more(ids[1:], np.arange(40))
    with torch.no_grad():
        normed = predictor(model, hidden, torch.tensor(ids[1:])[None])
        wanted = torch.nn.functional.linear(normed, model.head).numpy()
    # FP8 and bfloat16 weights of the one, float32 ones of the other
    likeness = (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert likeness > 0.99


def test_rows_to_train_on_have_the_models_own_answers():
    import torch
    from demo_training import mtp
    from demo_training.config import EOS, PAD
    from demo_training.model import DemoModel

    torch.manual_seed(0)
    model = DemoModel(TINY | {"index_topk": 512}).requires_grad_(False)
    prompts = torch.full((4, mtp.LENGTH + 1), PAD)
    for row, count in enumerate((5, 5, 9, 96)):
        prompts[row, :count] = torch.arange(count) % 7 + 6
    rows = mtp.answered(model, prompts)
    for row, prompt in zip(rows, prompts, strict=True):
        ids, begin = row & (mtp.TRAINED - 1), int((prompt != PAD).sum())
        written = (row & mtp.TRAINED) > 0
        end = begin + int(written.sum())
        assert torch.equal(ids[:begin], prompt[:begin]) and written[begin:end].all()
        assert end == len(row) or (ids[end - 1] == EOS and (ids[end:] == PAD).all())
    ids = rows[0] & (mtp.TRAINED - 1)
    end = int((ids != PAD).sum())
    assert torch.equal(model.logits(ids[None, : end - 1])[0, 4:].argmax(-1), ids[5:end])
