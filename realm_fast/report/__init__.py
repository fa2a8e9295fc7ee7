"""`report.html`: one self-contained page that says what a run did and what came of it.

    write_report("runs/demo/run")       # -> runs/demo/run/report.html

The page needs no network, no JavaScript and no other file. Parts of the run that were not done are said to
be missing; a malformed file is an error that names it. Where what is:

    data.py            the run folder, read and checked
    markup.py          HTML escaped by construction, numbers as people read them
    charts.py          curves, before and after, bars: inline SVG
    illustration.py    the picture of REALM itself
    summary.py, warmstart.py, training.py, answers.py, record.py      the sections, in the page's order
    refreshes.py       staleness, drift and the time line of refreshes, part of training.py's section
    ../assets/         report.css and report.js, put into the page
"""

import base64
import hashlib
import importlib.resources
from collections.abc import Callable
from pathlib import Path

from realm_fast.errors import RealmFastError
from realm_fast.files import atomic_file
from realm_fast.report.answers import answers, sample_answers
from realm_fast.report.data import RunData
from realm_fast.report.illustration import realm
from realm_fast.report.markup import raw, tag
from realm_fast.report.record import configuration, cost, provenance
from realm_fast.report.summary import summary
from realm_fast.report.training import pretraining, what_changed
from realm_fast.report.warmstart import warm_starts

__all__ = ["block_texts", "render", "write_report"]


def write_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run, atomically, and returns its path.

    Args:
        run_folder: an existing run; stages that were not run are left out with a word.
        out: where to; RUN/report.html by default.

    Raises:
        DataError: there is no such run folder, or `out` cannot be written.
        CorruptArtifactError: a file of the run is malformed; the message names it and the place in it.
    """
    data = RunData.read(run_folder)
    page = render(data, block_texts(data))
    path = Path(out) if out is not None else data.path / "report.html"
    with atomic_file(path, "w") as file:
        file.write(page)
    return path


def render(data: RunData, text_of: Callable[[int], str] | str) -> str:
    """The whole page.

    Args:
        data: the run.
        text_of: a block's text by its id, or why blocks cannot be read.
    """
    sections = [
        ("realm", "REALM in one picture", realm(data)),
        *([("warmstart", "Warm starts", warm)] if (warm := warm_starts(data)) else []),
        ("pretraining", "Pre-training", pretraining(data)),
        ("retrieval", "What pre-training changed", what_changed(data)),
        ("answers", "Answering questions", answers(data)),
        ("predictions", "Sample answers, right and wrong", sample_answers(data, text_of)),
        ("cost", "What it cost", cost(data)),
        ("configuration", "Configuration", configuration(data)),
        ("provenance", "Provenance", provenance(data)),
    ]
    css, script = _asset("report.css"), _asset("report.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; img-src data:"
    )
    name = "/".join(data.path.resolve().parts[-2:])
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"REALM run {name}"),
        tag("style", raw(css)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "realm_fast · report of run ", tag("b", name), cls="eyebrow"),
            tag("h1", "Learning to look things up"),
            summary(data),
            tag(
                "nav",
                [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections],
                aria_label="Sections",
            ),
            cls="top",
        ),
        tag(
            "main",
            [
                tag("section", tag("h2", title), content, id=anchor, cls=f"part-{anchor}")
                for anchor, title, content in sections
            ],
        ),
        tag(
            "footer",
            "Written by realm_fast ",
            str(data.manifest.get("realm_fast", "")),
            ". One file: it loads nothing from anywhere.",
        ),
        tag("script", raw(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def block_texts(data: RunData) -> Callable[[int], str] | str:
    """A function from a block's id to its text, or the reason why there is none."""
    where = data.manifest.get("corpus")
    if not where or data.corpus is None:
        return f"the corpus is no longer at {where}" if where else "the run does not say where its corpus is"
    from realm_fast.token_store import TokenStore

    try:
        store = TokenStore.open(Path(where))
    except RealmFastError as error:
        return str(error)
    if store.corpus_hash != data.manifest.get("corpus_hash"):
        return f"{where} holds another corpus than the one this run was made from"

    def text_of(block_id: int) -> str:
        return store.text(block_id) if 0 <= block_id < len(store) else ""

    return text_of


def _asset(name: str) -> str:
    return (importlib.resources.files("realm_fast") / "assets" / name).read_text(encoding="utf-8")
