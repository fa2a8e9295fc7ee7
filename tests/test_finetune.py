import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import qa_world
import torch
from hypothesis import given
from hypothesis import strategies as st
from qa_world import one_thread  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from test_reading import naive_scores

from realm_fast import finetune as ft
from realm_fast.answer import ask
from realm_fast.checkpoint import checkpoint_steps, newest_checkpoint, save_checkpoint
from realm_fast.early_stopping import EarlyStopping, Score, split_dev
from realm_fast.embedder import Embedder
from realm_fast.errors import (
    ConfigError,
    CorruptArtifactError,
    DataError,
    DiskFullError,
    ProvenanceError,
    TrainingDivergedError,
    UserError,
)
from realm_fast.evaluate import evaluate
from realm_fast.packing import query_input
from realm_fast.qa_metrics import normalise_answer
from realm_fast.qa_model import load_qa_model, untrained_embedder
from realm_fast.questions import Question
from realm_fast.reader import Reader
from realm_fast.snapshot_writer import write_snapshot

TIMING = ("questions_per_s", "step_s", "evaluation_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def store(folder):
    return qa_world.make_store(folder)


@pytest.fixture(scope="module")
def learned(folder, store):
    """A run fine-tuned until it knows its training questions."""
    run, config = qa_world.make_run(
        folder, "learned", store, "finetune.steps=160", "finetune.checkpoint_every_steps=80",
        "finetune.retriever_beam=24", "finetune.log_every_steps=20",
    )  # fmt: skip
    return run, config, ft.finetune(run, config)


def lines(run, name="metrics") -> list[dict]:
    return [json.loads(line) for line in (run.finetune_dir / f"{name}.jsonl").read_text().splitlines()]


def figures(run, name="metrics") -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run, name)]


def weights(run) -> dict[str, torch.Tensor]:
    path = newest_checkpoint(run.finetune_dir / "checkpoints").path
    parts = ("embedder/model.safetensors", "span_reader/model.safetensors", "optimizer.safetensors")
    return {f"{part}/{k}": v for part in parts for k, v in load_file(path / part).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- what is learned


def test_it_learns_to_find_and_to_read(learned):
    run, config, result = learned
    record = lines(run)
    assert [line["step"] for line in record] == list(range(20, 161, 20))
    assert record[-1]["loss"] < 0.35 * record[0]["loss"]
    assert record[-1]["with_answer_read"] > 0.95
    assert set(record[0]) == {
        "step", "loss", "retriever_loss", "reader_loss", "reader_lr", "embedder_lr", "grad_norm",
        "questions_per_s", "step_s", "with_answer_retrieved", "with_answer_read",
    }  # fmt: skip
    assert result.step == 160
    assert result.checkpoint == run.finetune_dir / "checkpoints" / "step-00000160"
    assert checkpoint_steps(run.finetune_dir / "checkpoints") == [80, 160]
    (row, _) = evaluate(run, config)["sets"]
    before = evaluate(run, config, checkpoint="start")["sets"][0]
    assert row["exact_match"] > 60
    assert row["recall"]["1"] > max(60, before["recall"]["1"] + 20)


def test_the_block_side_stays_as_the_index_was_made(learned, store):
    run, config, _ = learned
    checkpoint = newest_checkpoint(run.finetune_dir / "checkpoints")
    tuned = Embedder.load(checkpoint.module_folder("embedder"))
    start = untrained_embedder(config, store)
    assert tuned.hash() == start.hash() == checkpoint.state["block_encoder_hash"]
    for name, value in tuned.block_side.state_dict().items():
        assert torch.equal(value, start.block_side.state_dict()[name])
    moved = [
        name
        for name, value in tuned.query_side.state_dict().items()
        if not torch.equal(value, start.block_side.state_dict()[name])
    ]
    assert len(moved) > 10
    assert not any("block_side" in name for name in load_file(checkpoint.path / "optimizer.safetensors"))


def test_the_loss_against_plain_python(folder, store):
    """The whole loss of a batch, recomputed in float64 with loops over blocks and spans."""
    run, config = qa_world.make_run(folder, "formula", store, "finetune.retriever_beam=12")
    asked = qa_world.questions(24)
    asked[2] = dataclasses.replace(asked[2], answers=["people"])  # answered nowhere
    trainer = ft.Trainer.open(run, config, asked, None)
    trainer.embedder.eval()
    trainer.span_reader.eval()
    torch.nn.init.normal_(trainer.span_reader.score.weight)
    batch = list(range(2, 48, 5))
    parts = trainer.loss(batch)
    tokenizer = store.tokenizer()
    blocks = trainer.index.reconstruct(torch.arange(len(store))).double()
    retriever = reader = 0.0
    seen: Counter[str] = Counter()
    for number in batch:
        tokens = tokenizer.encode(asked[number].text).ids
        with torch.no_grad():
            emb = trainer.embedder.query_emb(
                trainer.embedder.pad([query_input(tokens, trainer.embedder.special)])
            )[0]
        scores = (blocks @ emb.double()).tolist()
        beam = sorted(range(len(store)), key=lambda i: (-scores[i], i))[:12]
        holding = [i for i in beam if any(f" {a} " in plain(store.text(i)) for a in asked[number].answers)]
        if holding:
            seen["retrieved"] += 1
            retriever += lse([scores[i] for i in beam]) - lse([scores[i] for i in holding])
        everything, correct = [], []
        for i in beam[:3]:
            body = store.body_tokens(i).astype(np.int32)
            for (start, stop), score in naive_scores(trainer.span_reader, tokens, body, tokenizer).items():
                everything.append(score + scores[i])
                if tokenizer.decode(body[start:stop]) in asked[number].answers:
                    correct.append(score + scores[i])
        if correct:
            seen["read"] += 1
            reader += lse(everything) - lse(correct)
    assert 0 < seen["read"] <= seen["retrieved"] < len(batch)  # the batch has every kind of question
    assert float(parts.retriever.detach()) == pytest.approx(retriever / len(batch), rel=1e-4)
    assert float(parts.reader.detach()) == pytest.approx(reader / len(batch), rel=1e-4)
    assert parts.with_answer_retrieved == seen["retrieved"] / len(batch)
    assert parts.with_answer_read == pytest.approx(seen["read"] / len(batch))
    parts.loss.backward()
    assert all(p.grad is None for p in trainer.embedder.block_side.parameters())
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.embedder.query_side.parameters()
    )


