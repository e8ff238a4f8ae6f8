"""The tangent kernel K = J J^T of a network while it learns to tell handwritten fours from nines.

To first order a step of gradient descent changes the outputs by -lr K (f - y) (Jacot, Gabriel, Hongler 2018, arXiv:1806.07572,
section 4), which is compared with what the step did. How well K is aligned with the labels is <K, y y^T> / (|K| |y y^T|)
(Cristianini et al. 2001).
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training import arguments

import partials as pt

SHOWN = (0, 10, 100)
"""Steps at which the kernel is drawn, with the last one."""


def fours_and_nines(n: int) -> tuple[Tensor, Tensor]:
    """(n, 64) and (n,): fours (+1) first, then nines (-1)."""
    data = load_digits()
    images, labels = torch.tensor(data.data) / 16, torch.tensor(data.target)
    chosen = torch.cat([(labels == digit).nonzero()[: n // 2, 0] for digit in (4, 9)])
    return images[chosen], (labels[chosen] == 4).double() * 2 - 1


def alignment(K: Tensor, y: Tensor) -> float:
    return float(y @ K @ y / (K.norm() * (y @ y)))


def main() -> None:
    options = arguments(__doc__, 300, "kernel_in_training.png")
    torch.manual_seed(0)
    x, y = fours_and_nines(200)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1), nn.Flatten(0)).double()
    kernels, aligned, foreseen = {}, [], []
    for step in range(options.steps + 1):
        J = pt.jacobian(net, x)
        K, r = J.gram(), J.values - y
        aligned.append(alignment(K, y))
        if step in (*SHOWN, options.steps):
            kernels[step] = K
        lr = 0.5 / float(torch.linalg.matrix_norm(K, 2))
        change = torch.cat([p.flatten() for p in net.parameters()]) - lr * (J.T @ r)
        torch.nn.utils.vector_to_parameters(change, net.parameters())
        with torch.no_grad():
            moved, expected = net(x) - J.values, -lr * (K @ r)
        foreseen.append(float((moved - expected).norm() / moved.norm()))
    right = float(((net(x) > 0) == (y > 0)).double().mean())
    print(f"alignment of kernel and labels {aligned[0]:.3f} at the start, {aligned[-1]:.3f} after {options.steps} steps, {right:.1%} right")
    print(f"a step foreseen by the kernel to {max(foreseen):.1%} at worst, {foreseen[-1]:.2%} at the end")
    draw(options.picture, kernels, aligned, foreseen)


def draw(path: str, kernels: dict[int, Tensor], aligned: list[float], foreseen: list[float]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(kernels) + 2, figsize=(3 * (len(kernels) + 2), 3.2), layout="constrained")
    for axis, (step, K) in zip(axes, kernels.items(), strict=False):
        scale = K.diagonal().sqrt()
        axis.imshow(K / scale / scale[:, None], vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=f"kernel after {step} steps", xticks=[], yticks=[])
    axes[0].set_ylabel("nines | fours")
    axes[-2].plot(aligned)
    axes[-2].set(xlabel="step", title="alignment with the labels")
    axes[-1].semilogy(foreseen)
    axes[-1].set(xlabel="step", title="|step - step by K| / |step|")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
