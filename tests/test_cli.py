"""The command line: a user's own 50 documents and 10 questions through every stage; help; errors and exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from realm_fast.cli import main, make_parser

SETTINGS = """
seed = 1
device = "cpu"
[corpus]
max_block_tokens = 64
num_workers = 1
[embedder]
trunk = "fresh:layers=1,hidden=32,heads=2"
embedding_dim = 32
[reader]
trunk = "fresh:layers=1,hidden=32,heads=2"
max_joint_tokens = 128
[masking]
entity_tagger = "rules"
max_query_tokens = 48
[pretrain]
steps = 4
batch_queries = 4
num_candidates = 3
score_temperature = 5.7
checkpoint_every_steps = 2
log_every_steps = 1
illustrations = 1
[refresh]
every_steps = 2
mode = "inline"
[finetune]
steps = 3
batch_questions = 2
retriever_beam = 20
max_reader_tokens = 128
checkpoint_every_steps = 2
log_every_steps = 1
[evaluate]
held_out_queries = 8
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def handlers():
    """main() takes over SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_dir):
    """A folder with settings.toml, after every stage was run on it by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "settings.toml").write_text(SETTINGS)
    settings = [
        "--config",
        str(folder / "settings.toml"),
        "--set",
        f"corpus.tokenizer={data_dir / 'tokenizer'}",
    ]
    questions = str(data_dir / "user" / "questions.jsonl")
    documents = str(data_dir / "user" / "documents.jsonl")
    for command in (
        ["corpus", "build", "--out", f"{folder}/corpus", "--source", documents, *settings],
        ["index", "build", "--corpus", f"{folder}/corpus", "--out", f"{folder}/index", *settings],
        [
            "pretrain",
            f"{folder}/run",
            "--corpus",
            f"{folder}/corpus",
            "--set",
            f"evaluate.questions={questions}",
            *settings,
        ],
        ["finetune", f"{folder}/run", "--questions", questions],
        ["evaluate", f"{folder}/run", "--questions", questions],
        ["report", f"{folder}/run"],
    ):
        assert main(command) == 0, command
    return folder


def test_every_stage_left_its_artifacts(world):
    run = world / "run"
    stages = [json.loads(line)["stage"] for line in (run / "stages.jsonl").read_text().splitlines()]
    for stage in ("corpus", "salient spans", "index", "pretrain", "finetune", "evaluate"):
        assert stage in stages
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results["sets"][0]["questions"] == 10
    predictions = (run / "evaluate" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 10
    assert all("block_id" in json.loads(line) for line in predictions)
    assert (run / "report.html").stat().st_size > 10_000


def output_of(capsys, *command):
    code = main([str(word) for word in command])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_looking_into_what_was_made(world, capsys):
    code, out, _ = output_of(capsys, "corpus", "info", world / "corpus", "--verify")
    assert code == 0
    assert json.loads(out)["num_blocks"] >= 50
    code, out, _ = output_of(capsys, "corpus", "show", world / "corpus", 3)
    assert code == 0
    assert len(out.splitlines()) == 3
    code, out, _ = output_of(capsys, "index", "info", world / "index")
    assert code == 0
    assert json.loads(out)["dim"] == 32
    code, out, _ = output_of(capsys, "index", "info", world / "index" / "shard-00000.safetensors")
    assert code == 0
    assert json.loads(out)["dim"] == 32
    for where in ([world / "run"], [world / "index", "--corpus", world / "corpus"]):
        code, out, _ = output_of(
            capsys, "search", *where[:1], "Who discovered penicillin?", "--top", 2, *where[1:]
        )
        assert code == 0
        assert re.findall(r"^ ?(\d+)\. ", out, re.MULTILINE) == ["1", "2"]
    code, out, _ = output_of(capsys, "ask", world / "run", "Who discovered penicillin?")
    assert code == 0
    assert "[[" in out
    code, out, _ = output_of(capsys, "info")
    assert code == 0
    assert json.loads(out)["torch"] == torch.__version__
    code, out, _ = output_of(capsys, "info", "--settings")
    assert code == 0
    assert "pretrain.num_candidates = 8" in out


@pytest.mark.parametrize("mask", ["[MASK]", "[MASK:Paris]"])
def test_explaining_a_sentence_of_ones_own(world, capsys, mask):
    code, out, _ = output_of(capsys, "explain", world / "run", f"The capital of France is {mask}.")
    assert code == 0
    assert "the null block" in out
    assert ("the model's own guess" in out) == (mask == "[MASK]")
    p_z = [float(p) for p in re.findall(r"^  +(\d\.\d+)  [+-]", out, re.MULTILINE)]
    assert sum(p_z) == pytest.approx(1, abs=0.003)


def test_building_again_changes_nothing(world, capsys, data_dir):
    before = (world / "corpus.stages.jsonl").read_text()
    settings = ["--config", world / "settings.toml", "--set", f"corpus.tokenizer={data_dir / 'tokenizer'}"]
    code, out, _ = output_of(
        capsys, "corpus", "build", "--out", world / "corpus", "--source", data_dir / "user" / "documents.jsonl", *settings
    )  # fmt: skip
    assert code == 0
    assert "blocks, corpus" in out
    assert (world / "corpus.stages.jsonl").read_text() == before
    code, out, _ = output_of(
        capsys, "index", "build", "--corpus", world / "corpus", "--out", world / "index", "--embedder", world / "index" / "embedder"
    )  # fmt: skip
    assert code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["corpus", "info", "{tmp}/none"], "does not exist"),
        (["corpus", "show", "{world}/corpus", "100000"], "block_id: expected 0 to"),
        (["corpus", "build", "--out", "{tmp}/c", "--source", "{tmp}/none.jsonl"], "none.jsonl"),
        (["index", "build", "--corpus", "{world}/corpus", "--embedder", "{world}/index/embedder", "--out", "{world}/run"], "exists already"),
        (["search", "{tmp}", "text"], "neither a run"),
        (["search", "{world}/run", "text", "--top", "0"], "top: expected at least 1"),
        (["search", "{world}/index", "text"], "--corpus CORPUS must name"),
        (["pretrain", "{tmp}/new"], "a new run needs --corpus"),
        (["pretrain", "{world}/run"], "already has a checkpoint of step 4"),
        (["pretrain", "{world}/run", "--set", "pretrain.stepz=3"], "did you mean 'pretrain.steps'"),
        (["pretrain", "{world}/run", "--resume", "--steps", "9"], "pretrain.steps: the checkpoint has 4, now it is 9"),
        (["pretrain", "{tmp}/new", "--corpus", "{world}/corpus", "--set", "pretrain.num_candidates=0"], "expected a value >= 1"),
        (["finetune", "{tmp}/none"], "a new run needs --corpus"),
        (["evaluate", "{tmp}/none"], "no such run"),
        (["evaluate", "{world}/run", "--questions", "{tmp}/none.jsonl"], "none.jsonl"),
        (["ask", "{world}/run", "   "], "it has no words"),
        (["explain", "{world}/run", "no mask here"], "expected a [MASK]"),
        (["report", "{tmp}"], "not a run folder"),
    ],
)  # fmt: skip
def test_users_mistakes_end_with_2_a_clear_message_and_no_traceback(
    world, tmp_path, capsys, command, message
):
    command = [word.format(tmp=tmp_path, world=world) for word in command]
    code, _, err = output_of(capsys, *command)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert "Traceback" in output_of(capsys, *command, "--debug")[2]


