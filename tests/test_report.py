"""realm_fast.report: the page says what the run's files say, escapes them, and does without missing ones."""

import base64
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic_run as synthetic

from realm_fast.config import CorpusConfig
from realm_fast.corpus import build_corpus
from realm_fast.errors import CorruptArtifactError, DataError, RealmFastError
from realm_fast.report import block_texts, render, write_report
from realm_fast.report.answers import prediction_kind, sample_predictions
from realm_fast.report.data import RunData, check, flat
from realm_fast.report.illustration import rows_for, sentence, snippet
from realm_fast.report.markup import byte_size, number, percent, probability, seconds, signed, tag
from realm_fast.report.refreshes import refresh_charts
from realm_fast.report.ribbons import fan_in, fan_out
from realm_fast.report.summary import _verdict

VOID = {"br", "hr", "img", "input", "meta", "link", "wbr"}
DATA = Path(__file__).parent / "data"


class Page(HTMLParser):
    """Parses strictly and keeps what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.sections: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self._section: str | None = None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in <{name}>"
        if name not in VOID:
            self.open.append(name)
        if name == "section":
            self._section = dict(attributes)["id"]
            self.sections[self._section] = ""
        if name == "table":
            self.tables.append([])
        if name == "tr":
            self.tables[-1].append([])
        if name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name
        if name == "section":
            self._section = None

    def handle_data(self, text):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.texts.append(text)
        if self._section:
            self.sections[self._section] += text
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the table that has these column titles."""
        (found,) = [t for t in self.tables if set(header) <= set(t[0])]
        return found[1:]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return synthetic.write_synthetic_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = synthetic.write_synthetic_run(tmp_path_factory.mktemp("synthetic"))
    return Page(render(RunData.read(run), lambda block_id: synthetic.BLOCKS[block_id][1]))


# ---- one whole, self-contained document --------------------------------------------------------------------


def test_the_report_is_written_to_the_run_folder_or_where_it_is_asked_for(run, tmp_path):
    assert write_report(run) == run / "report.html"
    elsewhere = tmp_path / "new" / "page.html"
    assert write_report(str(run), elsewhere) == elsewhere
    assert elsewhere.read_bytes() == (run / "report.html").read_bytes()
    assert not list(run.glob(".staging-*"))


