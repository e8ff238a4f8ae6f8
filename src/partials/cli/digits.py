"""Real handwritten digits: a small network, the gradient of its loss for each digit, and a picture of the most telling ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._compare import draw_times
from partials._plan import human_time

Tensor = torch.Tensor
Progress = Callable[[str], None]
RED, BLUE = "#b23a48", "#2f6690"
TRAINED_ON, EPOCHS, BATCH, BUDGET = 1437, 8, 64, "256MiB"


@dataclass(frozen=True)
class Digits:
    """Pictures (N, 1, 8, 8) with values in [0, 1], and what they show."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Studied:
    """What was found out about each digit."""

    digits: Digits
    predicted: Tensor
    norms: Tensor
    """The norm of each digit's gradient."""
    accuracy: float
    """On digits that were not trained on."""
    seconds: float
    """For the gradients of all digits."""
    method: str
    parameters: int
    report: pt.Report
    comparison: pt.Comparison

    @property
    def largest(self) -> list[int]:
        """The ten digits with the largest gradients, the largest first."""
        return [int(n) for n in self.norms.argsort(descending=True)[:10]]

    def to_dict(self) -> dict[str, Any]:
        told = {
            n: {"true": int(self.digits.labels[n]), "predicted": int(self.predicted[n]), "norm": float(self.norms[n])} for n in self.largest
        }
        return {
            "digits": len(self.digits),
            "parameters": self.parameters,
            "accuracy": self.accuracy,
            "method": self.method,
            "seconds": self.seconds,
            "check": self.report.to_dict(),
            "largest": [{"digit": n, **words} for n, words in told.items()],
            "comparison": self.comparison.to_dict(),
        }


def load() -> Digits:
    """The 1797 digits that come with scikit-learn, shuffled by a fixed seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return Digits(images[order], torch.from_numpy(bunch.target).long()[order])


def network() -> nn.Module:
    """Two convolutions and a linear layer: 3818 parameters."""
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 10))


def train(model: nn.Module, digits: Digits, epochs: int, say: Progress) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        say(f"training, epoch {epoch + 1} of {epochs}")
        for batch in torch.randperm(len(digits)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Pictures of 8 by 8 gain nothing from a second thread, and on a busy machine lose much by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def study(digits: Digits, say: Progress, *, epochs: int = EPOCHS, timed: int = 128) -> Studied:
    """Train, take the gradient of every digit's loss, check it, and time the methods on `timed` of the digits."""
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(0)
        model = network()
        seen = min(TRAINED_ON, len(digits) * 4 // 5)
        train(model, Digits(digits.images[:seen], digits.labels[:seen]), epochs, say)
        with torch.no_grad():
            predicted = model(digits.images).argmax(1)
        say(f"gradients of all {len(digits)} digits, within {BUDGET}")
        start = time.perf_counter()
        G = pt.gradient(model, digits.images, digits.labels, loss=F.cross_entropy, max_memory=BUDGET, check="never")
        norms = G.norms()
        seconds = time.perf_counter() - start
        say("checking them")
        report = G.check()
        few = Digits(digits.images[:timed], digits.labels[:timed])
        comparison = pt.compare(model, few.images, few.labels, loss=F.cross_entropy, repeats=5, progress=say)
    accuracy = float((predicted == digits.labels)[seen:].float().mean())
    return Studied(digits, predicted, norms, accuracy, seconds, G.plan.method, G.shape[-1], report, comparison)


def picture(studied: Studied, path: Path) -> None:
    """The ten digits with the largest gradients, all the norms, and the times of the methods."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(12, 6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    above, below = _halves(figure)
    above.suptitle(f"The ten of {len(studied.digits)} handwritten digits with the largest gradients", fontsize=13)
    for axes, n in zip(above.subplots(1, 10), studied.largest, strict=True):
        true, said = int(studied.digits.labels[n]), int(studied.predicted[n])
        axes.imshow(studied.digits.images[n, 0].numpy(), cmap="gray_r", interpolation="nearest")
        axes.set_title(f"{true} read as {said}", fontsize=10, color=RED if true != said else BLUE)
        axes.set_xlabel(f"norm {float(studied.norms[n]):.3g}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("0.8")
    left, right = below.subplots(1, 2, width_ratios=(1, 1.3))
    _draw_norms(left, studied)
    draw_times(right, studied.comparison, errors=False)
    right.set_title(f"{studied.comparison.samples} of the gradients by every method: time, memory", fontsize=11)
    words = (
        f"{len(studied.digits)} gradients of {studied.parameters} parameters in {human_time(studied.seconds)} ({studied.method}), checked; "
    )
    figure.supxlabel(
        f"{words}{100 * studied.accuracy:.1f} % of the digits that were not trained on are read right", fontsize=9, color="0.35"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _halves(figure: Any) -> Any:
    return figure.subfigures(2, 1, height_ratios=(1, 1.75), hspace=0.04)


def _draw_norms(axes: Any, studied: Studied) -> None:
    """How many digits have which norm: most of them teach the network little any more."""
    shown = studied.norms.clamp_min(1e-8).log10()
    axes.hist(shown.tolist(), bins=60, color="#a9bfd6")
    tenth = float(shown[studied.largest[-1]])
    axes.axvline(tenth, color=RED, lw=1)
    axes.annotate(
        "the ten", (tenth, axes.get_ylim()[1]), xytext=(-4, -4), textcoords="offset points", ha="right", va="top", fontsize=8, color=RED
    )
    axes.xaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.set_title(f"gradient norms of all {len(studied.digits)} digits", fontsize=11)
    axes.set_ylabel("digits", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=7)
