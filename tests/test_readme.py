"""README's code runs, and its commands exist."""

import re
from pathlib import Path

import torch

from realm_fast.cli import make_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:  # the second continues the first
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["ids"].shape == (4, 8)
    exact = torch.topk(namespace["queries"] @ namespace["blocks"].T, 8)
    assert torch.equal(namespace["ids"], exact.indices)
    assert namespace["queries"].grad.abs().sum() > 0


def test_the_example_is_short():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = [line for line in first.splitlines() if line.strip() and not line.startswith(("#", "import"))]
    assert len(code) <= 15


def test_the_commands_parse():
    commands = re.findall(r"^realm-fast (.*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(commands) == 10
    import shlex

    for command in commands:
        arguments = make_parser().parse_args(shlex.split(command))
        assert callable(arguments.command)


def test_the_make_targets_exist():
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
