"""The house rules of CONTRIBUTING.md that a machine can hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_tropd.cli import to_flags
from megatron_tropd.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "megatron_tropd").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "checkpoint_convert").glob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
MAX_FILE, MAX_FUNCTION = 400, 60


def _id(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=_id)
def test_tests_are_small_files_too(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_small_files_and_functions_ascii_and_safe_loading(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), "source is ASCII"
    assert len(text.splitlines()) <= MAX_FILE
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "bare except"
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            if call.startswith("torch.load("):
                assert "weights_only=True" in call
            assert not call.startswith(("eval(", "exec(", "os.system(")), call
            assert "shell=True" not in call and "trust_remote_code=True" not in call


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


LAYERS = [  # a room may import from its own row and from the rows below
    {"train", "evaluate"},
    {"training"},
    {"evaluation", "reporting", "rewards"},
    {"rollout", "teacher"},
    {"weights", "data", "cli", "config"},
    {"models"},
    {"ops"},
    {"objectives", "parallel"},
    {"types", "rng"},
]


def _layer(module):
    room = module.split(".")[1] if "." in module else module
    return next((i for i, rooms in enumerate(LAYERS) if room in rooms), None)


@pytest.mark.parametrize("path", PACKAGE, ids=_id)
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if path.name == "__init__.py":
        return
    mine = _layer(module)
    assert mine is not None, f"{module} is in no room; add it to LAYERS"
    for imported in _imports(path):
        if imported.startswith("megatron_tropd."):
            theirs = _layer(imported)
            assert theirs is not None and theirs >= mine, f"{module} imports {imported}, which stands above it"


def test_only_parallel_reads_parallel_state():
    for path in PACKAGE:
        if "parallel" not in path.relative_to(ROOT).parts:
            assert "parallel_state" not in path.read_text(encoding="utf-8"), path


def test_only_the_sglang_room_speaks_http():
    for path in PACKAGE:
        if "sglang" not in path.relative_to(ROOT).parts:
            for imported in _imports(path):
                assert imported.split(".")[0] not in {"httpx2", "httpx", "requests", "aiohttp", "http"}, path
                assert imported != "urllib.request", path


@pytest.mark.parametrize("room", ["objectives", "types.py", "rng.py"])
def test_pure_rooms_import_torch_only(room):
    place = ROOT / "megatron_tropd" / room
    for path in place.glob("*.py") if place.is_dir() else [place]:
        for imported in _imports(path):
            assert not imported.startswith(("megatron.", "transformers", "torch.distributed", "sglang")), path


@pytest.mark.parametrize(
    "name", ["boxes", "hf_shapes", "engine_boxes", "regions", "buckets", "plan", "plan_stats", "proof"]
)
def test_plans_need_no_tensors(name):
    imported = {line.split(".")[0] for line in _imports(ROOT / f"megatron_tropd/weights/{name}.py")}
    assert not imported & {"torch", "megatron", "transformers"}


FROZEN_FLAGS = ROOT / "tests" / "golden" / "flags.txt"


def test_flags_are_a_decision():
    """A new flag is a promise for years: adding one means adding it to the list, in the same change."""
    assert sorted(to_flags(TrainConfig())) == FROZEN_FLAGS.read_text().split()


def test_docs_name_only_flags_that_exist():
    known = set(to_flags(TrainConfig()))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"megatron_tropd\.train[^`]*", path.read_text(encoding="utf-8")):
            for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", block):
                ours = flag.removeprefix("no-") in known | {"config", "help"}
                assert ours or flag.startswith("sglang-"), f"{path.name}: --{flag}"  # those go to SGLang
