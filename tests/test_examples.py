"""The examples: each runs with few steps, draws its picture, and is on its way to the solution."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOUNDS = {"poisson": (60, 0.01), "heat": (100, 0.05), "burgers": (60, 0.05)}
"""Steps, and the relative error of Levenberg-Marquardt after them."""
NAMED = {"flipped_labels", "gradient_norms", "ground_state", "influential_sentences", "kernel_in_training", "lotka_volterra"}
"""The others, each with a test of its own name."""


def run(name: str, steps: int, picture: Path) -> str:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--steps", str(steps), "--picture", str(picture)]
    found = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{found}"})
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 10_000
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_an_equation(name: str, tmp_path: Path) -> None:
    steps, bound = BOUNDS[name]
    said = run(name, steps, tmp_path / "picture.png")
    ours, adam = (float(error) for error in re.findall(r"error (\S+)", said))
    assert ours < min(bound, adam)


@pytest.mark.slow
def test_the_ground_state(tmp_path: Path) -> None:
    said = run("ground_state", 100, tmp_path / "picture.png")
    assert abs(float(said.split()[1]) - 0.5) < 0.01


@pytest.mark.slow
def test_the_kernel_in_training(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said = run("kernel_in_training", 60, tmp_path / "picture.png")
    start, end, worst = (
        float(found) for found in re.findall(r"labels (\S+) at the start, (\S+) after|to (\S+)% at worst", said) for found in found if found
    )
    assert end > 1.5 * start and worst < 10


@pytest.mark.slow
def test_gradient_norms(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said = run("gradient_norms", 30, tmp_path / "picture.png")
    first, last = (float(found) for found in re.findall(r"(?:norm|and|,) (\S+) at the", said))
    among, wrong = (int(found) for found in re.findall(r"(\d+) of the (\d+)", said)[0])
    assert last < first / 10 and among >= 0.8 * wrong


@pytest.mark.slow
def test_the_ode(tmp_path: Path) -> None:
    """The fit is what is published from the same data; forward mode agrees with differences and with the conserved quantity."""
    said = run("lotka_volterra", 8, tmp_path / "picture.png")
    for found, error, published in re.findall(r"= (\S+) \+- (\S+)   published (\S+)", said):
        assert abs(float(found) - float(published)) < float(error)
    differences, law = (float(found) for found in re.findall(r"differences (\S+), the law broken by (\S+)", said)[0])
    assert differences < 1e-7 and law < 1e-4


@pytest.mark.slow
def test_influential_sentences(tmp_path: Path) -> None:
    """By chance 2 % of the sentences found would be the person's own."""
    pytest.importorskip("transformers")
    said = run("influential_sentences", 150, tmp_path / "picture.png")
    own = int(re.findall(r"^(\d+)%", said, re.MULTILINE)[0])
    before, without, random = (float(found) for found in re.findall(r"(\d\.\d+) (?:as trained|without)", said))
    assert own > 40 and without - before > 2 * (random - before)


@pytest.mark.slow
def test_flipped_labels(tmp_path: Path) -> None:
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(ROOT / "examples" / "flipped_labels.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    influence, loss = (float(found) for found in re.findall(r"(?:influence|loss) (0\.\d+)", done.stdout))
    assert influence > 0.99 and loss > 0.99 and (tmp_path / "found.png").stat().st_size > 10_000


def run_in(folder: Path, name: str) -> str:
    """The output of an example that takes a folder for its picture."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [picture.stat().st_size > 10_000 for picture in folder.glob("*.png")] == [True]
    return done.stdout


@pytest.mark.slow
def test_uncertainty_bands(tmp_path: Path) -> None:
    pytest.importorskip("laplace"), pytest.importorskip("matplotlib")
    said = run_in(tmp_path, "laplace_bands")
    inside, at, gap = re.search(r"full curvature +(\d+)% .* deviation (\S+) at the data, (\S+) in the gap", said).groups()
    assert float(inside) > 90 and float(gap) > 4 * float(at)


@pytest.mark.slow
def test_private_training(tmp_path: Path) -> None:
    pytest.importorskip("opacus"), pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    said = run_in(tmp_path, "private_training")
    accuracy, epsilon = re.findall(r"accuracy (\S+)% .* epsilon (\S+) at delta", said)[-1]
    assert float(accuracy) > 75 and 5 < float(epsilon) < 9


def test_every_example_is_tested() -> None:
    pictures_in_a_folder = {"laplace_bands", "private_training"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*BOUNDS, *NAMED, *pictures_in_a_folder, "training"}
