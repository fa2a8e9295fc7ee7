"""A made-up run folder, in the formats of a real one, for the report's tests and for working on its looks.

    python tests/synthetic_run.py FOLDER        # writes the run and its report.html

The texts are true sentences; every number is invented, but consistent: the marginals are the sums of their
parts, responsibilities are posteriors, gradients are p(z|x) less the responsibility.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

CORPUS_BLOCKS = 10_033

BLOCKS = {
    811: ("Marie Curie", "Marie Curie was a Polish and naturalised-French physicist and chemist who conducted pioneering research on radioactivity. She was the first woman to win a Nobel Prize, the first person to win it twice, and the only person to win it in two sciences."),
    2207: ("Polonium", "Polonium is a chemical element with the symbol Po and atomic number 84. It was discovered in July 1898 by Marie Skłodowska-Curie and Pierre Curie, and named after Marie's homeland of Poland."),
    7310: ("Warsaw", "Warsaw is the capital and largest city of Poland. It stands on the River Vistula in east-central Poland, and its population is officially estimated at 1.86 million residents."),
    518: ("Radium", "Radium is a chemical element with the symbol Ra. It was discovered by Marie and Pierre Curie in 1898 from ore mined at Jáchymov, in the form of radium chloride."),
    9021: ("Nobel Prize in Physics", "The Nobel Prize in Physics is awarded by the Royal Swedish Academy of Sciences to those who have made the most outstanding contributions to mankind in the field of physics."),
    4401: ("Henri Becquerel", "Antoine Henri Becquerel was a French engineer and physicist, and the first person to discover evidence of radioactivity. He shared the 1903 Nobel Prize in Physics with Marie and Pierre Curie."),
    129: ("Geiger counter", "A Geiger counter is an instrument used for detecting and measuring ionizing radiation. It is widely used in radiation dosimetry, experimental physics and the nuclear industry."),
    3312: ("Danube", "The Danube is the second-longest river in Europe, after the Volga. It flows through ten countries and four national capitals: Vienna, Bratislava, Budapest and Belgrade."),
    3313: ("Budapest", "Budapest is the capital and most populous city of Hungary, and the largest city on the river Danube. It was formed in 1873 by the unification of Buda and Pest."),
    66: ("Vienna", "Vienna is the capital, largest city, and one of nine states of Austria. It lies on the Danube, near the borders of the Czech Republic, Slovakia and Hungary."),
    1500: ("Volga", "The Volga is the longest river in Europe, flowing through Central Russia to Southern Russia and into the Caspian Sea."),
    8123: ("Rhine", "The Rhine is one of the major European rivers. It begins in the Swiss canton of Graubünden and empties into the North Sea in the Netherlands."),
    91: ("Apollo 11", "Apollo 11 was the American spaceflight that first landed humans on the Moon. Commander Neil Armstrong and lunar module pilot Buzz Aldrin landed the Apollo Lunar Module Eagle on July 20, 1969."),
    92: ("Neil Armstrong", "Neil Alden Armstrong was an American astronaut and aeronautical engineer who in 1969 became the first person to walk on the Moon. He was also a naval aviator, test pilot and university professor."),
    93: ("Michael Collins (astronaut)", "Michael Collins was an American astronaut who flew the Apollo 11 command module Columbia around the Moon in 1969 while his crewmates made the first crewed landing on the surface."),
    94: ("Moon landing", "A Moon landing is the arrival of a spacecraft on the surface of the Moon. The first human-made object to touch the Moon was Luna 2 in 1959."),
}  # fmt: skip

# sentence, origin block, hidden tokens, their place among the sentence's tokens, and for each candidate:
# score, then for each hidden token its probability and the block's best guesses
SENTENCES: list[dict[str, Any]] = [
    {
        "title": "Pierre Curie",
        "origin": 655,
        "query": "In December 1898 the Curies announced the discovery of a second new element, [MASK], which glowed faintly in the dark.",
        "gold": ["radium"],
        "candidates": {
            -1: (2.1, [("uranium", 0.17), ("oxygen", 0.11), ("helium", 0.09), ("radium", 0.06), ("carbon", 0.03)]),
            518: (4.1, [("radium", 0.83), ("polonium", 0.05), ("uranium", 0.02), ("radon", 0.02), ("thorium", 0.01)]),
            2207: (4.3, [("polonium", 0.58), ("radium", 0.16), ("uranium", 0.05), ("lead", 0.02), ("po", 0.02)]),
            811: (3.6, [("radium", 0.31), ("polonium", 0.24), ("uranium", 0.08), ("helium", 0.02), ("gold", 0.01)]),
            4401: (3.0, [("uranium", 0.38), ("radium", 0.12), ("thorium", 0.05), ("phosphorus", 0.04), ("radon", 0.02)]),
            129: (1.3, [("radiation", 0.15), ("uranium", 0.11), ("gas", 0.08), ("helium", 0.05), ("argon", 0.03)]),
            9021: (1.1, [("physics", 0.12), ("uranium", 0.10), ("oxygen", 0.06), ("helium", 0.05), ("silver", 0.02)]),
            7310: (0.2, [("silver", 0.10), ("uranium", 0.09), ("copper", 0.06), ("gold", 0.06), ("iron", 0.05)]),
        },
    },
    {
        "title": "Hungary",
        "origin": 3400,
        "query": "The capital, [MASK] [MASK], lies on both banks of the Danube and is home to a fifth of the country's people.",
        "gold": ["buda", "##pest"],
        "candidates": {
            -1: (1.9, [("vienna", 0.14), ("buda", 0.11), ("prague", 0.06), ("sofia", 0.05), ("it", 0.04)], [("##pest", 0.81), (",", 0.04), ("##va", 0.02), ("city", 0.01), ("##n", 0.01)]),
            3313: (4.9, [("buda", 0.93), ("pest", 0.02), ("vienna", 0.01), ("hungary", 0.01), ("it", 0.01)], [("##pest", 0.98), ("##s", 0.01), (",", 0.01), ("city", 0.001), ("##n", 0.001)]),
            3312: (4.6, [("vienna", 0.35), ("belgrade", 0.22), ("buda", 0.19), ("bratislava", 0.12), ("it", 0.01)], [("##pest", 0.90), (",", 0.05), ("##va", 0.01), ("city", 0.01), ("##n", 0.01)]),
            66: (4.4, [("vienna", 0.82), ("buda", 0.04), ("linz", 0.02), ("graz", 0.02), ("it", 0.01)], [("##pest", 0.62), (",", 0.20), ("##va", 0.02), ("city", 0.02), ("##n", 0.01)]),
            1500: (2.2, [("moscow", 0.21), ("kazan", 0.09), ("buda", 0.06), ("samara", 0.05), ("it", 0.03)], [("##pest", 0.75), (",", 0.06), ("##va", 0.02), ("city", 0.01), ("##n", 0.01)]),
            8123: (2.0, [("basel", 0.20), ("cologne", 0.10), ("buda", 0.05), ("bonn", 0.05), ("it", 0.03)], [("##pest", 0.77), (",", 0.05), ("##va", 0.02), ("city", 0.01), ("##n", 0.01)]),
        },
    },
    {
        "title": "Space Race",
        "origin": 95,
        "query": "While his crewmates walked on the surface, [MASK] orbited alone in the command module Columbia.",
        "gold": ["collins"],
        "candidates": {
            -1: (3.0, [("he", 0.22), ("armstrong", 0.15), ("aldrin", 0.09), ("young", 0.04), ("collins", 0.03)]),
            91: (4.8, [("armstrong", 0.41), ("aldrin", 0.33), ("eagle", 0.06), ("collins", 0.05), ("he", 0.02)]),
            92: (4.5, [("armstrong", 0.79), ("he", 0.05), ("neil", 0.03), ("aldrin", 0.02), ("scott", 0.01)]),
            93: (3.2, [("collins", 0.91), ("michael", 0.02), ("he", 0.01), ("armstrong", 0.01), ("aldrin", 0.01)]),
            94: (2.8, [("he", 0.12), ("armstrong", 0.10), ("luna", 0.06), ("aldrin", 0.05), ("surveyor", 0.02)]),
        },
    },
]  # fmt: skip

QUESTIONS = [
    ("nq.test/12", "who was the first person to walk on the moon", ["Neil Armstrong"], "Neil Alden Armstrong", 0, 0.8, 92, 5.1, True),
    ("nq.test/88", "what is the capital of hungary", ["Budapest"], "Budapest", 1, 1.0, 3313, 9.4, True),
    ("nq.test/93", "which is the longest river in europe", ["Volga", "the Volga"], "The Volga", 1, 1.0, 1500, 8.8, True),
    ("nq.test/140", "when did the first humans land on the moon", ["July 20, 1969", "1969"], "July 20, 1969", 1, 1.0, 91, 7.9, True),
    ("nq.test/255", "who discovered polonium and radium", ["Marie Curie", "Marie and Pierre Curie"], "Marie and Pierre Curie", 1, 1.0, 518, 7.2, True),
    ("nq.test/301", "what is a geiger counter used for", ["measuring ionizing radiation"], "ionizing radiation", 0, 0.8, 129, 6.6, True),
    ("nq.test/402", "who shared the nobel prize with the curies", ["Henri Becquerel", "Becquerel"], "Marie and Pierre Curie", 0, 0.0, 4401, 6.5, True),
    ("nq.test/403", "where does the rhine begin", ["Switzerland", "Swiss Alps"], "North Sea", 0, 0.0, 8123, 5.5, False),
    ("wq.test/7", "what language do people in austria speak", ["German Language"], "Austria", 0, 0.0, 66, 4.4, False),
    ("wq.test/9", "who sang the theme song of the 1997 film", ["Celine Dion"], "Warsaw", 0, 0.0, 7310, 1.2, False),
    ("wq.test/11", "what team does he play for", ["Real Madrid"], None, 0, 0.0, -1, 0.3, False),
    ("wq.test/15", "what river flows through vienna", ["Danube"], "Danube", 1, 1.0, 66, 8.0, True),
]  # fmt: skip


def illustration(sentence: dict[str, Any], step: int = 400) -> dict[str, Any]:
    """One record of illustrations.json, its sums worked out."""
    gold, candidates = sentence["gold"], sentence["candidates"]
    weights = {block_id: math.exp(scored[0]) for block_id, scored in candidates.items()}
    total = sum(weights.values())
    p_z = {block_id: weight / total for block_id, weight in weights.items()}
    gold_p = {
        block_id: [dict(guesses).get(token, 0.001) for token, guesses in zip(gold, scored[1:], strict=True)]
        for block_id, scored in candidates.items()
    }
    marginal = [sum(p_z[z] * gold_p[z][m] for z in candidates) for m in range(len(gold))]
    guesses: list[dict[str, float]] = [{} for _ in gold]
    for z, scored in candidates.items():
        for m, position in enumerate(scored[1:]):
            for token, p in position:
                guesses[m][token] = guesses[m].get(token, 0.0) + p_z[z] * p
    records = []
    for slot, (z, scored) in enumerate(candidates.items()):
        responsibility = sum(p_z[z] * p / marginal[m] for m, p in enumerate(gold_p[z])) / len(gold)
        title, text = ("", "") if z == -1 else BLOCKS[z]
        records.append(
            {
                "slot": slot,
                "block_id": z,
                "title": title,
                "text": text,
                "p_z": p_z[z],
                "responsibility": responsibility,
                "gradient": p_z[z] - responsibility,
                "predictions": [[{"token": t, "p": p} for t, p in position] for position in scored[1:]],
                "gold_p": gold_p[z],
            }
        )
    tokens = sentence["query"].split()
    return {
        "title": sentence["title"],
        "origin_block_id": sentence["origin"],
        "step": step,
        "query": sentence["query"],
        "query_tokens": tokens,
        "positions": [i for i, token in enumerate(tokens) if "[MASK]" in token],
        "gold": gold,
        "candidates": records,
        "marginal": [
            [{"token": t, "p": p} for t, p in sorted(position.items(), key=lambda pair: -pair[1])[:5]]
            for position in guesses
        ],
        "gold_marginal_p": marginal,
        "null_gold_p": gold_p[-1],
    }


def pretrain_metrics(steps: int = 400, every: int = 4, refresh_every: int = 60) -> list[dict[str, Any]]:
    chance = random.Random(7)
    records = []
    skipped = {"no_salient_span": 0, "span_too_long": 0}
    for step in range(every, steps + 1, every):
        snapshot = max(0, (step - 22) // refresh_every) * refresh_every
        skipped["no_salient_span"] += chance.randrange(3)
        skipped["span_too_long"] += chance.randrange(2)
        progress = step / steps
        records.append(
            {
                "step": step,
                "loss": 3.1 + 4.4 * math.exp(-5 * progress) + chance.gauss(0, 0.22),
                "retrieval_utility": -0.02 + 0.35 * progress**1.5 + chance.gauss(0, 0.06),
                "masked_accuracy": min(1.0, max(0.0, 0.02 + 0.33 * progress**0.7 + chance.gauss(0, 0.04))),
                "null_probability": min(1.0, max(0.0, 0.14 - 0.09 * progress + chance.gauss(0, 0.01))),
                "staleness_steps": step - snapshot,
                "oldest_staleness_steps": step - snapshot,
                "snapshot_step": snapshot,
                **(drift(step - snapshot) if step % 20 == 0 else {}),
                "reader_lr": 2e-4 * min(step / 40, (steps - step) / (steps - 40)),
                "embedder_lr": 2e-5 * min(step / 40, (steps - step) / (steps - 40)),
                "grad_norm": math.exp(chance.gauss(0.6, 0.3)),
                "queries_per_s": 21 + chance.gauss(0, 1.5),
                "refresh_blocks_per_s": 610 + chance.gauss(0, 40),
                "trainer_wait_s": 0.0,
                "step_s": 16 / 21,
                "skipped": dict(skipped),
            }
        )
    return records


def drift(staleness_steps: int) -> dict[str, float]:
    return {
        "probe_overlap": math.exp(-staleness_steps / 200),
        "score_drift": staleness_steps / 300,
        "drift_check_s": 0.8,
    }


def refreshes(steps: int = 400, refresh_every: int = 60) -> list[dict[str, Any]]:
    """Of the same run as pretrain_metrics: 22 steps to make an index, the third one published in two halves."""
    first = {"step": 0, "event": "in use", "snapshot_step": 0, "oldest_shard_step": 0, "fresh_shards": 4, "shards": 4, "blocks_per_s": 610.0}  # fmt: skip
    records = [first]
    for step in range(refresh_every, steps, refresh_every):
        records.append({"step": step, "event": "handed over", "reason": "drift" if step == 120 else "steps"})
        used = {**first, "step": step + 22, "snapshot_step": step, "oldest_shard_step": step}
        if step == 180:
            half = {"step": step + 11, "oldest_shard_step": step - refresh_every, "fresh_shards": 2}
            records.append({**used, **half})
        if used["step"] <= steps:
            records.append(used)
    return records


def evaluations() -> list[dict[str, Any]]:
    shared = {"masked_accuracy_null": 0.041, "masked_nll": 7.31, "retrieval_utility": -0.012}
    after = {"masked_accuracy_null": 0.268, "masked_nll": 3.42, "retrieval_utility": 0.31}
    return [
        {"when": "before", "step": 0, "questions": 3610, "subset": "all", "recall": {"1": 0.9, "5": 2.6, "20": 6.1}, "masked_accuracy": 0.038, **shared},
        {"when": "before", "step": 0, "questions": 498, "subset": "reachable", "recall": {"1": 6.4, "5": 18.5, "20": 41.6}, "masked_accuracy": 0.038, **shared},
        {"when": "after", "step": 400, "questions": 3610, "subset": "all", "recall": {"1": 1.6, "5": 4.3, "20": 8.4}, "masked_accuracy": 0.342, **after},
        {"when": "after", "step": 400, "questions": 498, "subset": "reachable", "recall": {"1": 11.4, "5": 29.7, "20": 56.0}, "masked_accuracy": 0.342, **after},
    ]  # fmt: skip


def finetune_metrics(steps: int = 300, every: int = 4) -> list[dict[str, Any]]:
    chance = random.Random(11)
    return [
        {
            "step": step,
            "loss": 6.2 - step / 150 + chance.gauss(0, 0.3),
            "retriever_loss": 3.0 - step / 280 + chance.gauss(0, 0.2),
            "reader_loss": 3.2 - step / 320 + chance.gauss(0, 0.2),
            "reader_lr": 2e-4 * (1 - step / steps),
            "embedder_lr": 5e-5 * (1 - step / steps),
            "grad_norm": 2.0 + chance.random(),
            "questions_per_s": 12 + chance.gauss(0, 1),
            "step_s": 0.66,
            "with_answer_retrieved": min(1.0, 0.42 + chance.gauss(0, 0.08)),
            "with_answer_read": min(1.0, 0.17 + abs(chance.gauss(0, 0.05))),
        }
        for step in range(every, steps + 1, every)
    ]


def dev_evaluations() -> list[dict[str, Any]]:
    exact = {50: 1.5, 100: 4.0, 150: 7.5, 200: 9.5, 250: 9.0, 300: 8.5}
    return [
        {
            "step": step,
            "questions": 200,
            "exact_match": value,
            "f1": value + 4.5,
            "recall": {"1": 20.0, "5": 40.0 + value},
            "retrieval_utility": 0.2,
            "best": step <= 200,
            "evaluation_s": 3.1,
        }
        for step, value in exact.items()
    ]


def results() -> dict[str, Any]:
    def row(name: str, subset: str, n: int, em: float, f1: float, recall: tuple[float, float, float]) -> dict:
        return {
            "name": name,
            "subset": subset,
            "questions": n,
            "exact_match": em,
            "f1": f1,
            "recall": dict(zip(("1", "5", "20"), recall, strict=True)),
            "retrieval_utility": None,
        }

    return {
        "checkpoint": "finetune/checkpoints/step-00000300",
        "sets": [
            row("nq.test", "all", 3610, 1.2, 3.1, (1.9, 5.2, 9.9)),
            row("nq.test", "reachable", 498, 8.6, 13.0, (13.9, 34.5, 61.2)),
            row("wq.test", "all", 2032, 1.9, 5.4, (3.0, 8.8, 16.1)),
            row("wq.test", "reachable", 463, 8.2, 14.1, (13.2, 38.4, 68.9)),
            row("curated.test", "all", 694, 3.0, 6.6, (4.9, 12.7, 24.5)),
            row("curated.test", "reachable", 231, 9.1, 15.3, (14.7, 38.1, 73.6)),
        ],
        "notes": [
            "Recall counts a string match in the block’s body, at word boundaries; some matches are accidental."
        ],
    }


def predictions() -> list[dict[str, Any]]:
    records = []
    for id_, question, answers, prediction, em, f1, block_id, score, reachable in QUESTIONS:
        title, text = BLOCKS.get(block_id, ("", ""))
        start = text.lower().find(prediction.lower()) if prediction else -1
        records.append(
            {
                "id": id_,
                "question": question,
                "answers": answers,
                "prediction": prediction,
                "exact_match": em,
                "f1": f1,
                "block_id": block_id,
                "title": title,
                "score": score,
                "span": [start, start + len(prediction)] if start >= 0 else None,
                "reachable": reachable,
            }
        )
    return records


def stages() -> list[dict[str, Any]]:
    rows = [("corpus", 21.4, 0.41e9), ("spans", 118.0, 0.9e9), ("index", 14.2, 0.8e9), ("pretrain", 305.0, 1.32e9), ("finetune", 198.0, 1.41e9), ("evaluate", 74.5, 1.1e9)]  # fmt: skip
    return [
        {
            "stage": name,
            "seconds": spent,
            "started": f"2026-01-05T10:{number:02d}:00+00:00",
            "command": f"realm-fast {name} runs/demo/run",
            "peak_rss_bytes": int(peak),
            "details": {},
        }
        for number, (name, spent, peak) in enumerate(rows)
    ]


def settings() -> dict[str, Any]:
    from realm_fast.config import Config, apply_overrides

    changed = [
        "pretrain.steps=400",
        "pretrain.reader_lr=2e-4",
        "corpus.max_block_tokens=96",
        "refresh.every_steps=60",
        "seed=1",
    ]
    return apply_overrides(Config(), changed).to_dict()


def write_synthetic_run(folder: Path) -> Path:
    """Writes RUN below `folder` and returns it; the corpus beside it has a manifest and no text."""
    run, corpus = folder / "run", folder / "corpus"
    corpus.mkdir(parents=True)
    write_json(
        corpus / "manifest.json", {"format_version": 1, "num_blocks": CORPUS_BLOCKS, "num_documents": 9_871}
    )
    write_json(
        run / "run.json",
        {
            "format_version": 1,
            "corpus": str(corpus),
            "corpus_hash": "5c0b" * 16,
            "tokenizer_hash": "77aa" * 16,
            "realm_fast": "0.1.0",
            "created": "2026-01-05T10:00:00+00:00",
            "machine": {
                "cpu": "Synthetic CPU @ 2.40GHz",
                "cores": 2,
                "cpu_levels": ["generic", "avx2", "avx512"],
                "python": "3.11.2",
                "torch": "2.9.0",
                "platform": "Linux-6.1-x86_64",
                "native": {"compiler": "GNU 12.2.0", "cuda": False},
            },
        },
    )
    write_json(run / "config.json", settings())
    write_lines(run / "stages.jsonl", stages())
    write_lines(run / "pretrain" / "metrics.jsonl", pretrain_metrics())
    write_lines(run / "pretrain" / "refreshes.jsonl", refreshes())
    write_lines(run / "pretrain" / "evaluations.jsonl", evaluations())
    write_json(run / "pretrain" / "illustrations.json", [illustration(s) for s in SENTENCES])
    write_lines(run / "finetune" / "metrics.jsonl", finetune_metrics())
    write_lines(run / "finetune" / "evaluations.jsonl", dev_evaluations())
    write_json(run / "evaluate" / "results.json", results())
    write_lines(run / "evaluate" / "predictions.jsonl", predictions())
    return run


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    from realm_fast.files import atomic_file
    from realm_fast.report import render
    from realm_fast.report.data import RunData

    run = write_synthetic_run(Path(sys.argv[1]))
    with atomic_file(run / "report.html", "w") as file:
        file.write(render(RunData.read(run), lambda block_id: BLOCKS[block_id][1]))
    print(run / "report.html")


if __name__ == "__main__":
    main()
