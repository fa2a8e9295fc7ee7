"""The report's centrepiece: REALM itself, drawn for one masked sentence with the numbers of the run.

    sentence with [MASK]  ->  blocks, p(z|x)  ->  guesses, p(y|x,z)  ->  the marginal, p(y|x)  ->  the push

Probability flows from left to right as ribbons whose thickness is its amount: the whole (1) fans out over
the blocks, each block's part splits into what its guess gave the hidden word and the rest, and the parts
meet again in the marginal. On the right, each block's push: minus the loss's gradient by its score.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from realm_fast.report.data import Record, RunData
from realm_fast.report.markup import Markup, count, join, number, probability, signed, tag
from realm_fast.report.parts import excerpt, missing
from realm_fast.report.ribbons import Row, fan_in, fan_out

NULL = tag("span", "∅", cls="empty")
MAX_ROWS = 8  # blocks drawn one by one; the others share a row
MAX_TABS = 10  # masked tokens with a view of their own (the published max_masks)
SNIPPET_CHARS = 150


def rows_for(illustration: Record, position: int, *, level: str = "token") -> list[Row]:
    """The candidates as rows: best p(z|x) first, what is left over in one row, the null block last.

    Args:
        position: which masked token, counted from 0.
        level: "token" looks at that token alone; "sequence" at the product over all masked tokens.
    """

    def row(candidate: Record) -> Row:
        gold_p = math.prod(candidate["gold_p"]) if level == "sequence" else candidate["gold_p"][position]
        return Row(
            candidate["title"],
            candidate["text"],
            candidate["block_id"],
            candidate["p_z"],
            gold_p,
            candidate["p_z"] * gold_p,
            candidate["responsibility"],
            -candidate["gradient"],
            tuple((guess["token"], guess["p"]) for guess in candidate["predictions"][position]),
        )

    rows = [row(candidate) for candidate in illustration["candidates"]]
    null = [r for r in rows if r.is_null]
    real = sorted((r for r in rows if not r.is_null), key=lambda r: -r.p_z)
    room = MAX_ROWS - len(null)
    if len(real) > room:
        real, rest = real[: room - 1], real[room - 1 :]
        p_z, share = sum(r.p_z for r in rest), sum(r.share for r in rest)
        real.append(
            Row(
                "",
                "",
                -1,
                p_z,
                share / p_z if p_z > 0 else 0.0,
                share,
                sum(r.responsibility for r in rest),
                sum(r.push for r in rest),
                (),
                len(rest),
            )
        )
    return real + null


def realm(data: RunData) -> Markup:
    """The section: the idea, one sentence drawn in full, the others folded."""
    if data.illustrations is None:
        return join(
            [primer(), missing("pretrain/illustrations.json", "Pre-training writes it when it ends.")]
        )
    if not data.illustrations:
        return join(
            [primer(), tag("p", "No sentence was followed (pretrain.illustrations = 0).", cls="missing")]
        )
    first, *others = sorted(
        enumerate(data.illustrations), key=lambda pair: _tells_most(pair[1]), reverse=True
    )
    return join(
        [
            primer(),
            illustration_figure(first[1], f"sentence-{first[0] + 1}"),
            tag("h3", "More sentences") if others else None,
            [
                tag(
                    "details",
                    tag("summary", summary_line(record)),
                    illustration_figure(record, f"sentence-{index + 1}", with_sentence=False),
                    cls="fold",
                )
                for index, record in sorted(others)
            ],
            tag(
                "p",
                "Drawn in full is, of the sentences with the fewest hidden tokens, the one with the largest "
                "product of its strongest push and the probability of what it hides; none is left out. "
                "▲ and ▼ show minus the gradient of the loss by each block’s score, averaged over the hidden "
                "tokens.",
                cls="note",
            ),
        ]
    )


def _tells_most(illustration: Record) -> tuple[int, float]:
    """Larger for a sentence that is easy to follow: few hidden tokens, a likely word, blocks pushed hard."""
    push = max(abs(candidate["gradient"]) for candidate in illustration["candidates"])
    return -len(illustration["gold"]), push * _geometric_mean(illustration["gold_marginal_p"])


def primer() -> Markup:
    """The idea in a few sentences and one formula, for who has not read the paper."""
    return tag(
        "div",
        tag(
            "p",
            "A word is hidden in a sentence and the model must guess it, but before guessing it may look "
            "something up. The ",
            tag("b", "retriever", cls="c-retrieve"),
            " gives every block of text a probability of being useful, ",
            tag("span", "p(z | x)", cls="math c-retrieve"),
            "; the ",
            tag("b", "reader", cls="c-read"),
            " guesses once for each of the best blocks, having read it, ",
            tag("span", "p(y | x, z)", cls="math c-read"),
            "; and the guesses are averaged, each weighted by its block’s probability:",
        ),
        tag(
            "p",
            tag("span", "p(y | x)", cls="c-gold"),
            " = ",
            tag("span", "Σ", tag("sub", "z"), cls="sigma"),
            " ",
            tag("span", "p(z | x)", cls="c-retrieve"),
            " × ",
            tag("span", "p(y | x, z)", cls="c-read"),
            cls="formula",
        ),
        tag(
            "p",
            "Training makes this average larger for the word that was hidden. Nobody says which block is the "
            "right one; the gradient finds out. A block whose guess was ",
            tag("b", "better than the average is pushed up", cls="c-up"),
            ", one whose guess was ",
            tag("b", "worse is pushed down", cls="c-down"),
            ". So the retriever learns what is worth reading from text with holes in it alone. The "
            "null block (∅) is the choice to read nothing: a block must beat it to be worth retrieving.",
        ),
        cls="prose primer",
    )


def illustration_figure(illustration: Record, name: str, *, with_sentence: bool = True) -> Markup:
    """One masked sentence, followed through the model.

    Args:
        illustration: one record of illustrations.json, checked.
        name: unique on the page; prefixes every id.
        with_sentence: False where the sentence stands above already.
    """
    gold, level = illustration["gold"], illustration.get("level", "token")
    shown = min(len(gold), MAX_TABS)
    panels = [_panel(illustration, position, level) for position in range(shown)]
    body: Markup = panels[0]
    if len(panels) > 1:
        inputs = [
            tag("input", type="radio", name=name, id=f"{name}-{m}", cls="tab", checked=m == 0)
            for m in range(shown)
        ]
        labels = [
            tag("label", f"{m + 1} ", tag("b", wordpiece(gold[m])), for_=f"{name}-{m}") for m in range(shown)
        ]
        body = tag(
            "div",
            inputs,
            tag("div", tag("span", "Hidden tokens:", cls="tabs-title"), labels, cls="tabs"),
            tag("div", [tag("div", panel, cls="panel") for panel in panels], cls="panels"),
            cls="tabbed",
        )
    return tag(
        "article",
        tag("p", sentence(illustration), cls="sentence", dir="auto") if with_sentence else None,
        tag("p", _origin(illustration), cls="origin"),
        body,
        _full_blocks(illustration),
        cls="realm",
        id=name,
    )


def summary_line(illustration: Record) -> Markup:
    """The folded form of a figure: the sentence, shortened, and what retrieval did for it."""
    null = illustration.get("null_gold_p")
    gold_p = illustration["gold_marginal_p"]
    return join(
        [
            tag("span", sentence(illustration), cls="fold-sentence", dir="auto"),
            tag(
                "span",
                "p(hidden): ",
                f"{probability(_geometric_mean(null))} without retrieval → " if null else None,
                tag("b", probability(_geometric_mean(gold_p))),
                cls="fold-numbers",
            ),
        ]
    )


def sentence(illustration: Record) -> Markup:
    """The sentence; above each [MASK] what it hides."""
    gold = illustration["gold"]
    parts = illustration["query"].split("[MASK]")
    if len(parts) - 1 < len(gold):  # the text does not show its masks: fall back on the tokens
        tokens = illustration.get("query_tokens") or []
        text = " ".join(
            "[MASK]" if i in illustration["positions"] else token for i, token in enumerate(tokens)
        )
        parts = text.replace(" ##", "").split("[MASK]")
    pieces: list[Any] = [parts[0]]
    for place, part in enumerate(parts[1:]):
        hidden = wordpiece(gold[place]) if place < len(gold) else "not in the loss"
        pieces += [tag("ruby", "[MASK]", tag("rt", hidden), cls="mask"), part]
    return join(pieces)


def wordpiece(token: str) -> Markup:
    """A token as text, the ## of a word's later pieces made faint."""
    if token.startswith("##") and len(token) > 2:
        return tag("span", tag("span", "##", cls="faint"), token[2:], title="continues the word before")
    return join([token])