def plain(text: str) -> str:
    return f" {text.lower().replace('.', ' ').replace(',', ' ')} "


def lse(values: list[float]) -> float:
    high = max(values)
    return high + math.log(sum(math.exp(v - high) for v in values))


def test_mean_mml_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0), -math.inf], [1.0, 2.0, 3.0]], requires_grad=True)
    correct = torch.tensor([[True, False, True], [False, False, False]])
    loss = ft.mean_mml(scores, correct)
    assert loss.item() == pytest.approx(math.log(4.0) / 2)  # (log(1 + 3) - log 1 + 0) / 2 questions
    loss.backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-0.375, 0.375, 0.0], [0.0, 0.0, 0.0]]))
    none = ft.mean_mml(scores, torch.zeros_like(correct))
    assert none.item() == 0.0
    none.backward()
    assert torch.isfinite(scores.grad).all()


def test_bfloat16_trains(folder, store):
    run, config = qa_world.make_run(folder, "bf16", store, "finetune.precision=bfloat16", "finetune.steps=4")
    exact, plain_config = qa_world.make_run(folder, "f32", store, "finetune.steps=4")
    loss, reference = ft.finetune(run, config).loss, ft.finetune(exact, plain_config).loss
    assert loss == pytest.approx(reference, rel=0.1)
    assert loss != reference
    assert all(v.dtype == torch.float32 for v in weights(run).values())


# ---------------------------------------------------------------- where it starts from


def pretrained(run, config, store, *, step: int, seed: int = 5) -> tuple[Embedder, Reader]:
    """A pre-training checkpoint, as the trainer leaves one."""
    torch.manual_seed(seed)
    embedder = Embedder.from_config(config.embedder, store.tokenizer())
    reader = Reader.from_config(config.reader, store.tokenizer())
    save_checkpoint(
        run.pretrain_dir / "checkpoints", step, modules={"embedder": embedder, "reader": reader},
        optimizer=None, state={}, identity={}, keep=2,
    )  # fmt: skip
    return embedder, reader


