"""The two tables of `realm-fast reproduce`, over a made-up corpus and models that train in a blink."""

import json
import math

import numpy as np
import pytest
import qa_world
from qa_world import one_thread  # noqa: F401 (a fixture)

from realm_fast.cli import main
from realm_fast.config import apply_overrides
from realm_fast.errors import ConfigError, DataError, TrainingDivergedError, UserError
from realm_fast.metrics import read_jsonl
from realm_fast.questions import Bm25Index, load_questions
from realm_fast.reading import AnswerTable
from realm_fast.reproduce import ablations, qa, shared, table
from realm_fast.reproduce.arms import ABLATIONS, REALM, SYSTEMS, Arm
from realm_fast.run_folder import RunFolder
from realm_fast.token_store import TokenStore

STEPS = 4
FROZEN = next(arm for arm in ABLATIONS if arm.name == "frozen")
SETTINGS = (
    # no segment embeddings: in a random trunk they make hubs of a few blocks, and nobody's own block is found
    "embedder.trunk=fresh:type=distilbert,layers=1,hidden=32,heads=2,positions=64",
    "masking.strategy=salient_span",
    "masking.entity_tagger=rules",
    "ict.steps=2",
    "ict.batch_queries=8",
    "warmup.steps=3",
    "warmup.batch_queries=8",
    f"pretrain.steps={STEPS}",
    "pretrain.batch_queries=4",
    "pretrain.num_candidates=3",
    "pretrain.null_score_offset=1",
    "pretrain.reader_lr=3e-3",
    "pretrain.embedder_lr=3e-3",
    "pretrain.checkpoint_every_steps=2",
    "pretrain.keep_checkpoints=1",
    "pretrain.illustrations=0",
    "refresh.mode=inline",
    "refresh.drift_every_steps=0",
    "finetune.dev_share=.2",
    "finetune.evaluate_every_steps=2",
    "finetune.steps=4",
    "finetune.checkpoint_every_steps=2",
    "evaluate.held_out_queries=8",
    "evaluate.recall_at=1,5",
)


def write_corpus(folder, count=24):
    """Two blocks a country, each naming what the other names: evidence for a masked name is in the other."""
    folder.mkdir(parents=True, exist_ok=True)
    qa_world.write_vocabulary(folder / "vocabulary", count)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for country, capital, river in qa_world.countries(count):
            name, city, water = country.capitalize(), capital.capitalize(), river.capitalize()
            for title, text in (
                (
                    name,
                    f"It is a country. The capital of {name} is the city {city}. The river {water} runs through it.",
                ),
                (
                    city,
                    f"People live there. In the city {city} lies the river {water}. The old town of {name} is a city.",
                ),
            ):
                file.write(json.dumps({"id": title, "title": title, "text": text}) + "\n")
    asked = qa_world.questions(count)
    qa_world.write_questions(folder / "train.jsonl", asked)
    qa_world.write_questions(folder / "test.jsonl", asked[::3])
    return qa_world.settings(folder, *SETTINGS)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def out(tmp_path_factory, config):
    """All arms with the first seed, two of them with the second."""
    folder = tmp_path_factory.mktemp("reproduce")
    config = apply_overrides(config, ["pretrain.checkpoint_every_steps=100"])  # writing them takes longest
    ablations.run_ablations(folder, config, seeds=1)
    ablations.run_ablations(folder, config, seeds=2, arms=[REALM, FROZEN])
    return folder


def result(folder, arm, seed, part="ablations"):
    return json.loads((folder / part / "results" / f"{arm}.seed-{seed}.json").read_text())


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_every_arm_changes_what_it_says_and_nothing_else(out):
    def settings(name):
        return flat(RunFolder(out / "ablations" / "runs" / f"{name}.seed-0").config().to_dict())

    realm = settings("realm")
    for arm in ABLATIONS[1:]:
        other = settings(arm.name)
        expected = {change.partition("=")[0] for change in arm.changes}
        if arm.stale_factor != 1:
            expected.add("refresh.every_steps")
            assert other["refresh.every_steps"] == 30 * realm["refresh.every_steps"]
        if not arm.warm:
            expected |= {"pretrain.start_embedder", "pretrain.start_reader"}
        assert {name for name in realm if realm[name] != other[name]} == expected, arm.name