def test_the_page_is_well_formed_and_its_ids_and_links_agree(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in ids
        if "for" in attributes:
            assert attributes["for"] in ids
    assert [name for name, _ in page.elements].count("h1") == 1
    assert len([a for name, a in page.elements if name == "a"]) == len(page.sections) == 8


def test_the_page_loads_nothing(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    names = {name for name, _ in page.elements}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "xlink:href", "data", "action"} & attributes.keys()
        assert "url(" not in (attributes.get("style") or "")
    css, script = (re.search(rf"<{t}>(.*?)</{t}>", html, re.S)[1] for t in ("style", "script"))
    assert not re.search(r"url\(|@import|//[a-z]", css)
    assert not re.search(r"fetch|XMLHttp|import\(|https?:", script)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


def test_light_and_dark_define_the_same_colours(run):
    css = re.search(r"<style>(.*?)</style>", write_report(run).read_text(encoding="utf-8"), re.S)[1]
    light, preferred, chosen = (
        set(re.findall(r"(--[\w-]+):\s*#", re.search(pattern, css, re.S)[1]))
        for pattern in (
            r":root \{(.*?)\}",
            r':root:not\(\[data-theme="light"\]\) \{(.*?)\}',
            r':root\[data-theme="dark"\] \{(.*?)\}',
        )
    )
    assert light == preferred == chosen
    assert len(light) > 12
    used = set(re.findall(r"var\((--[\w-]+)\)", css))
    assert used <= set(re.findall(r"(--[\w-]+):", css))


def test_a_long_run_makes_a_page_of_bounded_size(run):
    synthetic.write_lines(run / "pretrain" / "metrics.jsonl", synthetic.pretrain_metrics(20_000, 4, 500))
    assert write_report(run).stat().st_size < 700_000


# ---- numbers in, numbers out -------------------------------------------------------------------------------


def test_the_answers_table_holds_every_score(page):
    rows = {(r[0], r[1]): r for r in page.table("question set", "exact match", "F1")}
    expected = synthetic.results()["sets"]
    assert len(rows) == len(expected) == 6
    for s in expected:
        row = rows[s["name"], s["subset"]]
        assert row[2] == f"{s['questions']:,}"
        assert row[3].split()[0] == f"{s['exact_match']:.1f}%"
        assert row[4] == f"{s['f1']:.1f}%"
        assert row[5:8] == [f"{s['recall'][k]:.1f}%" for k in ("1", "5", "20")]
    assert rows["nq.test", "all"][3] == "1.2% 0.9–1.6"  # Wilson's 95% interval of 43 in 3610


def test_published_numbers_stand_beside_ours_and_are_labelled(page):
    rows = page.table("test set", "this run", "ORQA")
    assert rows == [
        ["NaturalQuestions", "1.2%", "33.3%", "39.2%", "40.4%"],
        ["WebQuestions", "1.9%", "36.4%", "40.2%", "40.7%"],
        ["CuratedTrec", "3.0%", "30.1%", "46.8%", "42.9%"],
    ]
    assert "Beside the published systems: another scale" in page.sections["answers"]
    assert "pre-trained on 102,400,000 masked sentences" in page.sections["answers"]
    assert "; this run on 6,400." in page.sections["answers"]  # 400 steps of 16


def test_recall_before_and_after_is_tabled_and_drawn(page):
    rows = {(r[0], r[2]): r for r in page.table("measure", "before", "after", "change")}
    for e in synthetic.evaluations():
        for k, value in e["recall"].items():
            row = rows[e["subset"], f"recall@{k}"]
            assert row[1] == f"{e['questions']:,}"
            assert row[3 if e["when"] == "before" else 4] == f"{value:.1f}%"
    assert rows["reachable", "recall@5"][5] == "+11.2 points"
    drawn = [a["title"] for a in page.of_class("dot") if "after" in a["class"]]
    assert drawn[:6] == ["1.6%", "4.3%", "8.4%", "11.4%", "29.7%", "56.0%"]


def test_no_change_reads_as_none(run):
    before = synthetic.evaluations()[0]
    synthetic.write_lines(run / "pretrain" / "evaluations.jsonl", [before, before | {"when": "after"}])
    page = page_of(run)
    assert page.table("measure", "before")[0][3:] == ["0.9%", "0.9%", "0"]
    assert "after, for 2.6%, no change." in page.text


def test_recall_measured_only_once_is_shown_and_not_compared(run):
    before, _, after, _ = synthetic.evaluations()
    synthetic.write_lines(run / "pretrain" / "evaluations.jsonl", [before | {"recall": {}}, after])
    page = page_of(run)
    assert page.table("measure", "before")[1][2:] == ["recall@5", "n/a", "4.3%", "–"]
    assert "Before pre-training, the top" not in page.text
    synthetic.write_lines(run / "pretrain" / "evaluations.jsonl", [before | {"questions": 0, "recall": {}}])
    assert "No recall was measured." in page_of(run).sections["retrieval"]


def test_a_run_without_a_refresh_says_so(run):
    synthetic.write_lines(run / "pretrain" / "metrics.jsonl", synthetic.pretrain_metrics(60, 4, 600))
    shown = page_of(run).sections["pretraining"]
    assert "No fresh index was swapped in; largest logged 60 steps." in shown


def test_masked_token_accuracy_is_tabled_with_and_without_retrieval(page):
    rows = {r[0]: r[1:] for r in page.table("held-out sentences")}
    assert rows["accuracy with retrieval"] == ["3.8%", "34.2%", "+30.4 points"]
    assert rows["accuracy without (null block)"] == ["4.1%", "26.8%", "+22.7 points"]
    assert rows["negative log-likelihood with retrieval, nats a token"] == ["7.31", "3.42", "−3.89"]
    assert rows["retrieval utility, nats a token"] == ["−0.0120", "0.310", "+0.322"]


def test_the_headline_says_what_was_run_and_what_came_out(page):
    top = page.text[: page.text.index("REALM in one picture")]
    assert "400 optimizer steps of 16 masked sentences each on 10,033 blocks of text (wiki-leads)" in top
    assert "held an answer for 2.6% of 3,610 questions; after, for 4.3%, a gain of 1.7 points, beyond" in top
    assert "1.2% of all 3,610 questions of nq.test" in top
    assert "103 right of 6,336 in all" in top  # round(43.3) + round(38.6) + round(20.8)
    assert "Small corpus (10,033 blocks)" in top
    assert "trained for retrieval on MS MARCO" in top


@pytest.mark.parametrize(
    ("was", "now", "n", "words"),
    [
        (2.6, 4.3, 3610, "a gain of 1.7 points, beyond the uncertainty"),
        (2.6, 2.9, 500, "a gain of 0.3 points, which is within the uncertainty"),
        (40.0, 20.0, 1000, "a loss of 20.0 points, beyond"),
        (5.0, 5.0, 100, "no change"),
        (5.0, 6.0, None, "a gain of 1.0 points"),
    ],
)
def test_a_change_is_worded_no_stronger_than_the_questions_allow(was, now, n, words):
    assert _verdict(was, now, n).startswith(words)


def test_a_retriever_held_fixed_is_said_to_be(run):
    settings = synthetic.settings()
    settings["pretrain"]["train_retriever"] = False
    synthetic.write_json(run / "config.json", settings)
    assert "A reader learned beside a retriever held fixed for 400 optimizer steps" in page_of(run).text


def test_a_retriever_that_hurts_is_said_to_hurt(run):
    evaluations = synthetic.evaluations()
    evaluations[2] |= {"retrieval_utility": -0.2, "recall": {"5": 1.0}}
    synthetic.write_lines(run / "pretrain" / "evaluations.jsonl", evaluations)
    text = page_of(run).text
    assert (
        "retrieval utility −0.200 nats a token (−0.0120 before): looking things up hurts on average" in text
    )
    assert "after, for 1.0%, a loss of 1.6 points" in text


def test_of_two_evaluations_of_the_same_moment_the_later_counts(run):
    again = synthetic.evaluations()[2] | {"recall": {"1": 50.0, "5": 60.0, "20": 70.0}}
    synthetic.write_lines(run / "pretrain" / "evaluations.jsonl", [*synthetic.evaluations(), again])
    rows = {(r[0], r[2]): r for r in page_of(run).table("measure", "before")}
    assert rows["all", "recall@5"][3:5] == ["2.6%", "60.0%"]


def test_curves_carry_every_logged_value(page):
    charts = {}
    for attributes in page.of_class("plot"):
        hover = json.loads(attributes["data-hover"])
        charts[tuple(s["label"] for s in hover["series"])] = hover
    metrics = synthetic.pretrain_metrics()
    points = charts[("loss",)]["series"][0]["points"]
    assert [p[0] for p in points] == [m["step"] for m in metrics]
    assert [p[1] for p in points] == pytest.approx([m["loss"] for m in metrics], rel=1e-4)
    accuracy = charts[("accuracy",)]["series"][0]["points"]
    assert [p[1] for p in accuracy] == pytest.approx([100 * m["masked_accuracy"] for m in metrics], rel=1e-4)
    assert ("retriever", "reader") in charts
    exact, f1 = charts[("exact match", "F1")]["series"]
    assert [p[:2] for p in exact["points"]] == [
        [e["step"], e["exact_match"]] for e in synthetic.dev_evaluations()
    ]
    assert f1["points"][0][1] == synthetic.dev_evaluations()[0]["f1"]
    assert "Step 200 was the best and is what answers: exact match 9.5%, F1 14.0%" in page.text


def test_staleness_is_a_saw_tooth_with_a_mark_at_each_refresh(page):
    metrics = synthetic.pretrain_metrics()
    swaps = [
        now["step"]
        for last, now in itertools.pairwise(metrics)
        if now["snapshot_step"] != last["snapshot_step"]
    ]
    (hover,) = [
        hover
        for a in page.of_class("plot")
        if (hover := json.loads(a["data-hover"]))["series"][0]["label"] == "staleness"
    ]
    points = hover["series"][0]["points"]
    for step in swaps:  # up to the peak, then down, at the same step
        (peak, low) = [p[1] for p in points if p[0] == step]
        before = next(m for m in metrics if m["step"] == step - 4)["staleness_steps"]
        assert (peak, low) == (before + 4, next(m for m in metrics if m["step"] == step)["staleness_steps"])
    assert len(swaps) == 6
    assert len(page.of_class("mark")) == 3 * 6 + 1  # in the two charts of drift too; the best step on dev
    assert "6 refreshes (vertical lines)" in page.sections["pretraining"]


def test_the_time_line_shows_when_each_index_was_made_and_searched(page):
    made, searched = ([(a["style"], a["title"]) for a in page.of_class(f"span-{color}")] for color in (3, 1))
    # handed over at 60, 120, ... 360 of 400 steps, each in the trainer's hands 22 steps later
    assert [style for style, _ in made] == [f"left:{s / 4:.2f}%;width:5.50%" for s in range(60, 400, 60)]
    assert made[1][1] == "weights of step 120, handed over for drift; in use from step 142"
    starts = [0, 82, 142, 191, 202, 262, 322, 382]
    assert [style for style, _ in searched] == [
        f"left:{start / 4:.2f}%;width:{(end - start) / 4:.2f}%"
        for start, end in itertools.pairwise([*starts, 400])
    ]
    assert searched[3][1] == "2 of 4 shards of step 180, the oldest of step 120"
    assert searched[4][1] == "index of step 180"
    assert "6 times (5 by the schedule, 1 for drift)" in page.sections["pretraining"]


def test_drift_is_drawn_where_it_was_measured(page):
    charts = [json.loads(a["data-hover"]) for a in page.of_class("plot")]
    points = {c["series"][0]["label"]: c["series"][0]["points"] for c in charts}
    measured = [m for m in synthetic.pretrain_metrics() if "probe_overlap" in m]
    assert [p[0] for p in points["overlap"]] == [m["step"] for m in measured] == list(range(20, 401, 20))
    assert [p[1] for p in points["overlap"]] == pytest.approx(
        [100 * m["probe_overlap"] for m in measured], rel=1e-4
    )
    assert [p[1] for p in points["score drift"]] == pytest.approx(
        [m["score_drift"] for m in measured], rel=1e-4
    )
    assert "A measurement took 0.800 s" in page.sections["pretraining"]


def test_an_index_of_mixed_age_has_a_curve_for_its_oldest_shard():
    metrics = synthetic.pretrain_metrics()
    for record in metrics[20:]:
        record["oldest_staleness_steps"] += 60
    page = Page(str(tag("div", refresh_charts(metrics, []))))
    (hover,) = [
        found for a in page.of_class("plot") if len((found := json.loads(a["data-hover"]))["series"]) == 2
    ]
    newest, oldest = hover["series"]
    assert (newest["label"], oldest["label"]) == ("newest shard", "oldest shard")
    assert oldest["points"][-1][1] == newest["points"][-1][1] + 60
    assert page.of_class("lanes") == []  # no refreshes were recorded, so there is no time line


def test_time_and_memory_of_each_stage(page):
    shown = page.sections["cost"]
    assert "12 min 11 s in all" in shown
    for name, spent, peak in [("pretrain", "5 min 05 s", "1.32 GB"), ("corpus", "21 s", "410 MB")]:
        assert f"{name}{spent}" in shown
        assert f"{name}{peak}" in shown
    widths = [a["style"] for a in page.of_class("bar-1")]
    assert widths[3] == "width:100.00%"  # pretrain, 305 s, the longest
    assert widths[5] == "width:24.43%"  # evaluate, 74.5 s


def test_a_stage_run_twice_is_summed(run):
    rows = [{"stage": "pretrain", "seconds": 40.0, "peak_rss_bytes": 5e8}, {"stage": "pretrain", "seconds": 50.0, "peak_rss_bytes": 2e9}]  # fmt: skip
    synthetic.write_lines(run / "stages.jsonl", rows)
    cost = page_of(run).sections["cost"]
    assert "pretrain1 min 30 sin 2 runs" in cost
    assert "pretrain2.00 GB" in cost


def test_throughput_and_waiting(run):
    metrics = [
        {"step": 10, "queries_per_s": 10.0, "step_s": 2.0, "trainer_wait_s": 0.5},
        {"step": 30, "queries_per_s": 30.0, "step_s": 1.0, "trainer_wait_s": 0.0},
    ]
    synthetic.write_lines(run / "pretrain" / "metrics.jsonl", metrics)
    cost = page_of(run).sections["cost"]
    assert "The trainer waited 5.0 s for an index of 40 s of training." in cost  # 10 * 0.5; 10 * 2 + 20 * 1


def test_changed_settings_come_first_with_their_defaults(page):
    changed = {r[0]: r[1:] for r in page.table("changed setting")}
    assert changed == {
        "seed": ["1", "0"],
        "corpus.max_block_tokens": ["96", "288"],
        "pretrain.steps": ["400", "1000"],
        "pretrain.reader_lr": ["0.0002", "3e-05"],
        "refresh.every_steps": ["60", "500"],
    }
    same = {r[0]: r[1] for r in page.table("default setting")}
    assert len(changed) + len(same) == len(flat(synthetic.settings()))
    assert same["pretrain.exclude_trivial"] == "true"


def test_provenance_names_hashes_versions_machine_and_commands(page):
    shown = page.sections["provenance"]
    for fact in (
        "5c0b5c0b5c0b5c0b",
        "77aa77aa77aa77aa",
        "Synthetic CPU",
        "2.9.0, 3.11.2",
        "10,033, 9,871",
        "avx512",
    ):
        assert fact in shown
    assert "realm-fast pretrain runs/demo/run" in shown
    assert "finetune/checkpoints/step-00000300" in shown


# ---- the picture of REALM ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(len(synthetic.SENTENCES)))
def test_rows_add_up_to_the_marginal_and_pushes_to_nothing(which):
    illustration = synthetic.illustration(synthetic.SENTENCES[which])
    for position, marginal in enumerate(illustration["gold_marginal_p"]):
        rows = rows_for(illustration, position)
        assert sum(row.p_z for row in rows) == pytest.approx(1)
        assert sum(row.share for row in rows) == pytest.approx(marginal)
        assert sum(row.push for row in rows) == pytest.approx(0, abs=1e-12)
        assert rows[-1].is_null
        assert [r.p_z for r in rows[:-1]] == sorted((r.p_z for r in rows[:-1]), reverse=True)


def test_many_candidates_share_a_row_and_nothing_is_lost():
    illustration = synthetic.illustration(synthetic.SENTENCES[0])
    model = illustration["candidates"][1]
    scale = 1 / 3
    extra = [model | {"slot": 8 + i, "block_id": 5000 + i, "p_z": model["p_z"] * scale, "gradient": 0.01} for i in range(20)]  # fmt: skip
    illustration["candidates"] += extra
    rows = rows_for(illustration, 0)
    assert len(rows) == 8
    (rest,) = [row for row in rows if row.blocks > 1]
    candidates = illustration["candidates"]
    assert sum(row.blocks for row in rows) == len(candidates) == 28
    assert sum(row.p_z for row in rows) == pytest.approx(sum(c["p_z"] for c in candidates))
    assert sum(row.share for row in rows) == pytest.approx(sum(c["p_z"] * c["gold_p"][0] for c in candidates))
    assert sum(row.push for row in rows) == pytest.approx(-sum(c["gradient"] for c in candidates))
    assert rest.gold_p == pytest.approx(rest.share / rest.p_z)


def test_at_sequence_level_a_row_is_worth_the_product():
    illustration = synthetic.illustration(synthetic.SENTENCES[1])
    rows = {row.block_id: row for row in rows_for(illustration, 1, level="sequence")}
    assert rows[3313].gold_p == pytest.approx(0.93 * 0.98)
    assert rows[66].share == pytest.approx(rows[66].p_z * 0.04 * 0.62)


def test_ribbons_are_as_thick_as_their_probability():
    rows = rows_for(synthetic.illustration(synthetic.SENTENCES[0]), 0)
    out = [float(t) for t in re.findall(r"v([\d.]+)C", fan_out(rows))]
    unit = sum(out)  # of a probability of 1
    assert out == pytest.approx([unit * row.p_z for row in rows], abs=0.02)
    assert max(out) <= 100
    into = {
        kind: [float(t) for t in re.findall(rf'v([\d.]+)C[^"]*" class="ribbon {kind}', fan_in(rows))]
        for kind in ("right", "wrong")
    }
    assert into["right"] == pytest.approx([unit * row.share for row in rows], abs=0.02)
    assert into["wrong"] == pytest.approx([unit * (row.p_z - row.share) for row in rows], abs=0.02)


def test_the_page_shows_each_blocks_numbers_and_direction(page):
    text = page.sections["realm"]
    for sentence_ in synthetic.SENTENCES:
        record = synthetic.illustration(sentence_)
        assert f"from {record['title']} (block {record['origin_block_id']}," in text
        for position, gold in enumerate(record["gold"]):
            assert (
                f"p({gold.removeprefix('##')} | x){probability(record['gold_marginal_p'][position])}" in text
            )
        for c in record["candidates"]:
            assert f"p(z | x) {probability(c['p_z'])}" in text
            arrow = "▲" if c["gradient"] < 0 else "▼"
            assert f"push {arrow} {signed(-c['gradient'])}" in text


def test_the_sentence_drawn_in_full_is_the_one_that_tells_most(page):
    figures = [a["id"] for a in page.of_class("realm")]
    # one hidden token each in 1 and 3; strongest push times probability: 0.37 * 0.37 against 0.68 * 0.11
    assert figures == ["sentence-1", "sentence-2", "sentence-3"]
    assert len(page.of_class("fold")) == 2
    order = [page.sections["realm"].index(f"from {s['title']}") for s in synthetic.SENTENCES]
    assert order == sorted(order)


def test_the_worked_sum_is_the_sum(page):
    record = synthetic.illustration(synthetic.SENTENCES[2])
    text = page.sections["realm"]
    start = text.index("p(collins | x) = ")
    line = text[start : text.index("loss", start)]
    products = re.findall(r"([\d.]+) × ([\d.]+)", line)
    assert len(products) == 3
    others = float(re.search(r"\+ ([\d.]+)2 other blocks", line)[1])
    total = float(re.search(r"= ([\d.]+)\s*$", line)[1])
    assert sum(float(a) * float(b) for a, b in products) + others == pytest.approx(total, rel=0.01)
    assert total == pytest.approx(record["gold_marginal_p"][0], rel=0.005)


def test_retrieval_that_hurts_a_word_is_said_to_make_it_less_likely(run):
    record = synthetic.illustration(synthetic.SENTENCES[0])
    record["null_gold_p"] = [0.9]
    synthetic.write_json(run / "pretrain" / "illustrations.json", [record])
    assert "retrieval makes the hidden word 2.4× less likely here." in page_of(run).sections["realm"]


def test_retrieval_that_changes_nothing_is_said_to(run):
    record = synthetic.illustration(synthetic.SENTENCES[0])
    record["null_gold_p"] = [record["gold_marginal_p"][0] * 1.01]
    synthetic.write_json(run / "pretrain" / "illustrations.json", [record])
    assert "Reading nothing gives 0.37: retrieval hardly changes that." in page_of(run).sections["realm"]


def edge_case(name):
    record = synthetic.illustration(synthetic.SENTENCES[0])
    if name == "null block alone":
        record["candidates"] = [
            record["candidates"][0] | {"p_z": 1.0, "responsibility": 1.0, "gradient": 0.0}
        ]
    elif name == "no null block":
        record["candidates"] = record["candidates"][1:]
        record["null_gold_p"] = None
    elif name == "hopeless":
        record |= {"gold_marginal_p": [0.0], "null_gold_p": [0.0]}
        record["candidates"] = [
            c | {"gold_p": [0.0], "p_z": 0.0, "gradient": 0.0} for c in record["candidates"]
        ]
    elif name == "certain":
        record |= {"gold_marginal_p": [1.0], "null_gold_p": [1.0]}
    elif name == "twelve masks":
        for key in ("gold", "marginal", "gold_marginal_p", "null_gold_p"):
            record[key] = record[key] * 12
        record["query"] = " ".join(["[MASK]"] * 12)
        for c in record["candidates"]:
            c |= {"predictions": c["predictions"] * 12, "gold_p": c["gold_p"] * 12}
    return record


@pytest.mark.parametrize("name", ["null block alone", "no null block", "hopeless", "certain", "twelve masks"])
def test_the_picture_of_an_edge_case_is_whole(run, name):
    synthetic.write_json(run / "pretrain" / "illustrations.json", [edge_case(name)])
    page = page_of(run)
    shown = page.sections["realm"]
    expected = {
        "null block alone": "null blockp(z | x) 1Reads nothing",
        "no null block": "Read the 7 retrieved blocks in full",
        "hopeless": "loss = −ln p = inf",
        "certain": "p(radium | x)1",
        "twelve masks": "10 radium",
    }
    assert expected[name] in shown
    assert ("null block" in shown.split("Average")[1]) == (name != "no null block")
    assert len(page.of_class("tab")) == (10 if name == "twelve masks" else 0)
    assert not re.search(r"\bnan\b", shown)


def test_every_mask_shows_what_it_hides():
    record = {"query": "A [MASK] and [MASK], then [MASK].", "gold": ["b", "##c"], "positions": [1, 3]}
    html = sentence(record)
    assert re.findall(r"<rt>(.*?)</rt>", html)[0] == "b"
    assert html.count("[MASK]<rt>") == 3
    assert html.endswith("<rt>not in the loss</rt></ruby>.")
    tokens = {
        "query": "no masks here",
        "query_tokens": ["a", "x", "##y", "b"],
        "positions": [3],
        "gold": ["q"],
    }
    assert "axy" not in sentence(tokens)
    assert "a xy " in sentence(tokens)
    assert "[MASK]<rt>q</rt>" in sentence(tokens)


@pytest.mark.parametrize(
    ("text", "gold", "marked"),
    [
        ("In Paris , France.", ["paris"], "Paris"),
        ("The city of Budapest.", ["buda", "##pest"], "Budapest"),
        ("Comparison of things", ["paris"], None),
        ("He met New York's mayor in new york", ["new", "york"], "New York"),
        ("x" * 500 + " radium " + "y" * 500, ["radium"], "radium"),
        ("a+b (c)", ["+"], None),
    ],
)
def test_a_snippet_marks_the_hidden_words_as_whole_words(text, gold, marked):
    html = snippet(text, gold)
    assert re.findall(r"<mark>(.*?)</mark>", html) == ([marked] if marked else [])
    assert len(re.sub("<.*?>", "", html)) < 1100


# ---- sample answers ----------------------------------------------------------------------------------------


def test_samples_are_right_and_wrong_ones_with_their_blocks(page):
    shown = page.sections["predictions"]
    kinds = [prediction_kind(p) for p in synthetic.predictions()]
    assert [kinds.count(k) for k in ("right", "partly right", "wrong")] == [5, 2, 5]
    assert "Right 4 of 5" in shown
    assert "Partly right 2 of 2" in shown
    assert "Wrong 4 of 5" in shown
    assert "what is the capital of hungary✓Budapestaccepted: BudapestBudapest is the capital" in shown
    assert "what team does he play for✗no answeraccepted: Real Madridno block" in shown
    assert len(page.of_class("card")) == 10


def test_the_sample_is_a_function_of_the_predictions_alone():
    predictions = synthetic.predictions()
    sample = sample_predictions(predictions)
    assert sample == sample_predictions(predictions[::-1])
    assert [p["score"] for p in sample["right"]] == [9.4, 8.8, 8.0, 7.9]
    assert [p["score"] for p in sample["wrong"]] == [6.5, 5.5, 4.4, 0.3]


def test_blocks_come_from_the_token_store(run, tmp_path):
    store = build_corpus(
        CorpusConfig(source=str(DATA / "user" / "documents.jsonl"), tokenizer=str(DATA / "tokenizer"), num_workers=1),
        tmp_path / "store",
        progress=False,
    )  # fmt: skip
    text = store.text(3)
    answer = text.split()[4]
    start = text.index(answer)
    prediction = synthetic.predictions()[1] | {"block_id": 3, "span": [start, start + len(answer)]}
    synthetic.write_lines(run / "evaluate" / "predictions.jsonl", [prediction])
    manifest = json.loads((run / "run.json").read_text())
    synthetic.write_json(
        run / "run.json", manifest | {"corpus": str(store.path), "corpus_hash": store.corpus_hash}
    )
    html = write_report(run).read_text(encoding="utf-8")
    assert str(tag("mark", answer)) in html
    assert " ".join(text.split()[:4]) in Page(html).sections["predictions"]

    synthetic.write_json(run / "run.json", manifest | {"corpus": str(store.path), "corpus_hash": "0" * 64})
    assert "holds another corpus" in page_of(run).sections["predictions"]
    shutil.rmtree(store.path)
    assert f"the corpus is no longer at {store.path}" in page_of(run).sections["predictions"]


def test_a_span_that_does_not_fit_the_text_is_not_marked(run):
    prediction = synthetic.predictions()[1] | {"span": [5, 5000]}
    synthetic.write_lines(run / "evaluate" / "predictions.jsonl", [prediction])
    html = render(RunData.read(run), lambda block_id: "A short text.")
    assert '<blockquote dir="auto">A short text.</blockquote>' in html


# ---- parts that are missing --------------------------------------------------------------------------------

PARTS = {
    "config.json": "configuration",
    "stages.jsonl": "cost",
    "pretrain/metrics.jsonl": "pretraining",
    "pretrain/evaluations.jsonl": "retrieval",
    "pretrain/illustrations.json": "realm",
    "evaluate/results.json": "answers",
    "evaluate/predictions.jsonl": "predictions",
}


@pytest.mark.parametrize("file", PARTS)
def test_a_missing_part_is_said_to_be_missing(run, file):
    (run / file).unlink()
    page = page_of(run)
    assert f"Not run. There is no {file} in this run." in page.sections[PARTS[file]]
    assert page.text.count("Not run.") == 1


@pytest.mark.parametrize("file", PARTS)
def test_an_empty_part_is_no_crash(run, file):
    synthetic.write_json(run / file, [] if file.endswith("illustrations.json") else {})
    if file.endswith(".jsonl"):
        (run / file).write_bytes(b"")
    if file == "evaluate/results.json":
        synthetic.write_json(run / file, {"checkpoint": "x", "sets": []})
    assert "Not run." not in page_of(run).text


def test_a_run_with_nothing_but_its_manifest_has_a_report(run):
    for child in run.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != "run.json":
            child.unlink()
    shutil.rmtree(run.parent / "corpus")
    page = page_of(run)
    assert page.text.count("Not run.") == len(PARTS)
    assert "Pre-training has not been run" in page.text


def test_finetuning_alone_missing_leaves_its_curves_out(run):
    shutil.rmtree(run / "finetune")
    assert "Fine-tuning loss" not in page_of(run).text


def test_a_run_that_was_evaluated_before_finetuning(run):
    results = synthetic.results()
    for s in results["sets"]:
        s |= {"exact_match": None, "f1": None, "recall": {"1": None, "5": 3.0}, "recall_before": {"5": 2.0}}
    synthetic.write_json(run / "evaluate" / "results.json", results)
    unread = [p | {"prediction": None, "exact_match": None, "f1": None} for p in synthetic.predictions()]
    synthetic.write_lines(run / "evaluate" / "predictions.jsonl", unread)
    page = page_of(run)
    assert "nothing was read: no reader was fine-tuned" in page.sections["predictions"]
    assert page.table("question set", "exact match")[0][3:7] == ["n/a", "n/a", "n/a", "3.0%"]
    assert "What fine-tuning did to the retriever" in page.sections["answers"]
    assert "Asked questions it never saw" not in page.text


def test_a_torn_last_line_of_a_killed_run_is_passed_over(run):
    with open(run / "pretrain" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 404, "lo')
    assert "400 optimizer steps" in page_of(run).text


# ---- malformed input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", r"run\.json: the run's manifest is not valid JSON"),
        ("run.json", "[]", r"run\.json: expected an object, got \[\]"),
        ("run.json", '{"corpus": 3}', r"run\.json: corpus: expected text, got 3"),
        ("config.json", "[1]", r"config\.json: expected an object"),
        ("stages.jsonl", '{"stage": "x"}\n', r"stages\.jsonl:1: seconds is missing"),
        ("stages.jsonl", '{"stage": "x", "seconds": "1"}\n', r'stages\.jsonl:1: seconds: expected a number, got "1"'),
        ("pretrain/metrics.jsonl", '{"step": 1}\n{"step": 2, "loss": "x"}\n', r"metrics\.jsonl:2: loss: expected a number"),
        ("pretrain/metrics.jsonl", '{"step": 1}\nnonsense\n', r"metrics\.jsonl:2: the metrics: expected a JSON object"),
        ("pretrain/metrics.jsonl", '{"loss": 1}\n', r'metrics\.jsonl:1: the metrics: expected a whole number "step"'),
        ("pretrain/metrics.jsonl", '{"step": 1, "skipped": {"a": "b"}}\n', r"metrics\.jsonl:1: skipped\.a: expected a whole number"),
        ("pretrain/evaluations.jsonl", '{"when": "after", "step": 1, "subset": "all", "recall": {"5": 105}}\n', r"evaluations\.jsonl:1: recall\.5: expected a number between 0 and 100, got 105"),
        ("pretrain/evaluations.jsonl", '{"step": 1, "subset": "all"}\n', r"evaluations\.jsonl:1: when is missing"),
        ("pretrain/illustrations.json", "{}", r"illustrations\.json: expected a list, got \{\}"),
        ("pretrain/metrics.jsonl", '{"step": 1, "probe_overlap": 1.2}\n', r"metrics\.jsonl:1: probe_overlap: expected a number between 0 and 1"),
        ("pretrain/refreshes.jsonl", '{"step": 1}\n', r"refreshes\.jsonl:1: event is missing"),
        ("pretrain/refreshes.jsonl", '{"step": 1, "event": "in use"}\n', r"refreshes\.jsonl:1: snapshot_step is missing"),
        ("finetune/metrics.jsonl", '{"step": 1, "reader_loss": true}\n', r"finetune/metrics\.jsonl:1: reader_loss: expected a number, got true"),
        ("evaluate/results.json", "{}", r"results\.json: sets is missing"),
        ("evaluate/results.json", '{"sets": [{"name": "a", "subset": "all", "questions": 1, "exact_match": "50"}]}', r"results\.json: sets\[0\]\.exact_match: expected a number between 0 and 100"),
        ("finetune/evaluations.jsonl", '{"step": 1}\n', r"finetune/evaluations\.jsonl:1: questions is missing"),
        ("evaluate/predictions.jsonl", '{"id": "a"}\n', r"predictions\.jsonl:1: question is missing"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named_with_the_place_in_it(run, file, content, message):
    before = write_report(run).read_bytes()
    (run / file).write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=message) as raised:
        write_report(run)
    assert isinstance(raised.value, RealmFastError)
    assert str(run / file) in str(raised.value)
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": []}, r"\[0\]\.gold: expected at least one token"),
        ({"candidates": []}, r"\[0\]\.candidates: expected at least one"),
        ({"marginal": []}, r"\[0\]\.marginal: expected one entry for each of 1 masked tokens, got 0"),
        ({"gold_marginal_p": [0.1, 0.2]}, r"\[0\]\.gold_marginal_p: expected one entry for each of 1"),
        (
            {"gold_marginal_p": [1.5]},
            r"\[0\]\.gold_marginal_p\[0\]: expected a number between 0 and 1, got 1\.5",
        ),
        ({"query": None}, r"\[0\]\.query: expected text, got null"),
    ],
)
def test_a_malformed_illustration_is_named_with_the_place_in_it(run, change, message):
    record = synthetic.illustration(synthetic.SENTENCES[0]) | change
    synthetic.write_json(run / "pretrain" / "illustrations.json", [record])
    with pytest.raises(CorruptArtifactError, match=r"illustrations\.json: " + message):
        write_report(run)