def test_from_pre_training_with_its_own_snapshot(folder, store, caplog):
    caplog.set_level("INFO", "realm_fast")
    run, config = qa_world.make_run(folder, "pretrained", store, "finetune.steps=1")
    embedder, reader = pretrained(run, config, store, step=200)
    snapshots = run.pretrain_dir / "snapshots"
    write_snapshot(snapshots, 200, embedder, store, config.index, token_budget=2048)
    ft.finetune(run, config)
    assert "fine-tuning starts from pretrain/checkpoints/step-00000200" in caplog.text
    assert "embedding" not in caplog.text  # its snapshot was found
    checkpoint = newest_checkpoint(run.finetune_dir / "checkpoints")
    assert checkpoint.state["snapshot"] == "finetune/snapshots/step-00000200"
    assert checkpoint.state["block_encoder_hash"] == embedder.hash()
    start = reader.trunk.state_dict()
    tuned = load_file(checkpoint.path / "span_reader" / "model.safetensors")
    shared = [name for name in tuned if name.startswith("trunk.") and name.removeprefix("trunk.") in start]
    far = max(float((tuned[n] - start[n.removeprefix("trunk.")]).abs().max()) for n in shared)
    assert len(shared) > 10
    assert far < 0.01  # one step away from the reader, not from a fresh trunk
    shutil.rmtree(run.pretrain_dir)  # pruned, or pre-trained on: the fine-tuned model keeps its own index
    assert evaluate(run, config)["stage"] == "finetune"


def test_from_pre_training_whose_snapshot_is_stale(folder, store, caplog):
    caplog.set_level("INFO", "realm_fast")
    run, config = qa_world.make_run(folder, "stale", store, "finetune.steps=1")
    embedder, _ = pretrained(run, config, store, step=200)
    torch.manual_seed(9)
    older = Embedder.from_config(config.embedder, store.tokenizer())
    write_snapshot(run.pretrain_dir / "snapshots", 100, older, store, config.index, token_budget=2048)
    ft.finetune(run, config)
    assert "no index of this run was made by these weights: embedding 24 blocks" in caplog.text
    assert newest_checkpoint(run.finetune_dir / "checkpoints").state["block_encoder_hash"] == embedder.hash()


def test_without_pre_training_it_says_so(folder, store, caplog):
    caplog.set_level("INFO", "realm_fast")
    run, config = qa_world.make_run(folder, "bare", store, "finetune.steps=1")
    result = ft.finetune(run, config)
    assert "no pre-training checkpoint in this run" in caplog.text
    assert newest_checkpoint(result.checkpoint.parent).state["started_from"] == "warm start"
    stage = json.loads(run.stages_path.read_text().splitlines()[-1])
    assert stage["stage"] == "finetune"
    assert stage["details"]["questions"]["given"] == 48


def test_two_sided_embedders_are_not_split_again(folder, store):
    run, config = qa_world.make_run(folder, "two", store, "finetune.steps=2", "embedder.shared=false")
    ft.finetune(run, config)
    embedder = Embedder.load(newest_checkpoint(run.finetune_dir / "checkpoints").module_folder("embedder"))
    assert embedder.settings.shared is False
    assert ft.split_question_side(embedder) is embedder


# ---------------------------------------------------------------- going on after a stop


def test_resume_after_a_crash_is_bit_exact(folder, store, monkeypatch, caplog):
    caplog.set_level("INFO", "realm_fast")
    whole, config = qa_world.make_run(folder, "whole", store)
    ft.finetune(whole, config)
    broken, config = qa_world.make_run(folder, "broken", store)
    update = ft.Trainer._update

    def crash(self, batch):
        if self.step == 7:
            raise RuntimeError("the machine went away")
        return update(self, batch)

    monkeypatch.setattr(ft.Trainer, "_update", crash)
    with pytest.raises(RuntimeError):
        ft.finetune(broken, config)
    monkeypatch.undo()
    assert checkpoint_steps(broken.finetune_dir / "checkpoints") == [4]
    result = ft.finetune(broken, config, resume=True)
    assert result.step == 12
    assert figures(broken) == figures(whole)
    assert equal(weights(broken), weights(whole))
    again = ft.finetune(broken, config, resume=True)  # nothing left to do
    assert (again.step, again.loss) == (12, None)
    assert "all 12 steps are done" in caplog.text
    assert figures(broken) == figures(whole)
    stages = [json.loads(line) for line in broken.stages_path.read_text().splitlines()]
    assert [(s["stage"], s["details"]["steps"]) for s in stages] == [("finetune", 8)]


def test_kills_and_stops_at_any_moment_change_nothing(tmp_path):
    script = Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same losses and the same bytes" in done.stdout


