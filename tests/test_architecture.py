"""The house rules, read from the syntax trees: size, import direction, no branch on names, light imports.

Each checker is a function from source text to a list of complaints, so that each is also shown to find a bad snippet.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "paft"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SIZED = [file for room in ("paft", "tests", "benchmarks", "examples") for file in sorted((ROOT / room).rglob("*.py"))]

MAX_FILE, MAX_FUNCTION, MAX_CLASS = 300, 50, 150

# A module may import from its own place in the flow or an earlier one; rooms in one place are siblings.
FLOW = """errors progress | jsonfile target preflight patterns bounded | yamlfile store | hub provenance | verify doctor
    | complaint sections recipe card | catalog demo attach | data models tokens parallel | executor | checkpoint launch
    | factors | peftfile | adapter | naming | variants | tying | placement | evaluate | train | delta | merge
    | report | answers candidates controls probe search tasks
    | runplan | runjob | runstore | runeval runmerge | runcosts | run | compare | cli | __main__"""
RANK = {room: rank for rank, rooms in enumerate(FLOW.split("|")) for room in rooms.split()}

CHOICES = {"method", "merge_method", "schedule"}
HEAVY = ("torch", "transformers", "trl", "peft", "matplotlib", "datasets", "mergekit")


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in SOURCES}


# Rule 1: sizes


def oversized(source: str) -> list[str]:
    """Files, functions (decorators not counted, docstring counted) and classes that are too long."""
    lines = len(source.splitlines())
    found = [f"file of {lines} lines (at most {MAX_FILE})"] if lines > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                found.append(f"line {node.lineno}: {node.name} has {length} lines (at most {limit})")
    return found


@pytest.mark.parametrize("file", SIZED, ids=relative)
def test_sizes(file: Path) -> None:
    assert not oversized(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "clean"),
    [
        ("\n" * MAX_FILE, True),
        ("\n" * (MAX_FILE + 1), False),
        ("def f():\n" + "    pass\n" * (MAX_FUNCTION - 1), True),
        ("def f():\n" + "    pass\n" * MAX_FUNCTION, False),
        ("async def f():\n" + "    pass\n" * MAX_FUNCTION, False),
        ("class C:\n" + "    x = 1\n" * (MAX_CLASS - 1), True),
        ("class C:\n" + "    x = 1\n" * MAX_CLASS, False),
    ],
)
def test_sizes_can_fail(source: str, clean: bool) -> None:
    assert (not oversized(source)) is clean


# Rule 2: imports point one way


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module of paft that ``source`` imports, at any depth; ``from paft import data`` counts as ``paft.data``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "paft")
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                origin = ".".join([*above, origin] if origin else above)
            if origin.split(".")[0] == "paft":
                for alias in node.names:
                    deeper = f"{origin}.{alias.name}"
                    yield node.lineno, deeper if deeper in MODULES else origin


def room_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def misdirected(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports against the flow, of ``paft.cli`` from outside it, or of a room that has no place in the flow."""
    room = room_of(module)
    if room and room not in RANK:
        return [f"{module} has no place in FLOW"]
    rank = RANK[room] if room else RANK["cli"] - 1
    found = []
    for line, target in imported_modules(source, module, is_package=is_package):
        goal = room_of(target)
        if not goal:  # the package itself: its version and lazy names
            continue
        if goal not in RANK:
            found.append(f"line {line}: {target} has no place in FLOW")
        elif goal == "cli" and room not in ("cli", "__main__"):
            found.append(f"line {line}: nothing imports paft.cli")
        elif RANK[goal] > rank:
            found.append(f"line {line}: {module} imports {target}, which stands later in the flow")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_import_direction(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert not misdirected(source, module_name(file), is_package=file.name == "__init__.py")


def import_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_cycle() -> None:
    graph = {}
    for file in SOURCES:
        name, source = module_name(file), file.read_text(encoding="utf-8")
        imports = imported_modules(source, name, is_package=file.name == "__init__.py")
        graph[name] = {target for _, target in imports} - {"paft", name}
    assert not import_cycle(graph)


def test_import_cycle_can_fail() -> None:
    assert import_cycle({"paft.data": {"paft.models"}, "paft.models": {"paft.data"}})
    assert not import_cycle({"paft.data": {"paft.models"}, "paft.models": {"paft.errors"}})


@pytest.mark.parametrize(
    ("module", "source", "clean"),
    [
        ("paft.run", "from paft.merge.engine import merge", True),
        ("paft.merge.engine", "from paft.delta import Delta\nfrom paft.merge.ops import trim", True),
        ("paft.merge.engine", "from ..delta import Delta\nimport torch", True),
        ("paft.cli.main", "from paft.cli import common\nfrom paft import errors", True),
        ("paft.recipe", "import paft.run", False),
        ("paft.errors", "def f():\n    from paft.recipe import load", False),
        ("paft.delta", "from .merge import engine", False),
        ("paft.merge.engine", "from ..report import table", False),
        ("paft.run", "import paft.cli", False),
        ("paft", "from paft.cli import main", False),
        ("paft.errors", "from paft import provenance", False),
        ("paft.run", "from paft.helpers import x", False),
        ("paft.helpers", "", False),
    ],
)
def test_import_direction_can_fail(module: str, source: str, clean: bool) -> None:
    assert (not misdirected(source, module)) is clean


# Rule 3: no branch on the name of a method or schedule, and no code among the recipes


def named_choice(node: ast.expr) -> bool:
    """Is ``node`` a variable, attribute, key or ``.get`` called method or schedule (or the ``.name`` of one)?"""
    if isinstance(node, ast.Attribute):
        return node.attr in CHOICES or (node.attr in {"name", "value"} and named_choice(node.value))
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value in CHOICES
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"get", "lower"}:
        keys = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        return any(key in CHOICES for key in keys) or named_choice(node.func.value)
    return isinstance(node, ast.Name) and node.id in CHOICES