@pytest.mark.parametrize("field", ["p_z", "gradient", "gold_p", "predictions", "block_id"])
def test_a_malformed_candidate_is_named_with_the_place_in_it(run, field):
    record = synthetic.illustration(synthetic.SENTENCES[0])
    for value in ("x", None):
        record["candidates"][2][field] = value
        synthetic.write_json(run / "pretrain" / "illustrations.json", [record])
        with pytest.raises(CorruptArtifactError, match=rf"\[0\]\.candidates\[2\]\.{field}: expected"):
            write_report(run)
    record["candidates"][2] = record["candidates"][1] | {"gradient": float("nan")}
    synthetic.write_json(run / "pretrain" / "illustrations.json", [record])
    with pytest.raises(CorruptArtifactError, match=r"candidates\[2\]\.gradient: expected a finite number"):
        write_report(run)


def test_no_run_folder_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"not a run folder \(run\.json is missing\)"):
        write_report(tmp_path)


def test_the_schema_tells_numbers_from_truth_values():
    check({"a": 1, "more": 2}, {"a": float}, "w")
    for value, schema in [(True, float), (True, int), (1.0, int), ("1", float), (1, bool)]:
        with pytest.raises(CorruptArtifactError, match=r"^w: a: expected"):
            check({"a": value}, {"a": schema}, "w")