def test_resume_needs_the_same_settings_questions_and_choice(folder, store):
    run, config = qa_world.make_run(folder, "strict", store, "finetune.steps=4")
    ft.finetune(run, config)
    with pytest.raises(UserError, match=r"holds a checkpoint of step 4\. Give --resume"):
        ft.finetune(run, config)
    other = qa_world.settings(folder, "finetune.steps=9", "finetune.reader_lr=1e-5")
    with pytest.raises(ConfigError) as caught:
        ft.finetune(run, other, resume=True)
    assert "finetune.steps: the checkpoint has 4, now it is 9" in str(caught.value)
    assert "finetune.reader_lr: the checkpoint has 0.003, now it is 1e-05" in str(caught.value)
    with pytest.raises(ConfigError, match="questions_hash"):
        ft.finetune(run, config, questions=qa_world.questions(3), resume=True)
    free = qa_world.settings(folder, "finetune.steps=4", "finetune.log_every_steps=1")
    assert ft.finetune(run, free, resume=True).step == 4
    file = run.finetune_dir / ft.SELECTION_FILE
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "identity": {}}))
    with pytest.raises(CorruptArtifactError, match="not of the job"):
        ft.finetune(run, config, resume=True)
    file.unlink()
    with pytest.raises(DataError, match="the choice of trainable questions does not exist"):
        ft.finetune(run, config, resume=True)


def test_resume_without_a_checkpoint_starts(folder, store, caplog):
    caplog.set_level("INFO", "realm_fast")
    run, config = qa_world.make_run(folder, "early", store, "finetune.steps=1")
    assert ft.finetune(run, config, resume=True).step == 1
    assert "no checkpoint yet" in caplog.text


# ---------------------------------------------------------------- early stopping


def dev_file(folder, name="dev", asked=None) -> Path:
    return qa_world.write_questions(folder / f"{name}.jsonl", asked or qa_world.questions(24)[:7])


def scripted(monkeypatch, scores):
    """Evaluations that come out as `scores` ({step: (EM, F1)}), whatever was answered."""
    trainers, summarise, evaluate_dev = [], ft.summarise, ft.Trainer._evaluate

    def note(self, evaluations):
        trainers.append(self)
        return evaluate_dev(self, evaluations)

    def rows(*arguments):
        row, reachable = summarise(*arguments)
        exact, f1 = scores[trainers[-1].step]
        return [
            {**row, "exact_match": exact, "f1": f1, "recall": dict.fromkeys(row["recall"], 50.0)},
            reachable,
        ]

    monkeypatch.setattr(ft.Trainer, "_evaluate", note)
    monkeypatch.setattr(ft, "summarise", rows)


