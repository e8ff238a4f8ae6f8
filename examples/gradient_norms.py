"""The norm of every handwritten digit's gradient while a network learns them: most digits stop teaching, a few go on.

Norms come from factors in the same pass as the sum of all gradients, which is what an optimiser needs: no row is formed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training import arguments

import partials as pt


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def main() -> None:
    options = arguments(__doc__, 60, "gradient_norms.png")
    x, y = digits()
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    norms: list[Tensor] = []
    for _ in range(options.steps):
        G = pt.gradient(net, x, y, loss=F.cross_entropy)
        norms.append(G.norms())
        optimizer.zero_grad()
        G.accumulate_grad(torch.full((len(x),), 1 / len(x)))
        optimizer.step()
    last = norms[-1]
    wrong = net(x).argmax(1) != y
    tenth = last.argsort(descending=True)[: len(x) // 10]
    print(f"median norm {norms[0].median():.3g} at the first step, {last.median():.3g} at the last")
    print(f"{int(wrong[tenth].sum())} of the {int(wrong.sum())} digits that are read wrong are among the tenth with the largest gradients")
    draw(options.picture, norms, x, y, net(x).argmax(1))


def draw(path: str, norms: list[Tensor], x: Tensor, y: Tensor, read: Tensor) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    axis, steps = left.subplots(), torch.arange(len(norms))
    levels = torch.stack(norms).quantile(torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]), dim=1)
    axis.fill_between(steps, levels[0], levels[4], alpha=0.2, label="98 % of the digits")
    axis.fill_between(steps, levels[1], levels[3], alpha=0.4, label="80 %")
    axis.semilogy(steps, levels[2], label="median")
    axis.set(xlabel="step", title="norms of the gradients of single digits")
    axis.legend()
    top = norms[-1].argsort(descending=True)[:12].tolist()
    right.suptitle("the largest at the end")
    for place, n in zip(right.subplots(2, 6).flat, top, strict=True):
        place.imshow(x[n, 0], cmap="gray_r")
        place.set_title(f"{y[n]} read as {read[n]}\nnorm {norms[-1][n]:.2g}", fontsize=8)
        place.axis("off")
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