# ---- hostile text ------------------------------------------------------------------------------------------

HOSTILE = (
    "</script></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\x00\ud800\u202e"
)


def poison(value):
    if isinstance(value, dict):
        return {k if k in KEYS else HOSTILE + k: poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return (
        HOSTILE + value
        if isinstance(value, str)
        and value not in ("before", "after", "all", "token", "in use", "handed over")
        else value
    )


# names of the formats, as opposed to names from data
KEYS = set(
    re.findall(
        r"\w+",
        """stage seconds started command peak_rss_bytes details when step questions subset recall skipped loss
        masked_accuracy masked_accuracy_null masked_nll retrieval_utility title level origin_block_id query
        query_tokens positions gold candidates slot block_id text p_z responsibility gradient predictions token p
        gold_p marginal gold_marginal_p null_gold_p checkpoint sets name exact_match f1 notes id question answers
        prediction score span reachable corpus corpus_hash tokenizer_hash realm_fast created machine cpu cores
        cpu_levels python torch platform native compiler cuda event reason snapshot_step oldest_shard_step
        fresh_shards shards best""",
    )
)


def test_hostile_text_stays_text(run):
    clean = page_of(run)
    for file in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        lines = file.read_text(encoding="utf-8").splitlines()
        poisoned = [json.dumps(poison(json.loads(line))) for line in lines]
        file.write_text("".join(line + "\n" for line in poisoned), encoding="utf-8")
    page = Page(render(RunData.read(run), lambda block_id: HOSTILE + synthetic.BLOCKS[block_id][1]))
    assert [name for name, _ in page.elements].count("script") == 1
    assert {name for name, _ in page.elements} <= {name for name, _ in clean.elements} | {"blockquote"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
    visible = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    for section in ("realm", "pretraining", "answers", "predictions", "cost", "configuration", "provenance"):
        assert visible in page.sections[section], section
    assert "\x00" not in page.text
    write_report(run)  # and it can be encoded


def test_hostile_names_in_a_tag_are_escaped():
    assert tag("b", "<i>", title='"x"') == '<b title="&quot;x&quot;">&lt;i&gt;</b>'
    assert tag("p", 1, None, ["a", tag("br")], hidden=True, cls=None) == "<p hidden>1a<br></p>"


# ---- numbers as people read them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (number, 12345, "12,345"), (number, 12345.6, "12,346"), (number, 0.00421, "0.00421"), (number, 0, "0"),
        (number, 3.2e-9, "3.2e−9"), (number, -1.5e12, "−1.5e12"), (number, None, "n/a"), (number, 1.0, "1.00"),
        (number, float("nan"), "nan"), (number, float("inf"), "inf"), (number, -0.5, "−0.500"),
        (percent, 41.27, "41.3%"), (percent, None, "n/a"), (percent, float("nan"), "n/a"), (percent, -1.25, "−1.2%"),
        (probability, 0.4321, "0.43"), (probability, 0.0072, "0.007"), (probability, 0.0001, "<0.001"),
        (probability, 0.99999, ">0.999"), (probability, 1, "1"), (probability, 0.0, "0"), (probability, 0.996, "0.996"),
        (signed, 0.314, "+0.31"), (signed, -0.0042, "−0.004"), (signed, -0.0001, "≈0"), (signed, 0.0, "0"),
        (seconds, 0.44, "0.4 s"), (seconds, 59.6, "1 min 00 s"), (seconds, 185, "3 min 05 s"), (seconds, 7620, "2 h 07 min"),
        (byte_size, 512, "512 B"), (byte_size, 3.2e6, "3.20 MB"), (byte_size, 1.21e9, "1.21 GB"), (byte_size, 5e13, "50.0 TB"),
    ],
)  # fmt: skip
def test_numbers_read_well(function, value, text):
    assert function(value) == text