def words(tokens: Sequence[str]) -> str:
    """Wordpieces as text: ["par", "##is", ",", "france"] -> "paris , france"."""
    return " ".join(tokens).replace(" ##", "")


def snippet(text: str, tokens: Sequence[str]) -> Markup:
    """A few lines of a block, around the hidden words and with them marked, if it has them."""
    text = " ".join(text.split())
    return excerpt(text, _occurrence(text, tokens), SNIPPET_CHARS)


# ---- one view ----------------------------------------------------------------------------------------------


def _panel(illustration: Record, position: int, level: str) -> Markup:
    rows = rows_for(illustration, position, level=level)
    gold = illustration["gold"]
    several = len(gold) > 1
    marginal = (
        sum(row.share for row in rows) if level == "sequence" else illustration["gold_marginal_p"][position]
    )
    whole = level == "sequence" and several
    name = words(gold) if whole else gold[position].removeprefix("##")
    null_gold_p = illustration.get("null_gold_p")
    null_p = None
    if null_gold_p:
        null_p = math.prod(null_gold_p) if whole else null_gold_p[position]
    strongest = max((abs(row.push) for row in rows), default=0.0) or 1.0
    head = tag(
        "div",
        _step(1, "Ask", "x", "the sentence", "ask"),
        _step(2, "Retrieve", "p(z | x)", "how useful does each block look?", "retrieve"),
        _step(3, "Read", "p(y | x, z)", "what is hidden, having read this block?", "read"),
        tag("div", cls="step-gap"),
        _step(4, "Average", "p(y | x)", "the guesses, weighted", "gold"),
        _step(5, "Learn", "r − p(z | x)", "which blocks helped?", "learn"),
        cls="flow-head",
        aria_hidden="true",
    )
    cells: list[Markup] = [
        tag("div", fan_out(rows), cls="fan fan-out", style=f"grid-row:1/span {len(rows)}"),
        tag("div", fan_in(rows), cls="fan fan-in", style=f"grid-row:1/span {len(rows)}"),
    ]
    for place, row in enumerate(rows):
        style = f"grid-row:{place + 1}"
        cls = f"row-{place}" + (" null" if row.is_null else " rest" if row.blocks > 1 else "")
        cells += [
            tag("div", _block_cell(row, gold), cls=f"cell-block {cls}", style=style, data_row=place),
            tag("div", _guess_cell(row, gold[position]), cls=f"cell-read {cls}", style=style, data_row=place),
            tag("div", _learn_cell(row, strongest), cls=f"cell-learn {cls}", style=style, data_row=place),
        ]
    cells.append(
        tag(
            "div",
            _marginal_box(illustration, position, name, marginal, null_p, whole),
            cls="cell-marginal",
            style=f"grid-row:1/span {len(rows)}",
        )
    )
    return join(
        [head, tag("div", cells, cls="flow"), _worked_formula(rows, name, marginal, len(gold), level, whole)]
    )


