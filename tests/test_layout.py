"""ARCHITECTURE.md and the layout stay true: every path named exists, imports never turn back, slices are whole."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
TABLE = ARCHITECTURE.partition("## Where is X")[2].partition("## Rules")[0]
STEMS = sorted(path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name != "core")

# Stages in the order of the data's way; a module may import from its own line or the lines above it.
LAYERS = [
    ["errors", "types"],
    ["files", "ownership", "build", "device", "streams", "signals", "progress", "workers", "building"],
    ["config", "metrics", "qa_metrics", "schedule", "ops"],
    ["packaged", "tokenizer", "sentences", "sources", "token_store"],
    ["corpus", "masking", "questions", "packing"],
    ["encoder", "model_files", "objective", "optim"],
    ["index_file", "panels", "packed_trunk"],
    ["embedder", "reader", "index"],
    ["block_encoder", "index_builder"],
    ["device_index", "embedding", "retriever", "checkpoint", "reading", "gradient_cache"],
    ["snapshot", "drift", "model", "run_folder", "evidence"],
    ["prepare", "snapshot_writer", "snapshot_watch", "handover"],
    ["refresh", "explain", "start", "stage", "qa_model"],
    ["refresher", "residence"],
    ["evaluate"],
    ["probe", "early_stopping"],
    ["ict", "warmup", "train", "finetune", "answer"],
    ["reproduce"],
    ["report", "bench"],
    ["demo"],
    ["cli"],
]


def test_every_path_in_the_table_exists():
    paths = re.findall(r"`([\w./-]+)`", TABLE)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_table():
    modules = {
        f"realm_fast/{path.name}"
        for path in (ROOT / "realm_fast").glob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert sorted(m for m in modules if f"`{m}`" not in ARCHITECTURE) == []


def test_links_in_the_documents_lead_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_imports_follow_the_data():
    rank = {module: level for level, modules in enumerate(LAYERS) for module in modules}
    turned_back = []
    for path in (ROOT / "realm_fast").glob("*.py"):
        if path.stem in ("__init__", "__main__"):
            continue
        assert path.stem in rank, f"{path.name} has no place in LAYERS"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("realm_fast."):
                imported = node.module.split(".")[1]
                if imported in rank and rank[imported] > rank[path.stem]:
                    turned_back.append(f"{path.stem} -> {imported}")
    assert turned_back == []


@pytest.mark.parametrize("stem", STEMS)
def test_a_kernel_has_its_whole_slice(stem):
    assert list((ROOT / "csrc" / stem).glob("*.h"))  # the contract
    expected = [
        f"realm_fast/ops/{stem}.py",
        f"tests/ops/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
        f"docs/ops/{stem}.md",
    ]
    assert [path for path in expected if not (ROOT / path).exists()] == []


def test_the_package_lists_every_folder_of_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {"realm_fast"} | {
        "realm_fast." + ".".join(path.parent.relative_to(ROOT / "realm_fast").parts)
        for path in (ROOT / "realm_fast").rglob("*/__init__.py")
    }
    assert listed == folders | {"realm_fast.kernels", "realm_fast.benchmarks", "realm_fast.benchmarks.gpu"}
