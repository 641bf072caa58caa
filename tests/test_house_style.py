"""The house rules of CONTRIBUTING.md that a machine can hold."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

from megatron_tropd.cli import to_flags
from megatron_tropd.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "megatron_tropd").rglob("*.py"))
SOURCES = [
    path
    for folder in ("megatron_tropd", "checkpoint_convert", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
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
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_tropd":
            yield from (f"megatron_tropd.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


ROWS = [  # a room may import from its own row and from the rows below
    {"train", "evaluate", "score_responses", "generate", "benchmark", "doctor"},
    {"setup", "benchmarks"},
    {"training", "generation"},
    {"evaluation", "reporting", "checkpoints"},
    {"rollout", "teacher", "grading"},
    {"weights.engine_loader", "sglang"},
    {"weights.transport"},
    {"weights.plan", "weights.files"},
    {"weights.coordinates", "data", "cli", "config", "checkpoint_config", "teacher_config", "teacher_files"},
    {"models"},
    {"ops"},
    {"objectives", "parallel", "sandbox"},
    {"types", "rng", "hub", "plain_yaml", "flag_values", "json_files", "errors", "config_fields", "reports"}
    | {"atomic_files", "file_digest", "flag_parser", "plain_names", "record_files", "standard_streams"},
]


def _room(module):
    """The room of a module of the package, by its longest name in ROWS; None where it is in none."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if any(name in row for row in ROWS)), None)


def _row(room):
    return next(number for number, row in enumerate(ROWS) if room in row)


def _module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _room_imports():
    """room -> the other rooms that its modules import."""
    found = {room: set() for row in ROWS for room in row}
    for path in PACKAGE:
        if path.name == "__init__.py":
            continue
        mine = _room(_module(path))
        assert mine is not None, f"{path} is in no room; add it to ROWS"
        for imported in _imports(path):
            if imported.startswith("megatron_tropd."):
                found[mine].add(_room(imported))
    return {room: imported - {room} for room, imported in found.items()}


def test_imports_point_down():
    for room, imported in _room_imports().items():
        for other in imported:
            assert other is not None and _row(other) >= _row(room), f"{room} imports {other}, which stands above it"


def test_rooms_import_each_other_one_way():
    graphlib.TopologicalSorter(_room_imports()).prepare()  # raises CycleError


def test_the_picture_of_the_rooms_is_true():
    """The table of docs/architecture.md: every room, in the order of ROWS, with exactly the rooms it imports."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `([\w./]+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    drawn = {}
    for number, name, imported in rows:
        room = name.removesuffix(".py").rstrip("/").replace("/", ".")
        assert room in ROWS[int(number) - 1], f"{name} stands in row {number}"
        drawn[room] = set(re.findall(r"[\w.]+", imported.replace("`", "").replace("/", ".")))
    assert drawn == _room_imports()


FRONTS = [
    "weights.coordinates", "weights.plan", "weights.transport", "weights.files", "checkpoints", "checkpoints.conversion",
]  # fmt: skip


@pytest.mark.parametrize("room", FRONTS)
def test_others_use_a_room_by_its_front(room):
    """What is imported from outside is what ``FRONT`` of the room's ``__init__.py`` lists, and no less."""
    package = f"megatron_tropd.{room}"
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    front = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "FRONT"
    )
    used = {}
    for path in SOURCES:
        if _module(path).startswith(package + "."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package + "."):
                module = node.module.removeprefix(package + ".")
                if "." not in module:  # a room inside has a front of its own
                    used.setdefault(module, set()).update(alias.name for alias in node.names)
    assert {module: set(names) for module, names in front.items()} == used


def test_contributing_says_where_things_are():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    answers = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text[text.index("## Where is") : text.index("## House rules")])
    assert len({path for path, _ in answers}) >= 7
    for path, name in answers:
        tree = ast.parse((ROOT / "megatron_tropd" / path).read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in tree.body}
        defined |= {t.id for n in tree.body if isinstance(n, ast.AnnAssign | ast.Assign) for t in _names(n)}
        assert not name or name in defined, f"{path} does not define {name}"


ELSEWHERE = {
    "megatron_tropd/objectives/clipped_reward.py",  # docs/objectives.md has the reader write it
    "tensor_parallel/layers.py",  # Megatron-core
    "trainer/distillation/megatron/losses.py",  # verl
    "utils/kernel/kernels.py",  # verl
}


def test_files_that_are_named_exist():
    """In documents, docstrings and comments; the changelog names files of the past."""
    documents = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name != "CHANGELOG.md"]
    gone = {
        f"{_id(path)}: {name}"
        for path in (*documents, *SOURCES)
        for name in re.findall(r"(?<![\w/.*])(?:\w+/)+\w+\.py\b", path.read_text(encoding="utf-8"))
        if name not in ELSEWHERE
        and not any((base / name).exists() for base in (ROOT, ROOT / "megatron_tropd", *path.parents[:2]))
    }
    assert not gone


def _names(node):
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
    return [target for target in targets if isinstance(target, ast.Name)]


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


TENSORS = {"parameters", "placement"}
"""The modules of two rooms of integers that look at live tensors."""


@pytest.mark.parametrize("room", ["coordinates", "plan"])
def test_plans_need_no_tensors(room):
    for path in (ROOT / "megatron_tropd" / "weights" / room).glob("*.py"):
        imported = {line.split(".")[0] for line in _imports(path)}
        assert path.stem in TENSORS or not imported & {"torch", "megatron", "transformers"}, path


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
                assert ours or flag.startswith(("sglang-", "teacher-sglang-")), (
                    f"{path.name}: --{flag}"
                )  # those go to SGLang
