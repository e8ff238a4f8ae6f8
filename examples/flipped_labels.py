"""Find labels that were flipped on purpose, among real handwritten digits, by influence: gradients sketched into a store.

The self-influence of training sample n (Koh and Liang 2017, arXiv:1703.04730, section 5.4), with the damped Fisher matrix of the sketched
gradients in the place of the Hessian: s_n = g_n . (G^T G / N + damping)^-1 . g_n. A sample on which the network would change its mind
most, were it left out, is looked at first. Held-out digits are attributed by the same matrix: which training samples helped them most.

Run: python examples/flipped_labels.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import partials as pt

K, DAMPING, FLIPPED = 1024, 0.1, 0.1


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def flipped(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of which a tenth are wrong, and which."""
    wrong = torch.rand(len(y)) < FLIPPED
    return torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y), wrong


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-4)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def area(score: torch.Tensor, wrong: torch.Tensor) -> float:
    """The area under the ROC curve: how often a wrong label scores above a right one."""
    rank = score.argsort().argsort().double() + 1
    count = int(wrong.sum())
    return float((rank[wrong].sum() - count * (count + 1) / 2) / (count * (len(wrong) - count)))


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    x, y = digits()
    order = torch.randperm(len(x))
    train, held = order[:1400], order[1400:]
    y_train, wrong = flipped(y[train])
    net = trained(x[train], y_train)

    batches = list(zip(x[train].split(256), y_train.split(256), strict=True))
    store = pt.stream(net, batches, what=f"sketch:{K}", loss=F.cross_entropy, to=folder / "train.store")
    rows = store.dense().double()
    fisher = rows.T @ rows / len(rows) + DAMPING * torch.eye(K, dtype=torch.float64)
    solved = torch.linalg.solve(fisher, rows.T).T
    influence = (rows * solved).sum(1)
    loss = F.cross_entropy(net(x[train]), y_train, reduction="none").detach()

    found = {"influence": area(influence, wrong), "loss": area(loss, wrong)}
    top = influence.argsort(descending=True)[:20]
    picture(folder / "found.png", x[train][top], y_train[top], y[train][top])
    print(f"{int(wrong.sum())} of {len(train)} labels flipped; area under the curve: influence {found['influence']:.4f}, ", end="")
    print(f"loss {found['loss']:.4f}")
    print(f"of the 20 most influential, {int(wrong[top].sum())} were flipped: {folder / 'found.png'}")

    held_out = pt.gradient(net, x[held], y[held], loss=F.cross_entropy).sketch(K).double()
    helped = (held_out @ solved.T).argmax(1)
    found["attributed"] = float((y_train[helped] == y[held]).double().mean())
    print(f"the training sample that helped a held-out digit most is of its class in {found['attributed']:.0%} of {len(held)} cases")
    return found


def picture(path: Path, images: torch.Tensor, labels: torch.Tensor, true: torch.Tensor) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 10, figsize=(12, 3))
    for axis, image, label, right in zip(numpy.ravel(axes), images, labels.tolist(), true.tolist(), strict=True):
        axis.imshow(image.reshape(8, 8), cmap="gray_r")
        axis.set_title(f"{label}" + ("" if label == right else f" (is {right})"), fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
