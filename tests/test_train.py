"""The pre-training loop: what it learns, that resuming changes nothing, and what it refuses."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from realm_fast.checkpoint import checkpoint_name, checkpoint_steps, newest_checkpoint, read_checkpoint
from realm_fast.config import apply_overrides
from realm_fast.errors import (
    ConfigError,
    DataError,
    Interrupted,
    ProvenanceError,
    TrainingDivergedError,
    UserError,
)
from realm_fast.metrics import read_jsonl, read_metrics
from realm_fast.model import realm_step
from realm_fast.objective import emdr2_retriever_loss, perplexity_distillation_loss
from realm_fast.optim import step_seed
from realm_fast.ownership import Sighting, own
from realm_fast.refresher import run_refresher
from realm_fast.retriever import retrieve_candidates
from realm_fast.run_folder import RunFolder
from realm_fast.signals import StopRequest
from realm_fast.snapshot import list_snapshots, snapshot_name
from realm_fast.train import Pretrainer, pretrain
from tests import qa_world

STEPS = 12
SETTINGS = (
    "masking.strategy=random_token",
    "masking.random_token_rate=0.3",
    "masking.max_masks=4",
    f"pretrain.steps={STEPS}",
    "pretrain.batch_queries=4",
    "pretrain.num_candidates=3",
    "pretrain.reader_lr=3e-3",
    "pretrain.embedder_lr=3e-3",
    "pretrain.checkpoint_every_steps=3",
    "pretrain.log_every_steps=1",
    "pretrain.illustrations=2",
    "refresh.mode=inline",
    "refresh.every_steps=4",
    "refresh.drift_every_steps=3",
    "evaluate.held_out_queries=16",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that handing work to a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"), count=60)


def new_run(tmp_path, store, *overrides):
    config = qa_world.settings(store.path.parent, *SETTINGS, *overrides)
    return RunFolder.create(tmp_path / "run", config, store), config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    run, config = new_run(tmp_path_factory.mktemp("finished"), store)
    pretrain(run, config)
    return run


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run.pretrain_dir / "metrics.jsonl")}


def test_a_run_leaves_everything_it_promises(finished):
    folder = finished.pretrain_dir
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["trainer_wait_s"] == 0 for line in lines)
    # inline: refreshed after steps 4 and 8 (and at the end), so step s uses weights of the last multiple of 4 before it
    assert [line["staleness_steps"] for line in lines] == [(s - 1) % 4 for s in range(1, STEPS + 1)]
    evaluations = read_jsonl(folder / "evaluations.jsonl", "the evaluations")
    assert [(e["when"], e["subset"]) for e in evaluations] == [
        ("before", "all"), ("before", "reachable"), ("after", "all"), ("after", "reachable"),
    ]  # fmt: skip
    for evaluation in evaluations:
        assert (
            0 <= evaluation["recall"]["1"] <= evaluation["recall"]["5"] <= evaluation["recall"]["20"] <= 100
        )
        utility = evaluation["masked_nll_null"] - evaluation["masked_nll"]
        assert evaluation["retrieval_utility"] == pytest.approx(utility, abs=1e-3)
    illustrations = json.loads((folder / "illustrations.json").read_text())
    assert len(illustrations) == 2
    for shown in illustrations:
        assert sum(c["p_z"] for c in shown["candidates"]) == pytest.approx(1)
        assert sum(c["gradient"] for c in shown["candidates"]) == pytest.approx(0, abs=1e-9)
    stages = [json.loads(line)["stage"] for line in finished.stages_path.read_text().splitlines()]
    assert stages == ["index", "measure before", "pretrain", "measure after"]


def test_refreshes_and_drift_are_written_down(finished):
    refreshes = refreshes_of(finished)
    assert [(r["step"], r["event"], r.get("snapshot_step", r.get("reason"))) for r in refreshes] == [
        (0, "in use", 0), (4, "handed over", "steps"), (4, "in use", 4), (8, "handed over", "steps"),
        (8, "in use", 8),
    ]  # fmt: skip
    assert all(r["fresh_shards"] == r["shards"] for r in refreshes if r["event"] == "in use")
    measured = {m["step"]: m for m in metrics_of(finished) if "probe_overlap" in m}
    assert list(measured) == [3, 6, 9]  # before the last step, at which nothing is handed over any more
    assert all(
        0 < m["probe_overlap"] <= 1 and m["score_drift"] > 0 < m["drift_check_s"] for m in measured.values()
    )
    lines = metrics_of(finished)
    assert [m["oldest_staleness_steps"] for m in lines] == [m["staleness_steps"] for m in lines]


def refreshes_of(run):
    """What happened, without how fast."""
    records = read_jsonl(run.pretrain_dir / "refreshes.jsonl", "the refreshes")
    return [{name: value for name, value in r.items() if name != "blocks_per_s"} for r in records]


def metrics_of(run):
    return read_metrics(run.pretrain_dir / "metrics.jsonl")


DRIFT = (
    "refresh.trigger=drift", "refresh.drift_every_steps=1", "refresh.drift_overlap_below=0.97",
    "refresh.drift_min_steps=2", "refresh.drift_max_steps=5", "refresh.order=priority",
    "refresh.shard_blocks=48", "refresh.priority_half_life_steps=3", "pretrain.illustrations=0",
)  # fmt: skip


def test_drift_triggered_refreshes_come_where_the_overlap_fell_and_again_after_a_resume(tmp_path, store):
    """A run interrupted between two handovers decides and tallies as one that was not."""
    run, config = new_run(tmp_path / "whole", store, *DRIFT)
    pretrain(run, config)
    events = refreshes_of(run)
    overlaps = {m["step"]: m["probe_overlap"] for m in metrics_of(run) if "probe_overlap" in m}
    last, expected = 0, []
    for step in range(1, STEPS):
        if step - last >= 5 or (step - last >= 2 and overlaps[step] < 0.97):
            expected.append((step, "ceiling" if step - last >= 5 else "drift"))
            last = step
    assert [(e["step"], e["reason"]) for e in events if e["event"] == "handed over"] == expected
    assert "drift" in {reason for _, reason in expected}

    cut, config = new_run(tmp_path / "cut", store, *DRIFT)
    trainer = Pretrainer(cut, config, resume=False, progress=False)
    interrupt_after(trainer, 7)
    pretrain(cut, config, resume=True)
    assert losses(cut) == losses(run)
    assert refreshes_of(cut) == refreshes_of(run)
    states = [newest_checkpoint(r.pretrain_dir / "checkpoints").state for r in (run, cut)]
    assert states[0]["tally"] == states[1]["tally"]
    assert states[0]["tally"]["step"] == STEPS
    assert min(states[0]["tally"]["tally"]) > 0  # both shards hold candidates
    assert states[0]["handed_over_step"] == states[1]["handed_over_step"] == expected[-1][0]


def test_corrected_queries_search_and_resume_bit_for_bit(tmp_path, store):
    options = ("refresh.correct_queries=true", "refresh.drift_every_steps=2", "pretrain.illustrations=0")
    run, config = new_run(tmp_path / "whole", store, *options)
    trainer = Pretrainer(run, config, resume=False, progress=False)
    used = []
    real = trainer._forward_backward

    def forward_backward(step, *, with_accuracy):
        used.append(0.0 if trainer.correction is None else float(trainer.correction.matrix.abs().sum()))
        return real(step, with_accuracy=with_accuracy)

    trainer._forward_backward = forward_backward
    pretrain_with(trainer)
    # fitted after steps 2, 4, ...; at 4 and 8 the index is swapped, and the new one needs (nearly) none
    assert used[0] == used[1] == 0.0 < used[2] == used[3]
    assert max(used[4:6]) < used[2]
    cut, config = new_run(tmp_path / "cut", store, *options)
    trainer = Pretrainer(cut, config, resume=False, progress=False)
    interrupt_after(trainer, 7)  # the checkpoint of step 6 has the correction fitted there
    pretrain(cut, config, resume=True)
    assert losses(cut) == losses(run)


def test_the_priority_order_goes_to_the_refresher(tmp_path, store):
    run, config = new_run(tmp_path, store, *DRIFT, "refresh.trigger=steps")
    trainer = Pretrainer(run, config, resume=False, progress=False)
    orders = []
    submit = trainer.refresher.submit

    def noted(step, embedder, *, shard_order):
        orders.append((shard_order, trainer.tally.order([0, 0])))
        submit(step, embedder, shard_order=shard_order)

    trainer.refresher.submit = noted
    pretrain_with(trainer)
    assert len(orders) == 2
    for order, expected in orders:
        assert order == expected
        assert sorted(order) == [0, 1]


def interrupt_after(trainer, step_before):
    class Stop(Exception):
        pass

    real = trainer._forward_backward

    def forward_backward(step, *, with_accuracy):
        if step > step_before:
            raise Stop
        return real(step, with_accuracy=with_accuracy)

    trainer._forward_backward = forward_backward
    with pytest.raises(Stop):
        pretrain_with(trainer)


def test_the_last_checkpoint_comes_with_an_index_of_its_own_weights(finished):
    checkpoint = newest_checkpoint(finished.pretrain_dir / "checkpoints")
    assert checkpoint.step == STEPS
    assert checkpoint.state["snapshot"] == snapshot_name(STEPS)
    assert STEPS in list_snapshots(finished.pretrain_dir / "snapshots")


def test_training_lowers_the_loss(finished):
    values = list(losses(finished).values())
    assert sum(values[-3:]) / 3 < 0.95 * sum(values[:3]) / 3


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path, store, finished):
    run, config = new_run(tmp_path, store)
    pretrain(run, config)
    assert losses(run) == losses(finished)
    assert step_seed(3, 1) != step_seed(3, 2) != step_seed(4, 2)
    other, config = new_run(
        tmp_path / "other", store, "seed=4", "pretrain.steps=2", "pretrain.illustrations=0"
    )
    pretrain(other, config)
    assert losses(other)[1] != losses(finished)[1]


def test_resuming_after_an_interruption_takes_the_same_steps(tmp_path, store, finished):
    run, config = new_run(tmp_path, store)
    interrupted_at = 5
    trainer = Pretrainer(run, config, resume=False, progress=False)
    interrupt_after(trainer, interrupted_at)
    assert max(losses(run)) == interrupted_at
    pretrain(run, config, resume=True)
    assert losses(run) == losses(finished)
    for name in ("embedder", "reader"):
        ours = newest_checkpoint(run.pretrain_dir / "checkpoints").path / name / "model.safetensors"
        theirs = newest_checkpoint(finished.pretrain_dir / "checkpoints").path / name / "model.safetensors"
        assert ours.read_bytes() == theirs.read_bytes()


def pretrain_with(trainer):
    try:
        trainer.train()
    finally:
        trainer.close()


SCRIPT = """
import sys, torch
from realm_fast.retriever import retrieve_candidates
from realm_fast.run_folder import RunFolder
from realm_fast.train import pretrain
torch.set_num_threads(1)
run = RunFolder(sys.argv[1])
print("ready", flush=True)
pretrain(run, run.config(), resume=True)
print("done", flush=True)
"""


def start(run):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run.path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_killed_at_random_moments_it_still_reaches_the_same_losses(tmp_path, store, finished):
    """SIGKILL at any moment (start-up, search, checkpoint, refresh, evaluation) costs time, never the result."""
    run, _ = new_run(tmp_path, store)
    moments = random.Random(20)
    metrics = run.pretrain_dir / "metrics.jsonl"
    for _ in range(6):
        child = start(run)
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        reached = metrics.read_bytes().count(b"\n") + moments.randrange(3) if metrics.exists() else 0
        while child.poll() is None and metrics.exists() and metrics.read_bytes().count(b"\n") < reached:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.4))
        child.kill()
        _, errors = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), errors
    child = start(run)
    output, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors
    assert output == "ready\ndone\n"
    assert losses(run) == losses(finished)
    assert list(run.pretrain_dir.rglob(".staging*")) == []


def test_sigterm_finishes_the_step_saves_and_says_so(tmp_path, store):
    run, _ = new_run(tmp_path, store, "pretrain.steps=2000", "pretrain.checkpoint_every_steps=1000")
    child = start(run)
    metrics = run.pretrain_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert "Interrupted: SIGTERM: stopped after step" in errors
    last = max(losses(run))
    assert checkpoint_steps(run.pretrain_dir / "checkpoints") == [last]


def test_a_live_refresh_never_makes_the_trainer_wait(tmp_path, store):
    run, config = new_run(
        tmp_path, store, "refresh.mode=thread", "refresh.every_steps=2", "pretrain.illustrations=0"
    )
    pretrain(run, config)
    lines = read_metrics(run.pretrain_dir / "metrics.jsonl")
    assert all(line["trainer_wait_s"] == 0 for line in lines)
    assert all(line["refresh_failures"] == 0 for line in lines)
    assert lines[-1]["snapshot_step"] > 0


@pytest.mark.parametrize("is_there", [True, False], ids=["with a refresher", "without"])
def test_a_refresher_beside_the_trainer_serves_it_to_the_end(tmp_path, store, is_there):
    run, config = new_run(
        tmp_path, store, "refresh.mode=follow", "refresh.every_steps=2", "refresh.max_staleness_steps=4",
        "pretrain.illustrations=0",
    )  # fmt: skip
    refresher = threading.Thread(target=run_refresher, args=(run, config))
    if is_there:
        refresher.start()
        sighting = Sighting(run.snapshots_dir)
        while not sighting.is_owned():
            time.sleep(0.01)
    pretrain(run, config)
    lines = read_metrics(run.pretrain_dir / "metrics.jsonl")
    assert all(line["refresh_failures"] == 0 for line in lines)
    assert all(line["oldest_staleness_steps"] == line["staleness_steps"] for line in lines)
    if is_there:
        refresher.join(60)  # it ends with the run
        assert not refresher.is_alive()
        assert max(line["staleness_steps"] for line in lines) <= 4
    else:
        assert {line["snapshot_step"] for line in lines} == {0}
        assert all(line["trainer_wait_s"] < 5 for line in lines)  # it looked, and nobody is there to wait for
    checkpoint = newest_checkpoint(run.pretrain_dir / "checkpoints")
    assert checkpoint.state["snapshot"] == snapshot_name(STEPS)


def test_max_staleness_makes_it_wait(tmp_path, store):
    run, config = new_run(
        tmp_path, store, "refresh.mode=thread", "refresh.every_steps=2", "refresh.max_staleness_steps=2",
        "pretrain.illustrations=0",
    )  # fmt: skip
    pretrain(run, config)
    assert max(line["staleness_steps"] for line in read_metrics(run.pretrain_dir / "metrics.jsonl")) <= 2


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path, store):
    gradients = []
    for name, batch, batches in (("one", 8, 1), ("four", 2, 4)):
        run, config = new_run(
            tmp_path / name, store, f"pretrain.batch_queries={batch}", f"pretrain.accumulate_batches={batches}",
            "embedder.dropout=0",
        )  # fmt: skip
        trainer = Pretrainer(run, config, resume=False, progress=False)
        trainer.model.eval()  # dropout would differ
        trainer._forward_backward(1, with_accuracy=False)
        gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
        trainer.close()
    for one, four in zip(*gradients, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("strategy", ["salient_span", "random_span"])
def test_other_levels_and_maskings_train(tmp_path, store, level, strategy):
    run, config = new_run(
        tmp_path, store, f"pretrain.level={level}", f"masking.strategy={strategy}", "masking.entity_tagger=rules",
        "pretrain.steps=2", "pretrain.illustrations=0",
    )  # fmt: skip
    pretrain(run, config)
    assert len(losses(run)) == 2


def test_a_frozen_retriever_does_not_move(tmp_path, store):
    run, config = new_run(
        tmp_path, store, "pretrain.train_retriever=false", "pretrain.steps=4", "pretrain.illustrations=0"
    )
    pretrain(run, config)
    hashes = {
        s.encoder_hash for s in map(manifest_of, list_snapshots(run.pretrain_dir / "snapshots").values())
    }
    assert len(hashes) == 1
    assert read_metrics(run.pretrain_dir / "metrics.jsonl")[-1]["embedder_lr"] == 0


def manifest_of(path):
    from realm_fast.snapshot import read_manifest

    return read_manifest(path)


def test_bfloat16_and_no_null_block_and_no_questions(tmp_path, store, caplog):
    run, config = new_run(
        tmp_path, store, "pretrain.precision=bfloat16", "pretrain.use_null_block=false", "pretrain.steps=2",
        "evaluate.questions=/nowhere/questions.jsonl",
    )  # fmt: skip
    pretrain(run, config)
    evaluations = read_jsonl(run.pretrain_dir / "evaluations.jsonl", "the evaluations")
    assert evaluations[0]["recall"] == {}
    assert evaluations[0]["masked_nll_null"] is None
    assert "recall is not measured" in caplog.text


def test_nan_is_reported_and_the_checkpoint_survives(tmp_path, store):
    run, config = new_run(tmp_path, store, "pretrain.illustrations=0")
    trainer = Pretrainer(run, config, resume=False, progress=False)
    real = trainer._forward_backward

    def forward_backward(step, *, with_accuracy):
        if step == 5:
            with torch.no_grad():
                trainer.model.reader.vocab_bias.fill_(torch.nan)
        return real(step, with_accuracy=with_accuracy)

    trainer._forward_backward = forward_backward
    with pytest.raises(TrainingDivergedError, match="step 5"):
        pretrain_with(trainer)
    assert newest_checkpoint(run.pretrain_dir / "checkpoints").step == 3


def test_what_does_not_fit_is_refused(tmp_path, store, finished):
    with pytest.raises(UserError, match="already has a checkpoint of step 12"):
        pretrain(finished, finished.config())
    changed = apply_overrides(finished.config(), ["pretrain.reader_lr=1e-4"])
    with pytest.raises(ConfigError, match=r"pretrain.reader_lr: the checkpoint has 0.003, now it is 0.0001"):
        pretrain(finished, changed, resume=True)
    run, config = new_run(tmp_path, store, "pretrain.num_candidates=100000")
    with pytest.raises(ConfigError, match=r"pretrain.num_candidates: expected at most"):
        pretrain(run, config)
    (tmp_path / "elsewhere").mkdir()
    other = qa_world.make_store(tmp_path / "elsewhere", count=9)
    with pytest.raises(ProvenanceError, match="belongs to corpus"):
        finished.check_store(other)
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder(tmp_path)


def test_two_trainers_on_one_run_are_refused(tmp_path, store):
    run, config = new_run(tmp_path, store)
    with run.lock("pretrain"), pytest.raises(UserError, match=rf"pid {os.getpid()}"):
        pretrain(run, config)


def test_a_lost_snapshot_is_made_again_and_said(tmp_path, store, caplog):
    run, config = new_run(tmp_path, store, "pretrain.illustrations=0")
    trainer = Pretrainer(run, config, resume=False, progress=False)
    trainer.config = apply_overrides(config, ["pretrain.steps=6"])
    pretrain_with(trainer)
    for path in list_snapshots(run.pretrain_dir / "snapshots").values():
        (path / "shard-00000.safetensors").write_bytes(b"gone")
    pretrain(run, config, resume=True)
    assert "index is embedded again" in caplog.text
    assert max(losses(run)) == STEPS


def test_a_stop_while_it_waits_for_an_index_ends_it(tmp_path, store):
    run, config = new_run(tmp_path, store, "refresh.mode=follow", "pretrain.illustrations=0")
    stop = StopRequest()

    def ask_to_stop():
        stop.signal_number = signal.SIGTERM

    with own(run.snapshots_dir, "a refresher that does nothing"):
        threading.Timer(0.3, ask_to_stop).start()
        with pytest.raises(Interrupted, match="SIGTERM: stopped while the index of step 0 was being made"):
            Pretrainer(run, config, resume=False, progress=False, stop=stop)
    pretrain(run, config)
    assert losses(run)[STEPS]


def test_the_retriever_is_frozen_for_the_first_steps_only(tmp_path, store):
    run, config = new_run(
        tmp_path, store, "pretrain.steps=4", "pretrain.freeze_retriever_steps=2", "pretrain.illustrations=0",
        "pretrain.checkpoint_every_steps=1", "pretrain.keep_checkpoints=9", "pretrain.weight_decay=0",
    )  # fmt: skip
    pretrain(run, config, measure=False)
    folder = run.pretrain_dir / "checkpoints"

    def hashes(module):
        return [
            read_checkpoint(folder / checkpoint_name(step)).files[f"{module}/model.safetensors"]["sha256"]
            for step in (1, 2, 3, 4)
        ]

    embedder, reader = hashes("embedder"), hashes("reader")
    assert embedder[0] == embedder[1]
    assert len(set(embedder[1:])) == 3
    assert len(set(reader)) == 4


@pytest.mark.parametrize("objective", ["emdr2", "pdist"])
def test_other_objectives_give_each_half_its_own_loss(tmp_path, store, objective):
    """The reader's gradient is that of the marginal likelihood; the retriever's, of its loss by the table."""
    run, config = new_run(
        tmp_path, store, f"pretrain.objective={objective}", "pretrain.distill_temperature=0.5",
        "embedder.dropout=0",
    )  # fmt: skip
    trainer = Pretrainer(run, config, resume=False, progress=False)
    model = trainer.model.eval()
    queries = trainer.masker.queries(1, 6)

    def gradients(kind):
        model.objective = kind
        model.zero_grad()
        output, _ = realm_step(model, trainer.snapshot.index, store, queries, num_candidates=3)
        (output.loss + (0 if output.retriever_loss is None else output.retriever_loss)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, output

    marginal, _ = gradients("marginal")
    separate, output = gradients(objective)
    for name in marginal:
        if name.startswith("reader."):
            torch.testing.assert_close(separate[name], marginal[name], rtol=1e-4, atol=1e-7)
    assert any(
        not torch.allclose(separate[n], marginal[n], rtol=1e-2) for n in marginal if n.startswith("embedder.")
    )
    scores, _ = model.fresh_scores(store, queries, _candidates(trainer, queries))
    loss_of = {
        "emdr2": functools.partial(emdr2_retriever_loss, level="sequence"),
        "pdist": functools.partial(perplexity_distillation_loss, temperature=0.5),
    }[objective]
    counted = torch.tensor(
        [[m < len(q.labels) for m in range(max(len(q.labels) for q in queries))] for q in queries]
    )
    model.zero_grad()
    loss_of(output.marginal.gold_log_prob, scores, counted).backward()
    for name, parameter in model.embedder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(separate[f"embedder.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)
    trainer.close()


def test_the_inverse_cloze_term_can_train_the_retriever_alone(tmp_path, store):
    run, config = new_run(
        tmp_path, store, "pretrain.objective=ict", "pretrain.ict_weight=0.5", "pretrain.ict_queries=8",
        "embedder.dropout=0",
    )  # fmt: skip
    trainer = Pretrainer(run, config, resume=False, progress=False)

    def gradients():
        found = {
            n: p.grad.clone() for n, p in trainer.model.embedder.named_parameters() if p.grad is not None
        }
        trainer.model.zero_grad()
        return found

    torch.manual_seed(0)
    trainer._forward_backward(1, with_accuracy=False)
    assert trainer.model.reader.vocab_bias.grad.abs().sum() > 0
    joint = gradients()
    trainer._ict_backward(trainer.ict, 1)
    alone = gradients()
    assert joint.keys() == alone.keys()
    for name, grad in alone.items():
        torch.testing.assert_close(joint[name], grad, rtol=1e-5, atol=1e-8)
    trainer.close()
    run, config = new_run(tmp_path / "without", store, "pretrain.objective=ict")
    with pytest.raises(ConfigError, match=r"pretrain\.ict_weight: expected more than 0"):
        Pretrainer(run, config, resume=False, progress=False)
    run, config = new_run(
        tmp_path / "still", store, "pretrain.objective=ict", "pretrain.train_retriever=false"
    )
    with pytest.raises(ConfigError, match=r"pretrain\.train_retriever: expected true"):
        Pretrainer(run, config, resume=False, progress=False)


def _candidates(trainer, queries):
    return retrieve_candidates(
        trainer.snapshot.index, trainer.store, trainer.model.search_emb(queries), queries, num_candidates=3
    )


def test_other_objectives_accumulate_and_resume(tmp_path, store):
    config = qa_world.settings(
        store.path.parent, *SETTINGS, "pretrain.objective=pdist", "pretrain.illustrations=0",
        "embedder.dropout=0", "masking.max_masks=1", "reader.trunk=fresh:layers=1,hidden=32,heads=2,dropout=0",
        "embedder.trunk=fresh:layers=1,hidden=32,heads=2,dropout=0",
    )  # fmt: skip
    sums = []
    for size, batches in ((4, 1), (2, 2)):
        parts = apply_overrides(
            config, [f"pretrain.batch_queries={size}", f"pretrain.accumulate_batches={batches}"]
        )
        trainer = Pretrainer(
            RunFolder.create(tmp_path / f"{size}", parts, store), parts, resume=False, progress=False
        )
        trainer.model.train()
        trainer._forward_backward(1, with_accuracy=False)
        sums.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        trainer.close()
    for name, whole in sums[0].items():
        torch.testing.assert_close(sums[1][name], whole, rtol=1e-3, atol=1e-6)


def test_the_inverse_cloze_term_adds_its_gradient_and_resumes(tmp_path, store):
    overrides = ("pretrain.ict_weight=0.5", "pretrain.ict_queries=8", "pretrain.illustrations=0")
    run, config = new_run(tmp_path, store, *overrides)
    trainer = Pretrainer(run, config, resume=False, progress=False)

    def gradients():
        trainer.model.zero_grad()
        torch.manual_seed(0)
        shown = trainer._forward_backward(1, with_accuracy=False)
        return [p.grad.clone() for p in trainer.model.embedder.parameters() if p.grad is not None], shown

    together, shown = gradients()
    sampler, trainer.ict = trainer.ict, None
    without, off = gradients()
    trainer.model.zero_grad()
    loss = trainer._ict_backward(sampler, 1)
    alone = [p.grad for p in trainer.model.embedder.parameters() if p.grad is not None]
    assert shown["ict_loss"] == pytest.approx(loss, rel=1e-5)
    assert off["ict_loss"] == 0
    assert all(float(part.abs().max()) > 0 for part in alone[-2:])
    for a, b, c in zip(together, without, alone, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-4, atol=1e-6)
    trainer.close()

    whole = new_run(tmp_path / "whole", store, *overrides)[0]
    pretrain(whole, config, measure=False)
    steps = []
    stopped = new_run(tmp_path / "stopped", store, *overrides)[0]
    with pytest.raises(Interrupted):
        pretrain(stopped, config, measure=False, on_step=functools.partial(_stop_at, steps, 5))
    pretrain(stopped, config, resume=True, measure=False, on_step=steps.append)
    assert steps == list(range(1, STEPS + 1))
    assert losses(stopped) == losses(whole)
    lines = read_metrics(stopped.pretrain_dir / "metrics.jsonl")
    assert all(line["ict_loss"] > 0 for line in lines)


def _stop_at(steps, last, step):
    steps.append(step)
    if step == last:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # the handler runs between two bytecodes of this thread


def test_an_inverse_cloze_batch_larger_than_the_corpus_is_refused(tmp_path, store):
    run, config = new_run(tmp_path, store, "pretrain.ict_weight=1", "pretrain.ict_queries=100000")
    with pytest.raises(ConfigError, match=r"pretrain.ict_queries: expected at most \d+"):
        pretrain(run, config)
