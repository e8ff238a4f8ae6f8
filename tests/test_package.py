"""What a user installs: the wheel, in an environment that has torch, numpy and what those need, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import partials

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

TYPED = {
    "pt.jacobian(model, x)": "partials._jacobian.Jacobian",
    "pt.gradient(model, x, y, loss=cross_entropy)": "partials._jacobian.Jacobian",
    'J["weight"]': "torch._tensor.Tensor",
    "J[1:3]": "partials._jacobian.Jacobian",
    "J.dict()": "dict[str, torch._tensor.Tensor]",
    "J @ torch.ones(8)": "torch._tensor.Tensor",
    "J.T @ torch.ones(5, 2)": "torch._tensor.Tensor",
    "J.norms()": "torch._tensor.Tensor",
    "J.shape": "tuple[int, ...]",
    "G.clipped_sum(1.0)": "torch._tensor.Tensor",
    "pt.check(model, x)": "partials.checks.report.Report",
    "pt.explain(model, x)": "partials._plan.Plan",
    "pt.compare(model, x).to_html()": "str",
    'pt.stream(model, [x], "norms", to="store")': "partials.store.reader.Store",
    'pt.open("store").norms()': "torch._tensor.Tensor",
    "pt.laplacian(model)(x)": "torch._tensor.Tensor",
    'pt.derivatives(model, "xx", coords="xyz")(x).xx': "torch._tensor.Tensor",
}
"""What a user's type checker must know."""
FAULTS = {"pt.jacobain(model, x)": "attr-defined", "J.gramm()": "attr-defined", "pt.jacobian(model, x, method=3)": "call-overload"}
"""What it must find."""
USER = """
import torch
from torch.nn.functional import cross_entropy

import partials as pt

model, x, y = torch.nn.Linear(3, 2), torch.randn(5, 3), torch.randint(2, (5,))
J = pt.jacobian(model, x)
G = pt.gradient(model, x, y, loss=cross_entropy)
"""


def run(*words: object, **options: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, as a release makes them."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


def lend(folder: Path, *names: str) -> None:
    """Link distributions of this environment into a folder, with all that they ask for."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # asked for on another system
            continue
        if name in seen:
            continue
        seen.add(name)
        base = Path(str(found.locate_file("")))
        for top in {file.parts[0] for file in found.files or () if ".." not in file.parts and not file.is_absolute()}:
            if not (folder / top).exists() and top != "__pycache__":
                (folder / top).symlink_to(base / top)
        waiting += [re.match(r"[\w.-]+", line).group() for line in found.requires or () if "extra ==" not in line]


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    """The Python of a new environment with the wheel in it, and a way to add what an extra brings."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", home)
    python = home / "bin" / "python"
    if not python.exists():
        pytest.skip("another layout of environments than that of POSIX")
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    lend(packages, "torch", "numpy")
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", wheel)
    return python, packages


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert "partials/py.typed" in names and "partials/cli/__main__.py" not in names
    assert {name.split("/")[0] for name in names} == {"partials", f"partials-{partials.__version__}.dist-info"}
    tree = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert tree <= set(names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "dev", "constraints.txt", "CHANGELOG.md"} <= inside
    assert {"tests/conftest.py", "docs/index.md", "examples/poisson.py", "benchmarks/cases.py"} <= inside


@pytest.mark.slow
def test_the_readmes_example_runs_from_the_wheel(clean, tmp_path):
    python, packages = clean
    (code,), (shown,) = (re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[:1] for language in ("python", "text"))
    where = "import partials; assert partials.__file__.startswith(%r), partials.__file__\n" % str(packages)  # noqa: UP031 - a repr in a line
    assert run(python, "-I", "-c", where + code, cwd=tmp_path) == shown


@pytest.mark.slow
def test_every_public_name_is_there_with_torch_and_numpy_alone(clean, tmp_path):
    python, _ = clean
    code = "import partials, sys; [getattr(partials, name) for name in partials.__all__]\n"
    code += "import partials.solve, partials.testing, partials.rules\n"
    code += "print({'scipy', 'typer', 'rich', 'matplotlib', 'sklearn', 'zarr', 'pytest'} & set(sys.modules))"
    assert run(python, "-I", "-c", code, cwd=tmp_path).strip() == "set()"


@pytest.mark.slow
def test_the_command_line_asks_for_its_extra_and_works_with_it(clean, tmp_path):
    python, packages = clean
    without = subprocess.run([python.parent / "partials", "--help"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert without.returncode and "pip install 'partials[cli]'" in without.stderr
    lend(packages, "typer", "rich")
    assert "demo" in run(python.parent / "partials", "--help", cwd=tmp_path)
    assert "capture" in run(python.parent / "partials", "demo", "--quick", cwd=tmp_path)


@pytest.mark.slow
def test_a_users_type_checker_knows_the_library(clean, tmp_path):
    pytest.importorskip("mypy")
    python, _ = clean
    revealed, wrong = [f"reveal_type({call})" for call in TYPED], list(FAULTS)
    user = tmp_path / "user.py"
    user.write_text(USER + "\n".join([*revealed, *wrong]) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "--cache-dir", str(tmp_path / "cache"), str(user)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "Possible overload" not in line and "note:     def" not in line]
    first = len(USER.splitlines()) + 1
    said = {int(line.split(":")[1]): line for line in lines if line.startswith(user.name) or str(user) in line}
    for number, (call, kind) in enumerate(TYPED.items(), first):
        assert f'"{kind}"' in said.get(number, done.stdout), call
    for number, (call, code) in enumerate(FAULTS.items(), first + len(TYPED)):
        assert f"[{code}]" in said.get(number, done.stdout), call
    assert f"Found {len(FAULTS)} errors in 1 file" in done.stdout, done.stdout


def test_one_version_and_one_set_of_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == partials.__version__
    assert f"version: {partials.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    for dependency in project["project"]["dependencies"]:
        name, _, oldest = dependency.partition(">=")
        assert re.search(rf"\| {name} \| {re.escape(oldest)} \|", page), dependency


def test_fragments_make_a_section():
    pytest.importorskip("towncrier")
    kinds = {
        kind["directory"] for kind in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]["type"]
    }
    fragments = [path for path in (ROOT / "changes").glob("*.md") if path.name != "README.md"]
    assert all(re.fullmatch(rf"(\d+|\+[\w-]+)\.({'|'.join(kinds)})\.md", path.name) for path in fragments)
    shown = run(sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9", "--dir", ROOT, cwd=ROOT)
    assert "## 9.9.9" in shown or not fragments
    assert all(path.read_text(encoding="utf-8").split()[-1] in shown for path in fragments)


def test_issue_forms_are_whole():
    yaml = pytest.importorskip("yaml")
    forms = ROOT / ".github" / "ISSUE_TEMPLATE"
    assert {path.stem for path in forms.glob("*.yml")} == {"wrong_number", "bug", "question", "config"}
    for path in forms.glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != "config":
            assert form["name"] and form["description"] and form["body"]
            ids = [part["id"] for part in form["body"]]
            assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in form["body"])