def name_branches(source: str) -> list[str]:
    """Comparisons of a method or schedule with ``==``, ``!=``, a literal collection, or by ``match``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Match) and named_choice(node.subject):
            found.append(f"line {node.lineno}: match on {ast.unparse(node.subject)}")
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
            literal = isinstance(right, ast.Tuple | ast.List | ast.Set | ast.Dict | ast.Constant)
            equality = isinstance(operator, ast.Eq | ast.NotEq) and (named_choice(left) or named_choice(right))
            member = isinstance(operator, ast.In | ast.NotIn) and literal and named_choice(left)
            if equality or member:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def may_branch(file: Path) -> bool:
    return file.is_relative_to(PACKAGE / "merge" / "methods") or file == PACKAGE / "train" / "schedules.py"


@pytest.mark.parametrize("file", [file for file in SOURCES if not may_branch(file)], ids=relative)
def test_no_branch_on_names(file: Path) -> None:
    assert not name_branches(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "clean"),
    [
        ("METHODS[method](deltas)", True),
        ("if method not in METHODS: pass", True),
        ("if method is None: pass", True),
        ("if method == 'ties': pass", False),
        ("x = 1 if 'ties' != recipe.method else 2", False),
        ("if recipe['method'] in ('ties', 'dare_ties'): pass", False),
        ("if schedule in {'mix'}: pass", False),
        ("if options.get('schedule') == 'mix': pass", False),
        ("if method.name == 'ties': pass", False),
        ("match recipe.method:\n    case 'ties': pass", False),
    ],
)
def test_no_branch_on_names_can_fail(source: str, clean: bool) -> None:
    assert (not name_branches(source)) is clean


def code_among_recipes(root: Path) -> list[Path]:
    return [file for room in ("adapters", "merges") for file in (root / room).rglob("*.py*") if file.is_file()]


def test_no_code_among_recipes(tmp_path: Path) -> None:
    assert not code_among_recipes(ROOT)
    (tmp_path / "merges" / "deep").mkdir(parents=True)
    (tmp_path / "merges" / "deep" / "x.py").touch()
    assert code_among_recipes(tmp_path)


# Rule 4: light imports


def heavy_modules(statement: str) -> str:
    """Run ``statement`` in a fresh interpreter and return the heavy packages it loaded, comma-separated."""
    code = f"""
import sys
sys.argv = ["paft", "--help"]
try:
    {statement}
except SystemExit as stop:
    assert not stop.code, stop.code
print("\\nLOADED", ",".join(name for name in {HEAVY} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED")[2].strip()


EVERY_COMMAND = (
    "import importlib, pkgutil, paft.cli; "
    "[importlib.import_module(m.name) for m in pkgutil.walk_packages(paft.cli.__path__, 'paft.cli.')]"
)


@pytest.mark.parametrize(
    "statement", ["import paft", "import paft.cli", EVERY_COMMAND, "from paft.cli import main; main()"],
    ids=["import paft", "import paft.cli", "every command", "paft --help"],
)  # fmt: skip
def test_light_imports(statement: str) -> None:
    assert heavy_modules(statement) == ""


def test_shell_completion_is_light() -> None:
    statement = "import os; os.environ['_PAFT_COMPLETE'] = 'bash_source'; from paft.cli import main; main()"
    assert heavy_modules(statement) == ""


def test_light_imports_can_fail() -> None:
    assert heavy_modules("import paft, datasets").split(",") == ["datasets"]
