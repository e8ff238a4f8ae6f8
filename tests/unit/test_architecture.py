"""The house rules that a machine can keep: see the layout in the docs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
FILES = sorted(SRC.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))


# --- size and place ----------------------------------------------------------------------------------------------


@each_file
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@each_file
def test_no_function_is_too_long(path):
    long = {}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > LONGEST_FUNCTION:
                long[node.name] = lines
    assert not long


@each_file
def test_only_the_command_line_prints(path):
    if "cli" not in path.relative_to(SRC).parts:
        calls = (node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call))
        assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_no_file_is_called_utils():
    assert not [path for path in FILES if path.stem.strip("_") in ("util", "utils")]


# --- private names of torch --------------------------------------------------------------------------------------


def private_torch_names(tree: ast.Module) -> list[str]:
    """Every dotted name below torch with a part that starts with one underscore, whatever it was imported as."""
    imported, named = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                named.append(alias.name)
                imported[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                named.append(f"{node.module}.{alias.name}")
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    named += [name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (name := dotted(node, imported))]
    return sorted({name for name in named if name.split(".")[0] == "torch" and any(map(is_private, name.split(".")))})


def dotted(node: ast.expr, imported: dict[str, str]) -> str:
    """`F._x` as `torch.nn.functional._x`; "" where the name does not start at an import."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, imported)
        return start and f"{start}.{node.attr}"
    return imported.get(node.id, "") if isinstance(node, ast.Name) else ""


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


@each_file
def test_private_names_of_torch_are_in_compat_only(path):
    if path.name != "_compat.py":
        assert not private_torch_names(TREES[path])


def test_private_names_are_noticed():
    code = "import torch\nimport torch.nn.functional as F\nfrom torch._C import a\nfrom torch.utils import _pytree as p, data\n"
    code += "torch.ones\nF._b\ntorch._c.d\ndata.__name__\nself._e\n"
    expected = ["torch._C.a", "torch._c", "torch._c.d", "torch.nn.functional._b", "torch.utils._pytree"]
    assert private_torch_names(ast.parse(code)) == expected


# --- imports -----------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def executed_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported: not those of functions, nor those for type checkers."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from executed_at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from executed_at_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from executed_at_import(handler.body)


def imports_of(name: str, is_package: bool, tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of this library that a module names in its imports; the packages above them are not counted."""
    found = set()
    for node in executed_at_import(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return found & modules


def test_no_import_cycles():
    modules = {module_name(path) for path in FILES}
    graph = {}
    for path in FILES:
        name = module_name(path)
        graph[name] = imports_of(name, path.name == "__init__.py", TREES[path], modules) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_imports_are_resolved():
    modules = {"p", "p.a", "p.b", "p.q", "p.q.c"}
    code = "from . import a\nfrom ..b import x\nimport p.q.c\ndef f():\n    from .. import q\nif TYPE_CHECKING:\n    from .. import q\n"
    assert imports_of("p.q", True, ast.parse("from . import c\nfrom .. import a\nfrom .c import x"), modules) == {"p.a", "p.q.c"}
    assert imports_of("p.q.c", False, ast.parse(code), modules) == {"p.q", "p.b", "p.q.c"}


def loaded_after(code: str, names: str) -> list[str]:
    """Which of the named modules a fresh Python has loaded once it has run the code."""
    paths = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    code = f"try:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\nimport sys\nprint('loaded:', *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.rsplit("loaded:", 1)[1].split()
    assert "partials" in loaded
    return sorted(set(names.split()) & set(loaded))


def test_the_library_imports_nothing_heavy():
    code = "import partials; [getattr(partials, name) for name in partials.__all__]"
    heavy = "IPython jax matplotlib pandas psutil pyarrow pytest ray rich safetensors scipy sklearn typer zarr"
    heavy += " curvlinops laplace opacus trak transformers"
    assert not loaded_after(code, heavy)


@pytest.mark.parametrize(
    "code",
    [
        "import partials.cli; partials.cli.main",
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('partials', run_name='__main__', alter_sys=True)",
    ],
    ids=["import", "help"],
)
def test_help_does_not_wait_for_torch(code):
    assert not loaded_after(code, "numpy torch")