def test_a_refused_setting_does_not_become_the_runs_own(world, capsys):
    before = (world / "run" / "config.json").read_text()
    code, _, err = output_of(capsys, "pretrain", world / "run", "--resume", "--steps", "9")
    assert code == 2, err
    assert (world / "run" / "config.json").read_text() == before


def all_parsers(parser, words=()):
    yield words, parser
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, sub in action.choices.items():
                yield from all_parsers(sub, (*words, name))


def test_every_command_has_help_that_says_what_it_does():
    seen = list(all_parsers(make_parser()))
    assert len(seen) > 15
    for words, parser in seen:
        text = parser.format_help()
        assert parser.description, words
        for action in parser._actions:
            if action.dest not in ("help", "run", "corpus", "question", "text", "where", "block_id", "what"):
                assert action.help or action.choices, (words, action.dest)
        assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["pretrain"], ["search", "x", "y", "--top", "many"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: realm-fast" in capsys.readouterr().err


def test_help_is_quick_and_needs_no_torch():
    code = "import sys, realm_fast.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "realm-fast pretrain RUN --corpus CORPUS" in " ".join(result.stdout.split())


def test_a_closed_pipe_is_no_error(world):
    result = subprocess.run(
        f"{sys.executable} -m realm_fast info --settings | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "0"
    assert result.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_its_own_exit_code_and_a_checkpoint(
    world, tmp_path, data_dir, number, code
):
    command = [
        sys.executable, "-m", "realm_fast", "pretrain", str(tmp_path / "run"), "--corpus", str(world / "corpus"),
        "--config", str(world / "settings.toml"), "--set", f"corpus.tokenizer={data_dir / 'tokenizer'}",
        "--set", f"evaluate.questions={data_dir / 'user' / 'questions.jsonl'}", "--steps", "100000", "--set", "num_threads=1",
    ]  # fmt: skip
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    metrics = tmp_path / "run" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    assert f"{signal.Signals(number).name}: stopped after step" in errors
    assert "--resume" in errors
    assert (tmp_path / "run" / "pretrain" / "checkpoints" / "latest.json").exists()
