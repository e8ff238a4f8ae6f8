"""Differentially private training of a recurrent network on real handwritten digits, with Opacus's noise, sampling and accountant.

A GRU reads the eight rows of each image, one after the other: a layer that Opacus asks to replace. Clipped sums come from factors. What
has been spent after each epoch is stated as epsilon, for delta = 1e-5. (Abadi et al. 2016, "Deep learning with differential privacy".)

Run: python examples/private_training.py [FOLDER]          (needs opacus, scikit-learn)
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import partials as pt
from partials.adapters.opacus import backward, make_private

warnings.filterwarnings("ignore", message="Secure RNG turned off")  # for experiments; PrivacyEngine(secure_mode=True) is for release
BOUND, NOISE, DELTA, EPOCHS = 0.5, 1.2, 1e-5, 25


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those held out."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def norms(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return pt.gradient(net, x, y, loss=F.cross_entropy).norms()


def main(folder: Path) -> tuple[float, float]:
    """(accuracy on held-out digits, epsilon)."""
    torch.manual_seed(0)
    x, y, x_held, y_held = digits()
    net, engine = Reader(), PrivacyEngine(accountant="rdp")
    optimizer, loader = make_private(
        engine,
        module=net,
        optimizer=torch.optim.Adam(net.parameters(), 1e-2),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=100),
        noise_multiplier=NOISE,
        max_grad_norm=BOUND,
    )
    before, course = norms(net, x, y), []
    for epoch in range(1, EPOCHS + 1):
        for a, b in loader:
            backward(optimizer, net, a, b, loss=F.cross_entropy)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            accuracy = float((net(x_held).argmax(1) == y_held).double().mean())
        course.append((engine.get_epsilon(DELTA), accuracy))
        if epoch % 5 == 0:
            print(f"epoch {epoch}: accuracy {accuracy:.1%} on {len(x_held)} held-out digits, epsilon {course[-1][0]:.2f} at delta {DELTA}")
    picture(folder / "private.png", before, norms(net, x, y), course)
    print(f"picture: {folder / 'private.png'}")
    return course[-1][1], course[-1][0]


def picture(path: Path, before: Tensor, after: Tensor, course: list[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    edges = torch.logspace(-3, 1.5, 60).tolist()
    left.hist(before.numpy(), bins=edges, alpha=0.6, label="before training")
    left.hist(after.numpy(), bins=edges, alpha=0.6, label="after")
    left.axvline(BOUND, color="k", linestyle="--", label="bound")
    left.set(xscale="log", xlabel="norm of a sample's gradient", ylabel="samples")
    left.legend()
    right.plot(*zip(*course, strict=True), ".-")
    right.set(xlabel=f"epsilon spent (delta = {DELTA})", ylabel="accuracy on held-out digits")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
