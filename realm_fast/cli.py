"""The command line, `realm-fast COMMAND`.

Each command parses here and works elsewhere; heavy modules are imported by the command that needs them, so
that `realm-fast --help` is instant. Exit codes: 0 done, 1 the work failed, 2 something given is wrong,
130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from realm_fast.errors import Interrupted, RealmFastError, UserError

if TYPE_CHECKING:
    from realm_fast.config import Config
    from realm_fast.run_folder import RunFolder

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _raise_interrupted)
    logging.basicConfig(format="%(message)s")  # to stderr
    logging.getLogger("realm_fast").setLevel(logging.INFO)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except RealmFastError as error:
        return _fail(arguments, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(arguments, "interrupted; what was finished is kept", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error, and nothing more to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(arguments, str(error), 1)
    except Exception as error:
        return _fail(arguments, f"unexpected {type(error).__name__}: {error}", 1, hint=not arguments.debug)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realm-fast",
        description="Train REALM-style models: a retriever and a masked language model learned jointly, "
        "through an exact search over an index that is refreshed while training runs.",
        epilog="A whole run: realm-fast corpus build --out CORPUS; realm-fast pretrain RUN --corpus CORPUS; "
        "realm-fast finetune RUN; "
        "realm-fast evaluate RUN; realm-fast report RUN; realm-fast ask RUN QUESTION. "
        "`realm-fast COMMAND --help` explains each; `realm-fast info --settings` lists every setting.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--config", metavar="FILE", help="settings in TOML")
    settings.add_argument(
        "--set",
        metavar="SECTION.NAME=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one setting; may be repeated",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str,
        run: Command,
        help: str,
        *,
        to: "argparse._SubParsersAction" = commands,
        with_settings: bool = False,
    ) -> argparse.ArgumentParser:
        parents = [common, settings] if with_settings else [common]
        sub = to.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", parents=parents)
        sub.set_defaults(command=run)
        return sub

    def group(name: str, help: str) -> "argparse._SubParsersAction":
        return commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + "."
        ).add_subparsers(title="commands", metavar="COMMAND", required=True)

    corpus = group("corpus", "turn text into a token store of blocks, or look into one")
    sub = add(
        "build",
        _corpus_build,
        "cut text into blocks and write the token store",
        to=corpus,
        with_settings=True,
    )
    sub.add_argument("--out", required=True, metavar="CORPUS", help="the token store's folder")
    sub.add_argument(
        "--source", help="short for --set corpus.source=…: a packaged corpus (wiki-leads), a file or a folder"
    )
    sub.add_argument(
        "--no-spans",
        action="store_true",
        help="do not tag salient spans now (pretrain will, if it needs them)",
    )
    sub = add("info", _corpus_info, "describe a token store", to=corpus)
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("--verify", action="store_true", help="also check every file's hash")
    sub = add("show", _corpus_show, "print one block", to=corpus)
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("block_id", type=int)

    index = group("index", "embed a corpus into a searchable index, or look into one")
    sub = add("build", _index_build, "embed every block and write the index", to=index, with_settings=True)
    sub.add_argument("--corpus", required=True, metavar="CORPUS", help="a token store")
    sub.add_argument(
        "--embedder",
        metavar="FOLDER",
        help="a saved embedder (RUN/pretrain/checkpoints/step-…/embedder); default: one made by the settings",
    )
    sub.add_argument(
        "--out", required=True, metavar="INDEX", help="folder for the index and the embedder that made it"
    )
    sub = add("info", _index_info, "describe an index file", to=index)
    sub.add_argument("index", metavar="INDEX", help="an index folder or .safetensors file")

    sub = add("search", _search, "find the best blocks for a text")
    sub.add_argument("where", metavar="RUN|INDEX", help="a run, or a folder that `index build` wrote")
    sub.add_argument("text")
    sub.add_argument("--top", type=int, default=5, metavar="K", help="how many blocks (default 5)")
    sub.add_argument("--corpus", metavar="CORPUS", help="the token store, for an index folder")

    for name, run_it, help in (
        ("ict", _ict, "warm up the embedder: find the block that a sentence was cut from"),
        ("warmup", _warmup, "warm up the reader: predict masked spans from blocks that hold them too"),
    ):
        sub = add(name, run_it, help, with_settings=True)
        sub.add_argument("run", metavar="RUN", help="the run's folder; made if it does not exist")
        sub.add_argument("--corpus", metavar="CORPUS", help="a token store (needed for a new run)")
        sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        sub.add_argument("--steps", type=int, help=f"short for --set {name}.steps=…")

    sub = add(
        "pretrain",
        _pretrain,
        "train retriever and reader jointly, with a live refresh of the index",
        with_settings=True,
    )
    sub.add_argument("run", metavar="RUN", help="the run's folder; made if it does not exist")
    sub.add_argument("--corpus", metavar="CORPUS", help="a token store (needed for a new run)")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    sub.add_argument("--steps", type=int, help="short for --set pretrain.steps=…")

    sub = add(
        "refresher",
        _refresher,
        "make the index snapshots of a run that trains with refresh.mode=follow, here or on another machine",
        with_settings=True,
    )
    sub.add_argument("run", metavar="RUN")
    sub.add_argument(
        "--corpus", metavar="CORPUS", help="the token store, where this machine has it elsewhere"
    )
    sub.add_argument("--once", action="store_true", help="make the snapshot that is wanted now, then end")

    sub = add("finetune", _finetune, "fine-tune retriever and span reader on questions", with_settings=True)
    sub.add_argument(
        "run", metavar="RUN", help="a run; made, from the warm start alone, if it does not exist"
    )
    sub.add_argument("--corpus", metavar="CORPUS", help="a token store (needed for a new run)")
    sub.add_argument("--questions", help="short for --set finetune.questions=…: packaged names or files")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")

    sub = add(
        "evaluate", _evaluate, "answer questions: exact match, F1, recall, predictions", with_settings=True
    )
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--questions", help="short for --set evaluate.questions=…: packaged names or files")
    sub.add_argument(
        "--before", action="store_true", help="also measure the retriever that fine-tuning started from"
    )

    sub = add("ask", _ask, "answer one question from a run, with evidence")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("question")
    sub.add_argument("--top", type=int, default=3, metavar="N", help="how many answers (default 3)")
    sub.add_argument(
        "--corpus", metavar="CORPUS", help="answer from another token store; nothing is trained again"
    )

    sub = add(
        "explain",
        _explain,
        "follow one masked sentence through a run: blocks, predictions, marginal, gradient",
    )
    sub.add_argument("run", metavar="RUN")
    sub.add_argument(
        "sentence", help="a sentence with [MASK] in it; `[MASK:word]` also says what stood there"
    )

    sub = add("report", _report, "write a run's report.html")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--out", metavar="FILE", help="default: RUN/report.html")

    sub = add("demo", _demo, "run the main job on real text, from corpus to report", with_settings=True)
    sub.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="where everything goes (default runs/demo)"
    )
    sub.add_argument(
        "--quick", action="store_true", help="a much smaller job, under three minutes on two cores"
    )
    sub.add_argument("--fresh", action="store_true", help="start over instead of going on where it stopped")

    reproduce = group(
        "reproduce", "REALM's tables again, at the scale of this machine: resumable, several seeds"
    )
    for name, run_it, help in (
        (
            "ablations",
            _reproduce_ablations,
            "joint pre-training against itself with one thing changed: a table, a plot",
        ),
        ("qa", _reproduce_qa, "question answering beside its baselines: a table, a plot"),
    ):
        sub = add(name, run_it, help, to=reproduce, with_settings=True)
        sub.add_argument(
            "--out", metavar="FOLDER",
            help="where everything goes (default runs/reproduce, with --quick runs/reproduce-quick); "
            "what is done there is not done again",
        )  # fmt: skip
        sub.add_argument("--corpus", metavar="CORPUS", help="a token store (default: one is built in FOLDER)")
        sub.add_argument("--seeds", type=int, help="how many seeds (default 3; with --quick 2)")
        sub.add_argument(
            "--hours", type=float,
            help="time for all joint training, warm start included: decides the steps (default 3)",
        )  # fmt: skip
        sub.add_argument("--steps", type=int, help="joint steps of a run, instead of --hours")
        sub.add_argument("--quick", action="store_true", help="tiny settings: a few minutes, same code")
        sub.add_argument(
            "--stop-if-diverged", action="store_true", help="end at a run that diverges; else it is recorded"
        )
        if name == "ablations":
            sub.add_argument("--arms", metavar="A,B", help="only these arms (their names: docs/recipes.md)")

    sub = add("bench", _bench, "measure a kernel beside this machine's limit and its peers")
    sub.add_argument("what", choices=["roofline", "mips", "marginal", "epilogue", "refresh"])
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; try --help")

    sub = add("info", _info, "what this build and this machine can run")
    sub.add_argument("--settings", action="store_true", help="list every setting with its default")
    return parser


def _load_config(arguments: argparse.Namespace, base: "Config | None" = None, **short: object) -> "Config":
    """The run's settings (or the defaults), the file's, the short options, then every --set."""
    from realm_fast.config import apply_overrides, load_config

    if base is not None and arguments.config:
        config = load_config(arguments.config, base=base)
    else:
        config = base or load_config(arguments.config)
    shorts = [f"{name.replace('__', '.')}={value}" for name, value in short.items() if value is not None]
    config = apply_overrides(config, [*shorts, *arguments.overrides])
    if config.num_threads:
        import torch

        torch.set_num_threads(config.num_threads)
    return config


def _corpus_build(arguments: argparse.Namespace) -> None:
    from realm_fast.prepare import prepare_corpus

    config = _load_config(arguments, corpus__source=arguments.source)
    out = Path(arguments.out)
    store, spans = prepare_corpus(config, out, with_spans=not arguments.no_spans, progress=True)
    print(f"{out}: {len(store):,} blocks, corpus {store.corpus_hash[:16]}")
    if spans is not None:
        print(f"{spans.path}: {spans.num_spans:,} salient spans ({spans.tagger})")


def _corpus_info(arguments: argparse.Namespace) -> None:
    import json

    from realm_fast.token_store import TokenStore

    store = TokenStore.open(arguments.corpus, verify="hashes" if arguments.verify else "sizes")
    print(json.dumps(store.manifest, indent=2, ensure_ascii=False))


def _corpus_show(arguments: argparse.Namespace) -> None:
    from realm_fast.token_store import TokenStore

    store = TokenStore.open(arguments.corpus)
    if not 0 <= arguments.block_id < len(store):
        raise UserError(f"block_id: expected 0 to {len(store) - 1}, got {arguments.block_id}")
    print(f"{store.title(arguments.block_id)}\n\n{store.text(arguments.block_id)}")


def _index_build(arguments: argparse.Namespace) -> None:
    from realm_fast.embedder import Embedder
    from realm_fast.snapshot_writer import build_index_folder
    from realm_fast.token_store import TokenStore

    config = _load_config(arguments)
    store = TokenStore.open(arguments.corpus)
    if arguments.embedder:
        embedder = Embedder.load(arguments.embedder)
    else:
        embedder = Embedder.from_config(config.embedder, store.tokenizer())
    manifest = build_index_folder(Path(arguments.out), embedder, store, config, progress=True)
    print(
        f"{arguments.out}: {manifest.num_blocks:,} blocks x {manifest.dim}, {manifest.dtype}, "
        f"{manifest.bytes / 1e6:.1f} MB, {manifest.blocks_per_s:,.0f} blocks/s"
    )


def _index_info(arguments: argparse.Namespace) -> None:
    import json

    from realm_fast.index import MipsIndex
    from realm_fast.snapshot import read_manifest

    path = Path(arguments.index)
    if path.is_dir():
        print(json.dumps(read_manifest(path).summary(), indent=2))
        return
    index = MipsIndex.load(path, mmap=True)
    print(
        json.dumps(
            {"blocks": len(index), "dim": index.dim, "dtype": str(index.dtype), "bytes": index.nbytes},
            indent=2,
        )
    )


def _search(arguments: argparse.Namespace) -> None:
    from realm_fast.answer import search_text

    if arguments.top < 1:
        raise UserError(f"--top: expected at least 1, got {arguments.top}")
    for rank, hit in enumerate(
        search_text(arguments.where, arguments.text, top=arguments.top, corpus=arguments.corpus), 1
    ):
        print(f"{rank:>2}. {hit.score:9.4f}  block {hit.block_id}  {hit.title}\n    {hit.text}")


def _open_run(arguments: argparse.Namespace, **short: object) -> "tuple[RunFolder, Config]":
    """The run, made from --corpus if it does not exist yet, and its settings with what the options change."""
    from realm_fast.run_folder import RunFolder
    from realm_fast.token_store import TokenStore

    path = Path(arguments.run)
    exists = (path / "run.json").exists()
    if not exists and not arguments.corpus:
        raise UserError(
            f"{path} does not exist yet: a new run needs --corpus CORPUS (see `realm-fast corpus build`)."
        )
    config = _load_config(arguments, RunFolder(path).config() if exists else None, **short)
    store = TokenStore.open(arguments.corpus) if arguments.corpus else RunFolder(path).store()
    return RunFolder.open_or_create(path, config, store), config


def _ict(arguments: argparse.Namespace) -> None:
    from realm_fast.ict import ict

    run, config = _open_run(arguments, ict__steps=arguments.steps)
    ict(run, config, resume=arguments.resume, progress=True)


def _warmup(arguments: argparse.Namespace) -> None:
    from realm_fast.warmup import warmup

    run, config = _open_run(arguments, warmup__steps=arguments.steps)
    warmup(run, config, resume=arguments.resume, progress=True)


def _pretrain(arguments: argparse.Namespace) -> None:
    from realm_fast.train import pretrain

    run, config = _open_run(arguments, pretrain__steps=arguments.steps)
    pretrain(run, config, resume=arguments.resume, progress=True)


def _refresher(arguments: argparse.Namespace) -> None:
    from realm_fast.refresher import run_refresher
    from realm_fast.run_folder import RunFolder

    run = RunFolder(arguments.run)
    config = _load_config(arguments, run.config())
    run_refresher(run, config, corpus=arguments.corpus, once=arguments.once, progress=True)


def _finetune(arguments: argparse.Namespace) -> None:
    from realm_fast.finetune import finetune

    run, config = _open_run(arguments, finetune__questions=arguments.questions)
    finetune(run, config, resume=arguments.resume, progress=True)


def _evaluate(arguments: argparse.Namespace) -> None:
    from realm_fast.evaluate import evaluate
    from realm_fast.run_folder import RunFolder

    run = RunFolder(arguments.run)
    config = _load_config(arguments, run.config(), evaluate__questions=arguments.questions)
    evaluate(run, config, before=arguments.before, progress=True)


def _ask(arguments: argparse.Namespace) -> None:
    from realm_fast.answer import ask, format_answers
    from realm_fast.run_folder import RunFolder
    from realm_fast.token_store import TokenStore

    if arguments.top < 1:
        raise UserError(f"--top: expected at least 1, got {arguments.top}")
    run = RunFolder(arguments.run)
    corpus = TokenStore.open(arguments.corpus) if arguments.corpus else None
    print(format_answers(ask(run, arguments.question, top=arguments.top, corpus=corpus)))


def _explain(arguments: argparse.Namespace) -> None:
    from realm_fast.explain import explain_sentence, format_illustration
    from realm_fast.run_folder import RunFolder

    print(format_illustration(explain_sentence(RunFolder(arguments.run), arguments.sentence)))


def _report(arguments: argparse.Namespace) -> None:
    from realm_fast.report import write_report
    from realm_fast.run_folder import RunFolder

    print(write_report(RunFolder(arguments.run).path, Path(arguments.out) if arguments.out else None))


def _demo(arguments: argparse.Namespace) -> None:
    from realm_fast.demo import run_demo

    run_demo(
        Path(arguments.out),
        quick=arguments.quick,
        fresh=arguments.fresh,
        config_path=arguments.config,
        overrides=arguments.overrides,
    )


def _reproduction(arguments: argparse.Namespace) -> "tuple[Path, Config, dict[str, Any]]":
    """Folder, recipe and what else both tables take."""
    import importlib.resources

    from realm_fast.config import load_config

    seeds = arguments.seeds if arguments.seeds is not None else 2 if arguments.quick else 3
    if seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {seeds}")
    if arguments.hours is not None and not arguments.hours > 0:
        raise UserError(f"--hours: expected more than 0, got {arguments.hours}")
    if arguments.hours is not None and arguments.steps is not None:
        raise UserError("--steps: says what --hours would decide; give one of them")
    name = "reproduce_quick.toml" if arguments.quick else "reproduce.toml"
    with importlib.resources.as_file(importlib.resources.files("realm_fast") / "assets" / name) as recipe:
        config = _load_config(arguments, load_config(recipe), pretrain__steps=arguments.steps)
    hours = arguments.hours
    if hours is None and arguments.steps is None and not arguments.quick:
        hours = 3.0
    out = Path(arguments.out or ("runs/reproduce-quick" if arguments.quick else "runs/reproduce"))
    return out, config, {
        "seeds": seeds,
        "hours": hours,
        "corpus": Path(arguments.corpus) if arguments.corpus else None,
        "stop_if_diverged": arguments.stop_if_diverged,
        "progress": True,
    }  # fmt: skip


def _reproduce_ablations(arguments: argparse.Namespace) -> None:
    from realm_fast.reproduce.ablations import choose_arms, run_ablations

    out, config, options = _reproduction(arguments)
    table = run_ablations(out, config, arms=choose_arms(arguments.arms), **options)
    print(table.read_text(encoding="utf-8") + f"\n{table}")


def _reproduce_qa(arguments: argparse.Namespace) -> None:
    from realm_fast.reproduce.qa import run_qa

    out, config, options = _reproduction(arguments)
    table = run_qa(out, config, **options)
    print(table.read_text(encoding="utf-8") + f"\n{table}")


def _bench(arguments: argparse.Namespace) -> None:
    from realm_fast.bench import run_benchmark

    run_benchmark(arguments.what, arguments.arguments)


def _info(arguments: argparse.Namespace) -> None:
    import json

    from realm_fast.config import describe_settings
    from realm_fast.run_folder import describe_machine

    if not arguments.settings:
        print(json.dumps(describe_machine(), indent=2))
        return
    for name, kind, default, help in describe_settings():
        print(f"{name} = {default!r}  ({kind})\n    {help}")


def _raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(f"{signal.Signals(number).name}: stopped; what was finished is kept", number)


def _fail(arguments: argparse.Namespace, message: str, code: int, *, hint: bool = False) -> int:
    if arguments.debug:
        traceback.print_exc()
    print(f"realm-fast: error: {message}", file=sys.stderr)
    if hint:
        print("This is not supposed to happen. `--debug` shows where it did.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