def _step(place: int, verb: str, formula: str, question: str, cls: str) -> Markup:
    return tag(
        "div",
        tag("span", place, cls="step-number"),
        tag("b", verb),
        " ",
        tag("span", formula, cls=f"math c-{cls}"),
        tag("small", question),
        cls=f"step step-{cls}",
    )


def _block_cell(row: Row, gold: Sequence[str]) -> Markup:
    bar = tag(
        "span",
        tag("span", cls="fill", style=f"width:{100 * row.p_z:.2f}%"),
        cls="pbar",
    )
    head_p = tag("span", tag("span", "p(z | x) ", cls="cell-name"), probability(row.p_z), cls="p c-retrieve")
    if row.blocks > 1:
        title: Any = count(row.blocks, "more block")
        text: Any = "taken together; each is listed below"
    elif row.is_null:
        title, text = join([NULL, " null block"]), "Reads nothing: what the model knows by heart."
    else:
        title = join([row.title or "untitled", tag("small", f" block {row.block_id}")])
        text = snippet(row.text, gold)
    return join(
        [
            tag("div", tag("span", title, cls="block-title", dir="auto"), head_p, cls="block-head"),
            bar,
            tag("p", text, cls="snippet", dir="auto"),
        ]
    )


def _guess_cell(row: Row, gold: str) -> Markup:
    lines: list[tuple[str, float]] = list(row.guesses[:3])
    if gold not in [token for token, _ in lines]:
        lines = [*lines[:3], (gold, row.gold_p)]
    if row.blocks > 1:
        lines = [(gold, row.gold_p)]
    return tag("ul", [_guess(token, p, token == gold) for token, p in lines], cls="guesses")