def test_arms_are_measured_alike_and_come_out_as_they_must(out):
    start = json.loads((out / "plan.json").read_text())["start"]
    measured = {arm.name: result(out, arm.name, 0)["measured"] for arm in ABLATIONS}
    for name, found in measured.items():
        assert found.keys() == start.keys(), name
        assert all(math.isfinite(value) for value in found.values()), name
    for name in (
        "recall@1",
        "recall@5",
        "reachable_recall@5",
        "span_recall@2",
    ):  # an embedder that did not move
        assert measured["frozen"][name] == measured["no-retrieval"][name] == start[name]
    nll = {name: found["masked_nll"] for name, found in measured.items()} | {"start": start["masked_nll"]}
    # every name here is one wordpiece: the levels are the same but for rounding
    assert nll.pop("sequence") == pytest.approx(nll["realm"], abs=1e-4)
    assert len(set(nll.values())) == len(nll)
    seeds = [result(out, "realm", seed)["measured"]["masked_nll"] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    runs = out / "ablations" / "runs"

    def searched(name):
        lines = read_jsonl(runs / f"{name}.seed-0" / "pretrain" / "refreshes.jsonl", "the refreshes")
        return [line["snapshot_step"] for line in lines if line["event"] == "in use"]

    assert searched("realm") == list(range(STEPS))
    assert searched("stale") == searched("frozen") == [0]
    assert (runs / "realm.seed-0" / "pretrain" / "checkpoints").exists()  # the QA table starts from it
    assert not (runs / "stale.seed-0" / "pretrain" / "checkpoints").exists()


def test_table_json_and_plot(out):
    text = (out / "ablations" / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for arm in ABLATIONS:
        assert any(row.startswith(f"| {arm.title} |") for row in rows)
    record = json.loads((out / "ablations" / "table.json").read_text())
    realm = record["arms"]["realm"]
    assert realm["seeds"] == [0, 1]
    values = [result(out, "realm", seed)["measured"]["masked_nll"] for seed in (0, 1)]
    assert realm["metrics"]["masked_nll"]["mean"] == pytest.approx(np.mean(values))
    assert realm["metrics"]["masked_nll"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert realm["seconds"] > 0
    assert realm["peak_rss_bytes"] > 1e7
    stale = record["arms"]["stale"]["against_realm"]["masked_nll"]
    assert (stale["seeds"], stale["half_width"]) == (1, None)
    differences = [
        result(out, "frozen", seed)["measured"]["masked_nll"] - value for seed, value in enumerate(values)
    ]
    frozen = record["arms"]["frozen"]["against_realm"]["masked_nll"]
    assert frozen["mean"] == pytest.approx(np.mean(differences))
    assert frozen["half_width"] == pytest.approx(12.706 * np.std(differences, ddof=1) / math.sqrt(2))
    stages = {stage["stage"] for stage in record["stages"]}
    assert {"corpus", "salient spans", "ict", "warmup", "REALM, one seed"} <= stages
    assert "| 38.5 | 38.2 |" in next(row for row in rows if row.startswith("| REALM |"))
    assert (out / "ablations" / "plot.png").read_bytes().startswith(b"\x89PNG")


def begun(folder, out):
    """Gives `folder` what the arms of `out` share, and its plan."""
    for name in ("corpus", "corpus.spans-rules", "start", "questions"):
        (folder / name).symlink_to(out / name)
    (folder / "plan.json").write_text((out / "plan.json").read_text())


def test_killed_in_the_middle_it_goes_on_to_the_same_result(tmp_path, out, config, monkeypatch):
    begun(tmp_path, out)
    monkeypatch.setattr(ablations, "plot", lambda *_: None)  # drawn elsewhere; it takes a while
    real, made = ablations.pretrain, []

    def dies_at_3(run, settings, *, on_step, **more):
        def step(number):
            made.append((run.path.name, number))
            on_step(number)
            if made.count(("realm.seed-1", 3)) == 1 and number == 3 and run.path.name == "realm.seed-1":
                raise MemoryError("as good as a kill: nothing is saved at step 3")

        real(run, settings, on_step=step, **more)

    monkeypatch.setattr(ablations, "pretrain", dies_at_3)
    with pytest.raises(MemoryError):
        ablations.run_ablations(tmp_path, config, seeds=2, arms=[REALM])
    assert made[-1] == ("realm.seed-1", 3)
    assert not (tmp_path / "ablations" / "results" / "realm.seed-1.json").exists()
    made_before = len(made)
    ablations.run_ablations(tmp_path, config, seeds=2, arms=[REALM])
    assert made[made_before:] == [("realm.seed-1", 3), ("realm.seed-1", 4)]  # from the checkpoint of step 2
    for seed in (0, 1):
        assert result(tmp_path, "realm", seed)["measured"] == result(out, "realm", seed)["measured"]
    ablations.run_ablations(tmp_path, config, seeds=2, arms=[REALM])
    assert len(made) == made_before + 2
    plan = json.loads((out / "plan.json").read_text()) | {"steps": 7}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"realm.seed-0.json: is of a run of 4 steps, now 7 are planned"):
        ablations.run_ablations(tmp_path, config, seeds=1, arms=[REALM])
    (tmp_path / "plan.json").unlink()
    with pytest.raises(DataError, match=r"plan.json: is gone, but .*ablations holds runs"):
        ablations.run_ablations(tmp_path, config, seeds=1, arms=[REALM])


def test_an_arm_that_diverges_is_named_and_the_rest_goes_on(tmp_path, out, config, monkeypatch, caplog):
    wild = Arm("wild", "wild steps", ("pretrain.reader_lr=1e30", "pretrain.warmup_steps=0"))
    monkeypatch.setattr(ablations, "ABLATIONS", (REALM, wild, FROZEN))
    monkeypatch.setattr(ablations, "plot", lambda *_: None)
    begun(tmp_path, out)
    with pytest.raises(TrainingDivergedError, match="step 2"):
        ablations.run_ablations(tmp_path, config, seeds=1, arms=[wild, FROZEN], stop_if_diverged=True)
    assert not (tmp_path / "ablations" / "results" / "frozen.seed-0.json").exists()
    path = ablations.run_ablations(tmp_path, config, seeds=1, arms=[wild, FROZEN])
    assert "wild, seed 0, diverged: step 2" in caplog.text
    lost = result(tmp_path, "wild", 0)
    assert lost["status"] == "diverged"
    assert result(tmp_path, "frozen", 0)["status"] == "done"
    text = path.read_text()
    assert "| wild steps | 0 (diverged: seed 0) | – |" in text
    assert f"- wild steps, seed 0: {lost['error']}" in text
    left = tmp_path / "ablations" / "runs" / "frozen.seed-0" / "pretrain" / "checkpoints"
    assert not left.exists()
    left.mkdir()  # as after a kill between the result and the tidying
    ablations.run_ablations(tmp_path, config, seeds=1, arms=[FROZEN])
    assert not left.exists()


def test_question_answering_beside_its_baselines(out, config, monkeypatch):
    real, steps = qa.finetune, []

    def dies_once(run, settings, *, on_step, **more):
        def step(number):
            steps.append((run.path.name, number))
            on_step(number)
            if steps.count(("bm25.seed-0", 3)) == 1 and number == 3 and run.path.name == "bm25.seed-0":
                raise MemoryError

        return real(run, settings, on_step=step, **more)

    monkeypatch.setattr(qa, "finetune", dies_once)
    monkeypatch.setattr(ablations, "plot", lambda *_: None)
    with pytest.raises(MemoryError):
        qa.run_qa(out, config, seeds=2)
    path = qa.run_qa(out, config, seeds=2)
    assert [number for name, number in steps if name == "bm25.seed-0"] == [1, 2, 3, 3, 4]
    assert len([1 for name, _ in steps if name == "realm.seed-0"]) == 4
    record = json.loads((out / "qa" / "table.json").read_text())["systems"]
    for name, system in record.items():
        for seed, best in enumerate(system["best_steps"]):
            lines = read_jsonl(out / "qa" / "runs" / f"{name}.seed-{seed}" / "finetune/evaluations.jsonl", "")
            assert [line["step"] for line in lines] == [2, 4]
            assert best == [line["step"] for line in lines if line["best"]][-1]
    assert list(record) == [system.name for system in SYSTEMS]
    store = TokenStore.open(out / "corpus")
    questions = load_questions(str(config.evaluate.questions))
    _, ids = Bm25Index(store).search([q.text for q in questions], 5)
    answers = AnswerTable(questions, store)
    hit = np.mean([answers.first_rank(i, row) >= 0 for i, row in enumerate(ids)])
    assert hit > 0
    assert record["bm25"]["metrics"]["test/all/recall@5"]["by_seed"] == {
        str(seed): pytest.approx(100 * hit) for seed in (0, 1)
    }
    frozen = record["frozen"]["metrics"]["test/all/recall@5"]
    assert frozen["std"] == 0  # its retriever is the warm start's, whatever the seed
    tuned = [
        read_jsonl(out / "qa" / "runs" / f"{name}.seed-0" / "finetune" / "metrics.jsonl", "")[-1]
        for name in ("bm25", "warm")
    ]
    assert all(line["reader_loss"] > 0 for line in tuned)
    text = path.read_text()
    assert "## test, all (16 questions)" in text
    best = ", ".join(map(str, record["bm25"]["best_steps"]))
    assert f"BM25 + reader {best};" in text
    assert all(f"| {system.title} | 2 |" in text for system in SYSTEMS)
    assert "| – | 40.2 |" not in text  # the paper's figures stand only beside the sets they are of
    assert (out / "qa" / "plot.png").read_bytes().startswith(b"\x89PNG")
    resumed = RunFolder(out / "qa" / "runs" / "realm.seed-1").config().pretrain.start_embedder
    assert "ablations/runs/realm.seed-1/pretrain/checkpoints/step-00000004" in resumed


def test_a_system_whose_pre_training_diverged_is_recorded(tmp_path):
    (tmp_path / "results").mkdir()
    job = ablations.Job("realm", 0, 9)
    path = qa.result_path(tmp_path, job)
    path.write_text('{"status": "diverged", "error": "step 3: the loss is nan"}')
    with pytest.raises(TrainingDivergedError, match="joint pre-training diverged: step 3: the loss is nan"):
        qa._realm_checkpoint(tmp_path, job)
    path.write_text('{"status": "done"}')
    with pytest.raises(DataError, match="its checkpoint is gone; delete"):
        qa._realm_checkpoint(tmp_path, job)


def opened(folder, config):
    return shared.prepare(folder, config)


def test_hours_decide_the_steps_by_what_a_trial_measured(tmp_path, out, config, monkeypatch):
    world = opened(out, config)
    moved = shared.dataclasses.replace(world, out=tmp_path)
    questions = world.questions(config.finetune.questions)
    monkeypatch.setattr(shared, "_trial", lambda *_: {"step_s": 2.0, "index_s": 10.0})
    runs, refreshes = 3 * len(ABLATIONS), shared.REFRESHES
    with pytest.raises(
        UserError, match=rf"--hours: expected at least [\d.]+ for {runs} runs of 30 steps and more, got 0.1"
    ):
        shared.make_plan(moved, arm=REALM, seeds=3, hours=0.1, questions=questions)
    assert not (tmp_path / "plan.json").exists()
    plan = shared.make_plan(moved, arm=REALM, seeds=3, hours=5, questions=questions)
    left_s = 0.95 * (5 * 3600 - plan["spent_s"]) / runs - (refreshes + 2) * 10 - plan["measure_s"]
    assert plan["steps"] == int(left_s / 2)
    assert plan["refresh_every_steps"] == math.ceil(plan["steps"] / (refreshes + 1))
    monkeypatch.setattr(shared, "_trial", None)  # what was planned is not planned again
    assert shared.make_plan(moved, arm=REALM, seeds=3, hours=9, questions=questions)["steps"] == plan["steps"]


def test_a_trial_measures_and_leaves_nothing(out, config):
    world = opened(out, config)
    timed = shared._trial(world, REALM)
    assert 0 < timed["step_s"] < 60
    assert 0 < timed["index_s"] < 60
    assert not (out / "trial").exists()


def test_other_settings_in_the_same_folder_are_refused(out, config):
    changed = apply_overrides(config, ["pretrain.reader_lr=1e-4"])
    with pytest.raises(ConfigError, match=r"pretrain.reader_lr: the plan has 0.003, now it is 0.0001"):
        ablations.run_ablations(out, changed, seeds=1, arms=[REALM])
    with pytest.raises(ConfigError, match=r"ict.embedder_lr: the checkpoint has"):
        ablations.run_ablations(out, apply_overrides(config, ["ict.embedder_lr=1"]), seeds=1, arms=[REALM])
    contrary = apply_overrides(config, ["finetune.dev_questions=nq.dev"])
    with pytest.raises(ConfigError, match=r"finetune.dev_share: expected 0"):  # before hours of ablations
        qa.run_qa(out, contrary, seeds=1)
    with pytest.raises(ConfigError, match=r"masking.strategy: the recipe needs salient_span"):
        ablations.run_ablations(out, apply_overrides(config, ["masking.strategy=random_token"]), seeds=1)


def test_means_and_differences_by_hand():
    realm = {"mean": 10.0, "std": 1.0, "by_seed": {0: 9.0, 1: 10.0, 2: 11.0}}
    assert table.with_spread(realm, digits=2) == "10.00 ± 1.00"
    assert table.with_spread({"mean": 0.5, "std": None}, scale=100) == "50.0"
    assert table.with_spread({"mean": None, "std": None}) == "–"
    for by_seed, mean, half_width, shown in (
        ({0: 9.5, 1: 10.5, 2: 11.5}, 0.5, 0.0, "**+0.5 ± 0.0**"),  # what seeds do to both cancels
        ({0: 8.0, 1: 8.0, 2: 8.0}, -2.0, 4.303 / math.sqrt(3), "-2.0 ± 2.5"),
        ({2: 12.0, 0: 9.0}, 0.5, 12.706 / 2, "+0.5 ± 6.4"),  # by seed, whatever the order; seed 1 diverged
        ({1: 12.0}, 2.0, None, "+2.0"),
        ({3: 12.0}, None, None, "–"),
    ):
        found = table.paired_difference(
            {"metrics": {"a": {"by_seed": by_seed}}}, {"metrics": {"a": realm}}, "a"
        )
        assert found["mean"] == (None if mean is None else pytest.approx(mean))
        assert found["half_width"] == (None if half_width is None else pytest.approx(half_width))
        assert table.with_interval(found) == shown
    many = {seed: float(seed % 2) for seed in range(40)}
    same = {"metrics": {"a": {"by_seed": dict.fromkeys(range(40), 0.0)}}}
    found = table.paired_difference({"metrics": {"a": {"by_seed": many}}}, same, "a")
    assert found["half_width"] == pytest.approx(2.228 * np.std(list(many.values()), ddof=1) / math.sqrt(40))
    results = [
        {"status": "done", "seed": 0, "seconds": 1, "peak_rss_bytes": 5, "measured": {"a": 1.0, "b": None}},
        {"status": "diverged", "seed": 1, "error": "step 2: NaN"},
        {"status": "done", "seed": 2, "seconds": 3, "peak_rss_bytes": 4, "measured": {"a": 4.0, "b": None}},
    ]
    summary = table.summarise(results, ["a", "b"])
    assert summary["metrics"]["a"]["mean"] == 2.5
    assert summary["metrics"]["a"]["std"] == pytest.approx(math.sqrt(4.5))
    assert summary["metrics"]["b"]["mean"] is None
    assert (summary["seconds"], summary["peak_rss_bytes"], summary["seeds"]) == (2, 5, [0, 2])
    assert table.seeds_cell(summary) == "2 (diverged: seed 1)"


def test_an_arm_far_from_all_others_does_not_squash_the_plot(tmp_path):
    near = [{"mean": mean, "std": 0.1, "by_seed": {0: mean}} for mean in (7.9, 8.0, 8.1, 7.7)]
    far = {"mean": 0.1, "std": 0.01, "by_seed": {0: 0.1}}
    means = [metric["mean"] for metric in (*near, far)]
    low, high = table._shown_range(means)
    assert low <= min(means[:4])
    assert max(means) <= high
    assert far["mean"] < low
    assert table._shown_range(means[-3:]) == table._shown_range([1.0] * 9) == (-math.inf, math.inf)
    seen = []
    pyplot = table.import_pyplot()
    close, pyplot.close = pyplot.close, seen.append
    try:
        table.plot(tmp_path / "plot.png", list("abcde"), [("R@5", [*near, far], 1.0)])
        table.plot(tmp_path / "first.png", list("abcde"), [("R@5", [far, *near], 1.0)])
    finally:
        pyplot.close = close
    for figure in seen:  # wherever it stands, the first row with its line included
        (axis,) = figure.axes
        assert axis.get_xlim()[0] > 7
        assert [text.get_text() for text in axis.texts] == ["← 0.1"]
        pyplot.close(figure)


# ---------------------------------------------------------------- bad input


def test_questions_without_answers_and_broken_patterns_are_left_out_by_name(tmp_path, out, config, caplog):
    """Named; the others are kept; a set of which nothing is left, or nothing reachable, is said."""
    world = opened(out, config)
    (tmp_path / "mixed.jsonl").write_text(
        '{"id": "good", "question": "What is the capital of it?", "answer": ["zzyzx"]}\n'
        '{"id": "silent", "question": "What?", "answer": []}\n'
        '{"id": "broken", "question": "What?", "answer": ["("], "answer_kind": "regex"}\n'
    )
    spec = str(tmp_path / "mixed.jsonl")
    (kept,) = load_questions(world.questions(spec))
    assert kept.id == "mixed/good"
    assert kept.reachable is False
    assert "mixed/silent" in caplog.text
    assert "mixed/broken ('(':" in caplog.text
    assert "none of its questions is reachable" in caplog.text
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mixed.jsonl").write_text('{"question": "Where?", "answer": ["zzyzx"]}\n')
    (other,) = load_questions(world.questions(str(tmp_path / "more" / "mixed.jsonl")))
    assert other.text == "Where?"  # not what was kept under the same name
    (tmp_path / "empty.jsonl").write_text('{"id": "silent", "question": "What?", "answer": []}\n')
    hopeless = apply_overrides(config, [f"finetune.questions={tmp_path / 'empty.jsonl'}"])
    with pytest.raises(DataError, match="hold no question with an answer"):
        ablations.run_ablations(tmp_path / "new", hopeless, seeds=1)
    assert not (tmp_path / "new").exists()  # before any work


def test_an_empty_reachable_set_is_a_row_and_a_remark(tmp_path, out, config):
    world = opened(out, config)
    found = {"t/all": 1.0, "t/reachable": None}
    folder = tmp_path / "qa"
    for seed in (0, 1):
        measured = {
            f"{place}/{name}": value if name != "questions" else int(place == "t/all")
            for place, value in found.items()
            for name in ("questions", "exact_match", "f1", "recall@1", "recall@5")
        }
        done = {"status": "done", "seed": seed, "seconds": 1.0, "peak_rss_bytes": 1, "best_step": 2}
        record = {**done, "measured": measured}
        shared.write_json(folder / "results" / f"realm.seed-{seed}.json", record)
    text = qa.write_table(world, folder).read_text()
    assert "## t, reachable (0 questions)\n\nNo question of the set is reachable" in text
    assert "| REALM, fine-tuned | 2 | 1.00 ± 0.00 |" in text
    assert "The one that did best on dev answers, seed by seed: REALM, fine-tuned 2, 2." in text


def test_all_systems_diverged_is_a_table_too(tmp_path, out, config):
    record = {"status": "diverged", "seed": 0, "error": "step 3: the loss is nan"}
    shared.write_json(tmp_path / "results" / "warm.seed-0.json", record)
    text = qa.write_table(opened(out, config), tmp_path).read_text()
    assert "- warm start, fine-tuned (as ORQA), seed 0: step 3: the loss is nan" in text
    assert "plot.png" not in text


def test_a_corpus_without_names_is_refused_by_name(tmp_path):
    config = write_corpus(tmp_path / "world", count=6)
    path = tmp_path / "world" / "corpus.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:  # only the first letter of a sentence is a capital: no name for the rules
        record["text"] = " ".join(
            part.strip().capitalize() + "." for part in record["text"].split(".") if part
        )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match="rules-1 found no salient span in 12 blocks"):
        ablations.run_ablations(tmp_path / "out", config, seeds=1, arms=[REALM])
    assert not (tmp_path / "out" / "start").exists()  # before the first stage


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    for words, message in (
        (["--arms", "realm,sideways"], "--arms: expected some of realm, frozen"),
        (["--arms", ","], "got none"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--hours", "-1"], "--hours: expected more than 0, got -1.0"),
        (["--hours", "1", "--steps", "5"], "--steps: says what --hours would decide"),
    ):
        assert main(["reproduce", "ablations", "--out", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err
