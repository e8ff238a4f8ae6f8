"""The command line as a process of its own: exit codes, streams, interrupts, and life without the extra."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRC = Path(__file__).parents[3] / "src"


@pytest.fixture
def environment():
    paths = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}


def partials(environment, *words, python=("-m", "partials")):
    return subprocess.run([sys.executable, *python, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ["explain", "model.py:net", "--data", "x.npy", "--json"]),
        (2, ["explain", "model.py:nett", "--data", "x.npy", "--json"]),
        (2, ["explian"]),
        (3, ["check", "model.py:dropping", "--data", "model.py:x", "--json"]),
    ],
)
def test_exit_codes_and_streams(environment, code, words):
    run = partials(environment, *words)
    assert run.returncode == code, run.stderr
    assert run.stderr
    assert "\x1b[" not in run.stderr + run.stdout
    if code:
        assert run.stdout == ""
    else:
        assert json.loads(run.stdout)["samples"] == 5


def test_a_failed_check_ends_with_1(environment, folder):
    (folder / "failing.py").write_text(
        "import sys\n"
        "from partials.checks.report import Report\n"
        "Report.passed = property(lambda report: False)\n"
        "from partials.cli import main\n"
        "sys.exit(main())\n"
    )
    run = partials(environment, "check", "model.py:net", "--data", "model.py:x", python=["failing.py"])
    assert run.returncode == 1, run.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_an_interrupt_ends_with_130(environment, folder):
    (folder / "slow.py").write_text("import time, pathlib\npathlib.Path('started').touch()\ntime.sleep(60)\n")
    words = [sys.executable, "-m", "partials", "explain", "slow.py:net", "--data", "x.npy"]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "started").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "partials: interrupted"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(environment, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from partials.cli import main; sys.exit(main())"
    run = partials(environment, "--help", python=["-c", code])
    assert run.returncode == 2, run.stderr
    assert run.stderr == f"partials: the command line needs {missing}: pip install 'partials[cli]'\n"


def test_another_missing_module_is_not_mistaken_for_the_extra(environment):
    code = "import sys; sys.modules['importlib.metadata'] = None; from partials.cli import main; main()"
    assert "pip install" not in partials(environment, python=["-c", code]).stderr