def _guess(token: str, p: float, is_gold: bool) -> Markup:
    return tag(
        "li",
        tag("span", wordpiece(token), cls="token"),
        tag("span", tag("span", cls="fill", style=f"width:{100 * min(p, 1):.2f}%"), cls="gbar"),
        tag("span", probability(p), cls="gp"),
        cls="gold" if is_gold else None,
    )


def _learn_cell(row: Row, strongest: float) -> Markup:
    direction = "up" if row.push > 0 else "down" if row.push < 0 else "still"
    arrow = {"up": "▲", "down": "▼", "still": "•"}[direction]
    width = f"{50 * abs(row.push) / strongest:.2f}%"
    return join(
        [
            tag(
                "div",
                tag("span", cls=f"fill {direction}", style=f"width:{width}"),
                cls="push",
            ),
            tag(
                "div",
                tag("span", "push ", cls="cell-name"),
                tag("b", f"{arrow} {signed(row.push)}", cls=f"c-{direction}"),
                cls="push-value",
            ),
        ]
    )


def _marginal_box(
    illustration: Record, position: int, name: str, marginal: float, null_p: float | None, whole: bool
) -> Markup:
    gold = illustration["gold"][position]
    guesses = [(guess["token"], guess["p"]) for guess in illustration["marginal"][position]][:4]
    if gold not in [token for token, _ in guesses]:
        guesses.append((gold, illustration["gold_marginal_p"][position]))
    lift = None
    if null_p is not None and null_p > 0 and marginal > 0:
        ratio = marginal / null_p
        effect: list[Any] = ["retrieval hardly changes that."]
        if ratio > 1.05:
            effect = ["retrieval makes the hidden word ", tag("b", f"{_times(ratio)} likelier"), "."]
        elif ratio < 0.95:
            effect = [
                "retrieval makes the hidden word ",
                tag("b", f"{_times(1 / ratio)} less likely"),
                " here.",
            ]
        lift = tag("p", "Reading nothing gives ", tag("b", probability(null_p)), ": ", effect, cls="lift")
    return join(
        [
            tag("p", "p(", tag("b", name), " | x)", cls="marginal-name"),
            tag("p", probability(marginal), cls="marginal-value c-gold"),
            lift,
            tag(
                "ul",
                [_guess(token, p, token == gold) for token, p in guesses],
                cls="guesses marginal-guesses",
                aria_label="top guesses, averaged" + (" (this token)" if whole else ""),
            ),
        ]
    )