def test_block_texts_says_why_there_are_none(run):
    assert "no longer at" in block_texts(RunData.read(run)) or "manifest" in block_texts(RunData.read(run))
    manifest = json.loads((run / "run.json").read_text())
    del manifest["corpus"]
    synthetic.write_json(run / "run.json", manifest)
    assert block_texts(RunData.read(run)) == "the run does not say where its corpus is"


def test_span_recall_is_shown_where_it_was_measured(run):
    assert "hidden words that stand in" not in page_of(run).text
    path = run / "pretrain" / "evaluations.jsonl"
    found = {"before": {"1": 15.0, "7": 41.25}, "after": {"1": 17.5, "7": 45.5}}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [record | {"span_recall": found[record["when"]]} for record in records])
    shown = page_of(run).text
    assert "hidden words that stand in the first block found15.0%17.5%+2.5" in shown
    assert "hidden words that stand in one of the first 7 blocks found41.2%45.5%+4.2" in shown


def test_warm_starts_have_a_section_when_they_were_run(run):
    assert "warmstart" not in page_of(run).sections
    ict = {"sentences": 256, "blocks": 10_033}
    lines(run / "ict" / "evaluations.jsonl", [
        {"when": "before", "step": 0, **ict, "recall": {"20": 5.0, "1": 1.5}},
        {"when": "after", "step": 250, **ict, "recall": {"20": 61.7, "1": 23.4}},
    ])  # fmt: skip
    names = ("evidence", "null", "distractor", "random")
    reading = dict.fromkeys((f"accuracy_{name}" for name in names), 0.0)
    counts = {"queries": 256, "spans": 61_894, "spans_with_evidence": 34_301}
    nll = {"nll_evidence": 2.77, "nll_null": 3.96, "nll_distractor": 4.02, "nll_random": 5.41}
    lines(run / "warmup" / "evaluations.jsonl", [
        {"when": "after", "step": 900, **counts, **nll, **reading | {"accuracy_evidence": 0.412}}
    ])  # fmt: skip
    shown = page_of(run).sections["warmstart"]
    assert shown.index("@1") < shown.index("@20")
    assert "before (step 0)1.55.0" in shown
    assert "after (step 250)23.461.7" in shown
    assert "2.773.964.025.4141.20.00.00.0" in shown
    assert "34,301 of 61,894 salient spans" in shown
    old = {name: value for name, value in (counts | nll | reading).items() if "distractor" not in name}
    lines(run / "warmup" / "evaluations.jsonl", [{"when": "after", "step": 900, **old}])
    assert "2.773.96–5.410.00.0–0.0" in page_of(run).sections["warmstart"]  # of before there were distractors
    lines(run / "ict" / "evaluations.jsonl", [{"when": "before", "step": 0, **ict, "recall": {"1": 120}}])
    with pytest.raises(CorruptArtifactError, match=r"recall.1: expected a number between 0 and 100, got 120"):
        page_of(run)


def lines(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