def test_the_best_is_kept_and_answers_and_training_stops(folder, store, monkeypatch, caplog):
    caplog.set_level("INFO", "realm_fast")
    run, config = qa_world.make_run(
        folder, "stops", store, f"finetune.dev_questions={dev_file(folder)}", "finetune.retriever_beam=24",
        "finetune.evaluate_every_steps=2", "finetune.patience=2", "finetune.keep_checkpoints=1",
        "finetune.checkpoint_every_steps=5", "finetune.log_every_steps=100",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        # a gain, a gain by F1, the same again, worse: that is patience
        scripted(patch, {2: (10.0, 20.0), 4: (10.0, 25.0), 6: (10.0, 25.0), 8: (5.0, 90.0)})
        result = ft.finetune(run, config)
    assert (result.step, result.best_step) == (8, 4)
    assert result.checkpoint == run.finetune_dir / "checkpoints" / "step-00000004"
    assert checkpoint_steps(run.finetune_dir / "checkpoints") == [4, 8]  # the best, and the last
    assert [(line["step"], line["best"]) for line in lines(run, "evaluations")] == [
        (2, True), (4, True), (6, False), (8, False),
    ]  # fmt: skip
    assert [line["step"] for line in lines(run)] == [8]  # what was not logged yet is, at the end
    assert "no gain in 2 evaluations: stopped after step 8 of 12; step 4 was the best" in caplog.text
    stage = json.loads(run.stages_path.read_text().splitlines()[-1])["details"]
    assert (stage["steps"], stage["best_step"], stage["left_out_as_dev"]) == (8, 4, 7)
    assert stage["dev_questions"]["trainable"] == 7
    again = ft.finetune(run, config, resume=True)  # stopped is finished
    assert (again.step, again.loss, again.best_step) == (8, None, 4)
    assert evaluate(run, config)["checkpoint"] == "finetune/checkpoints/step-00000004"
    best = load_file(result.checkpoint / "span_reader" / "model.safetensors")
    last = load_file(run.finetune_dir / "checkpoints/step-00000008/span_reader/model.safetensors")
    assert not torch.equal(best["score.weight"], last["score.weight"])
    used = load_qa_model(run, config).span_reader.state_dict()
    assert torch.equal(used["score.weight"], best["score.weight"])
    assert ask(run, "What is the capital of it?")[0].text
    shutil.rmtree(result.checkpoint)
    with pytest.raises(DataError, match=r"step-00000004: no such checkpoint"):
        evaluate(run, config)


def test_what_is_evaluated_is_what_evaluation_finds_later(folder, store):
    dev = dev_file(folder)
    run, config = qa_world.make_run(
        folder, "figures", store, f"finetune.dev_questions={dev}", f"evaluate.questions={dev}",
        "evaluate.recall_at=1,3", "finetune.retriever_beam=24", "finetune.steps=60",
        "finetune.evaluate_every_steps=20", "finetune.checkpoint_every_steps=20", "finetune.keep_checkpoints=3",
    )  # fmt: skip
    result = ft.finetune(run, config)
    record = lines(run, "evaluations")
    assert [line["step"] for line in record] == [20, 40, 60]
    assert len({line["recall"]["1"] for line in record}) > 1  # it learns between them
    scores = [(line["exact_match"], line["f1"], line["recall"]["3"]) for line in record]
    assert result.best_step == record[scores.index(max(scores))]["step"]
    for line in record:
        path = run.finetune_dir / "checkpoints" / f"step-{line['step']:08d}"
        (row, _) = evaluate(run, config, checkpoint=str(path))["sets"]
        names = ("questions", "exact_match", "f1", "recall", "retrieval_utility")
        assert {name: row[name] for name in names} == {name: line[name] for name in names}


def test_looking_at_dev_questions_changes_no_step(folder, store):
    train = dev_file(folder, "half", qa_world.questions(24)[7:])
    plain, config = qa_world.make_run(folder, "blind", store, f"finetune.questions={train}")
    ft.finetune(plain, config)
    seen, config = qa_world.make_run(
        folder, "seen", store, f"finetune.questions={train}", f"finetune.dev_questions={dev_file(folder)}",
        "finetune.evaluate_every_steps=3",
    )  # fmt: skip
    ft.finetune(seen, config)
    assert figures(seen) == figures(plain)
    assert equal(weights(seen), weights(plain))


def test_resume_amid_evaluations_is_bit_exact(folder, store, monkeypatch):
    settings = ("finetune.dev_share=.25", "finetune.evaluate_every_steps=2", "finetune.patience=3",
                "finetune.checkpoint_every_steps=3", "finetune.keep_checkpoints=1")  # fmt: skip
    scores = {2: (5.0, 1.0), 4: (6.0, 1.0), 6: (4.0, 1.0), 8: (4.0, 1.0), 10: (4.0, 1.0)}
    scripted(monkeypatch, scores)
    whole, config = qa_world.make_run(folder, "dev-whole", store, *settings)
    assert ft.finetune(whole, config).step == 10
    broken, config = qa_world.make_run(folder, "dev-broken", store, *settings)
    update = ft.Trainer._update

    def crash(self, batch):
        if self.step == 9:  # after the evaluation of step 8, of which no checkpoint knows
            raise RuntimeError("the machine went away")
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ft.Trainer, "_update", crash)
        with pytest.raises(RuntimeError):
            ft.finetune(broken, config)
    assert checkpoint_steps(broken.finetune_dir / "checkpoints") == [4, 6]
    assert len(lines(broken, "evaluations")) == 4
    assert ft.finetune(broken, config, resume=True).best_step == 4
    assert figures(broken, "evaluations") == figures(whole, "evaluations")
    assert figures(broken) == figures(whole)
    assert equal(weights(broken), weights(whole))
    states = [newest_checkpoint(r.finetune_dir / "checkpoints").state for r in (broken, whole)]
    assert states[0]["early_stopping"] == states[1]["early_stopping"] == {
        "patience": 3, "best_step": 4, "best": [6.0, 1.0, 50.0], "without_gain": 3,
    }  # fmt: skip