def _worked_formula(
    rows: Sequence[Row], name: str, marginal: float, tokens: int, level: str, whole: bool
) -> Markup:
    """The sum and one push, with this sentence's numbers in place of the letters."""
    top = sorted(rows, key=lambda row: -row.share)
    shown, rest = top[:3], top[3:]
    terms: list[Any] = []
    for row in shown:
        terms += [
            " + " if terms else None,
            tag(
                "span",
                tag("span", _brief(row.p_z), cls="c-retrieve"),
                " × ",
                tag("span", _brief(row.gold_p), cls="c-read"),
                tag("small", _short_name(row)),
                cls="factor",
            ),
        ]
    if rest:
        others = sum(row.blocks for row in rest)
        terms += [
            " + ",
            tag(
                "span",
                _brief(sum(row.share for row in rest)),
                tag("small", count(others, "other block")),
                cls="factor",
            ),
        ]
    loss = -math.log(marginal) if marginal > 0 else math.inf
    sum_line = tag(
        "p",
        tag("span", f"p({name} | x) = ", cls="left"),
        terms,
        tag("span", " = ", tag("b", _brief(marginal), cls="c-gold"), cls="nowrap"),
        tag("span", f"   loss = −ln p = {loss:.2f}", cls="loss-part"),
        cls="worked",
    )
    single = [row for row in rows if row.blocks == 1 and row.push != 0]
    extremes = {max(single, key=_push), min(single, key=_push)} if single else set()
    mean = tokens > 1 and level == "token"
    lines = [_worked_push(row, name, marginal, mean) for row in sorted(extremes, key=_push, reverse=True)]
    return tag("div", tag("p", "With the numbers filled in", cls="eyebrow"), sum_line, lines, cls="numbers")


def _worked_push(row: Row, name: str, marginal: float, mean: bool) -> Markup:
    """One block's credit and push in a sentence; `mean` where the credit is a mean over hidden tokens."""
    direction, arrow = ("up", "▲") if row.push > 0 else ("down", "▼")
    retrieved = tag("span", _brief(row.p_z), cls="c-retrieve")
    if mean:
        credit: list[Any] = [_brief(row.responsibility), " of the hidden tokens’ probability (mean)"]
    else:
        product = [retrieved, " × ", tag("span", _brief(row.gold_p), cls="c-read")]
        credit = [
            product,
            " / ",
            tag("span", _brief(marginal), cls="c-gold"),
            f" = {_brief(row.responsibility)}",
        ]
        credit.append(f" of p({name})")
    return tag(
        "p",
        tag("b", _short_name(row)),
        " supplied r = ",
        credit,
        "; the retriever had given it ",
        retrieved,
        ". Push = r − p(z | x) = ",
        tag("b", f"{signed(row.push)} {arrow}", cls=f"c-{direction} nowrap"),
        cls="worked",
    )


def _brief(p: float) -> str:
    """Three significant digits, so that a reader who checks a sum finds it right."""
    text = number(float(p))
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _push(row: Row) -> float:
    return row.push


def _origin(illustration: Record) -> Markup:
    return join(
        [
            "from ",
            tag("b", illustration["title"] or "untitled"),
            f" (block {illustration['origin_block_id']}, which may not be retrieved for its own sentence)"
            f" · optimizer step {illustration['step']:,}",
        ]
    )


def _full_blocks(illustration: Record) -> Markup:
    items = [
        tag(
            "li",
            tag("b", c["title"] or "untitled"),
            tag(
                "small",
                f" block {c['block_id']} · p(z | x) = {probability(c['p_z'])}"
                f" · push {signed(-c['gradient'])}",
            ),
            tag("p", c["text"], dir="auto"),
        )
        for c in sorted(illustration["candidates"], key=lambda c: -c["p_z"])
        if c["block_id"] != -1
    ]
    if not items:
        return join([])
    return tag(
        "details",
        tag("summary", f"Read the {count(len(items), 'retrieved block')} in full"),
        tag("ol", items),
        cls="blocks",
    )


# ---- text --------------------------------------------------------------------------------------------------


def _occurrence(text: str, tokens: Sequence[str]) -> tuple[int, int] | None:
    """Where the hidden words stand in a text, whole words, upper and lower case alike."""
    phrase = words(tokens)
    wanted = [phrase, *sorted((w for w in phrase.split() if len(w) > 2), key=len, reverse=True)]
    for candidate in wanted:
        pattern = r"\s*".join(re.escape(word) for word in candidate.split())
        found = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) if pattern else None
        if found:
            return found.span()
    return None


def _short_name(row: Row) -> str:
    if row.blocks > 1:
        return count(row.blocks, "more block")
    name = "∅" if row.is_null else row.title or f"block {row.block_id}"
    return name if len(name) <= 28 else name[:26].rstrip() + "…"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×" if ratio < 1e6 else "over a million ×"


def _geometric_mean(values: Sequence[float]) -> float:
    if not values or min(values) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, values)) / len(values))