def test_a_share_is_kept_for_dev_and_its_words_are_not_trained_on(folder, store):
    asked = [*qa_world.questions(24), Question("again/1", "what is the CAPITAL of  Nobonu", ["x"])]
    asked[0] = dataclasses.replace(asked[0], text="What is the capital of Nobonu?")
    splits = {}
    for seed in range(6):
        config = qa_world.settings(folder, f"seed={seed}", "finetune.dev_share=.3")
        split = splits[seed] = split_dev(asked, config)
        assert split == split_dev(asked, config)
        assert len(split.dev) == 15  # .3 x 49, rounded
        assert len(split.train) + len(split.dev) + split.left_out == 49
        texts = [{normalise_answer(q.text) for q in part} for part in (split.train, split.dev)]
        assert not texts[0] & texts[1]
        both = {"capital/0", "again/1"} & {q.id for q in split.dev}
        assert split.left_out == (len(both) == 1)
    assert len({tuple(q.id for q in split.dev) for split in splits.values()}) == 6
    assert {split.left_out for split in splits.values()} == {0, 1}


def test_early_stopping_by_hand():
    watch = EarlyStopping(patience=2)
    given = [((0, 0, 0), True), ((5, 9, 9), True), ((5, 9, 9.5), True), ((5, 9, 9), False), ((6, 0, 0), True),
             ((6, 0, 0), False), ((5, 99, 99), False)]  # fmt: skip
    for step, (score, gain) in enumerate(given, start=1):
        assert not watch.stop
        assert watch.note(step, Score(*score)) is gain
        watch = EarlyStopping.restore(json.loads(json.dumps(watch.state())))
    assert watch.stop
    assert (watch.best_step, watch.best) == (5, (6, 0, 0))
    never = EarlyStopping(patience=0)
    assert [never.note(step, Score(1, 1, 1)) for step in range(99)] == [True] + 98 * [False]
    assert not never.stop


def test_dev_questions_that_cannot_be(folder, store):
    dev = dev_file(folder)
    everything = dev_file(folder, "everything", qa_world.questions(24))
    hopeless = dev_file(folder, "hopeless", [Question("h/1", "Where is it?", ["mountains"])])
    for number, (overrides, error, message) in enumerate(
        (
            (["patience=3"], ConfigError, "finetune.patience: 3 evaluations without gain need dev questions"),
            ([f"dev_questions={dev}", "dev_share=.1"], ConfigError, r"finetune.dev_share: expected 0 where"),
            (["dev_share=.001"], DataError, r"finetune.dev_share: 0.001 of 48 questions is no question"),
            ([f"dev_questions={everything}"], DataError, "no question is left to train on: 48 are kept for"),
            (["dev_questions=nowhere"], DataError, "nowhere: no such file"),
            (
                [f"dev_questions={hopeless}"], DataError,
                r"dev, .*hopeless.jsonl: no question can be evaluated on \(0 of 1 questions are to evaluate on",
            ),
        )
    ):  # fmt: skip
        run, config = qa_world.make_run(folder, f"odd-{number}", store, *(f"finetune.{o}" for o in overrides))
        with pytest.raises(error, match=message):
            ft.finetune(run, config)
        assert not checkpoint_steps(run.finetune_dir / "checkpoints")


# ---------------------------------------------------------------- what can go wrong


def test_nan_stops_with_step_and_parameter(folder, store):
    run, config = qa_world.make_run(
        folder, "nan", store, "finetune.reader_lr=1e38", "finetune.warmup_steps=0", "finetune.weight_decay=0"
    )
    with pytest.raises(
        TrainingDivergedError, match=r"step 2: .*group reader\.(no_)?decay, parameter reader\."
    ):
        ft.finetune(run, config)
    assert not checkpoint_steps(run.finetune_dir / "checkpoints")


def test_a_full_disk_keeps_the_checkpoint_before(folder, store, monkeypatch):
    run, config = qa_world.make_run(folder, "full", store)
    save = ft.save_checkpoint

    def fill(path, step, **parts):
        if step > 4:
            raise DiskFullError(f"{path}: no space left")
        return save(path, step, **parts)

    monkeypatch.setattr(ft, "save_checkpoint", fill)
    with pytest.raises(DiskFullError):
        ft.finetune(run, config)
    monkeypatch.undo()
    assert ft.finetune(run, config, resume=True).step == 12


def test_questions_set_aside_are_counted(folder, store, caplog):
    caplog.set_level("INFO", "realm_fast")
    asked = [
        *qa_world.questions(24)[:6],
        Question("u/1", "What is the capital?", []),
        Question("u/2", "What is the capital?", [" "]),
        Question("u/3", "", ["x"]),
        Question("u/4", "Which river runs through it?", ["mountains"]),  # answered nowhere
        Question("u/5", " ".join(["what is the capital of"] * 10), [qa_world.countries(24)[0][1]]),
    ]
    run, config = qa_world.make_run(folder, "counts", store, "finetune.steps=1", "finetune.retriever_beam=24")
    result = ft.finetune(run, config, questions=asked)
    assert result.questions == {
        "given": 11, "no_text": 1, "no_answer": 2, "no_answer_in_beam": 1, "cut_to_length": 1, "trainable": 7,
    }  # fmt: skip
    assert (
        "7 of 11 questions are trainable; set aside: 1 without an answer in their beam, 2 without answers, "
        "1 without text; 1 cut to length"
    ) in caplog.text


def test_no_trainable_question_is_an_error(folder, store):
    run, config = qa_world.make_run(folder, "none", store)
    asked = [Question("u/1", "What is it?", ["mountains"]), Question("u/2", "What is it?", [])]
    with pytest.raises(DataError, match=r"no question can be trained on \(0 of 2 questions"):
        ft.finetune(run, config, questions=asked)


def test_a_beam_wider_than_the_corpus_is_the_corpus(folder, store, caplog):
    caplog.set_level("INFO", "realm_fast")
    run, config = qa_world.make_run(
        folder, "wide", store, "finetune.retriever_beam=5000", "finetune.reader_beam=40", "finetune.steps=2"
    )
    result = ft.finetune(run, config)
    assert result.questions["trainable"] == 48
    assert "the corpus has 24 blocks: every beam is all of them" in caplog.text


def test_a_users_own_files_go_through(user_store, tmp_path, data_dir):
    """50 documents and 10 questions in plain jsonl, with beams wider than the corpus."""
    source = data_dir / "user"
    run, config = qa_world.make_run(
        tmp_path, "run", user_store, f"finetune.questions={source / 'questions.jsonl'}", "finetune.steps=6",
        f"evaluate.questions={source / 'questions.jsonl'}", "finetune.retriever_beam=100",
        "finetune.max_reader_tokens=128", "finetune.max_span_tokens=10", "evaluate.reachable_top_k=50",
    )  # fmt: skip
    result = ft.finetune(run, config)
    assert result.questions["given"] == 10
    assert result.questions["trainable"] >= 9  # "twenty-seven" or not, the texts answer nearly all
    everything, reachable = evaluate(run, config)["sets"]
    assert (everything["name"], everything["questions"]) == ("questions", 10)
    assert reachable["questions"] >= 9
    assert everything["recall"]["20"] > 0
    answers = ask(run, "who wrote the salt ledger", top=2)
    assert all(a.text and a.text in a.block_text for a in answers)


def test_another_corpus_or_tokenizer_is_refused(folder, store, tmp_path):
    run, config = qa_world.make_run(folder, "moved", store, "finetune.steps=1")
    ft.finetune(run, config)
    other = qa_world.make_store(tmp_path, 25)
    manifest = json.loads(run.manifest_path.read_text())
    changed = {**manifest, "corpus": str(other.path), "corpus_hash": other.corpus_hash}
    run.manifest_path.write_text(json.dumps(changed))
    with pytest.raises(ProvenanceError, match=r"was fine-tuned with corpus|its tokenizer is"):
        evaluate(type(run)(run.path), config)


def test_only_one_writer_at_a_time(folder, store):
    run, config = qa_world.make_run(folder, "locked", store)
    with run.lock("fine-tuning"), pytest.raises(UserError, match="another process"):
        ft.finetune(run, config)


# ---------------------------------------------------------------- pure parts


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 10))
def test_question_order_is_epochs_of_permutations_wherever_one_starts(count, batch, seed, done):
    whole = list(islice(ft.question_order(count, batch, seed, 0), 4 * count + 10))
    assert list(islice(ft.question_order(count, batch, seed, done), 3)) == whole[done : done + 3]
    flat = [i for chosen in whole for i in chosen]
    for epoch in range(len(flat) // count):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_question_order_differs_between_epochs_and_seeds():
    first = [next(ft.question_order(50, 50, seed, step)) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in first}) == 3
