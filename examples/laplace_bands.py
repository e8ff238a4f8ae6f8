"""Uncertainty bands on a regression: three Laplace approximations of laplace-torch, with curvature from factors, beside the exact function.

A network is fitted to 120 noisy values of sin(3x) + x/2 that leave a gap. A Laplace approximation puts a Gaussian around its parameters,
with the Gauss-Newton matrix J^T J / sigma^2 + prior as precision; the noise sigma and the prior are those of the largest marginal
likelihood with full curvature. The bands should hold the exact function, and be wide where there are no data: with full curvature they are.

Run: python examples/laplace_bands.py [FOLDER]          (needs laplace-torch)
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", category=UserWarning)  # of laplace-torch and what it imports
from laplace import Laplace  # noqa: E402

from partials.adapters.laplace import PartialsGGN  # noqa: E402

NOISE, GAP = 0.2, (0.2, 1.4)
KINDS = {"full curvature": ("all", "full"), "its diagonal": ("all", "diag"), "last layer": ("last_layer", "full")}


def exact(x: Tensor) -> Tensor:
    return (3 * x).sin() + x / 2


def data() -> tuple[Tensor, Tensor]:
    x = torch.cat([torch.linspace(-2, GAP[0], 60), torch.linspace(GAP[1], 2, 60)]).double()[:, None]
    return x, exact(x) + NOISE * torch.randn_like(x)


def trained(x: Tensor, y: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return net


def fitted(net: nn.Module, x: Tensor, y: Tensor, subset: str, structure: str) -> Laplace:
    found = Laplace(net, "regression", subset_of_weights=subset, hessian_structure=structure, backend=PartialsGGN)
    found.fit(DataLoader(TensorDataset(x, y), batch_size=64))
    return found


def likeliest(fit: Laplace) -> tuple[Tensor, Tensor]:
    """Prior precision and noise of the largest marginal likelihood, by gradient ascent on their logarithms."""
    prior, noise = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([prior, noise], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-fit.log_marginal_likelihood(prior.exp(), noise.exp())).backward()
        optimizer.step()
    return prior.detach().exp(), noise.detach().exp()


def main(folder: Path) -> dict[str, tuple[float, float, float]]:
    """For each kind: the part of the exact function inside two standard deviations, and the mean deviation at the data and in the gap."""
    torch.manual_seed(0)
    x, y = data()
    net = trained(x, y)
    grid = torch.linspace(-2.5, 2.5, 300).double()[:, None]
    seen = ((grid > -2) & (grid < GAP[0] - 0.1) | (grid > GAP[1] + 0.1) & (grid < 2)).flatten()
    between = ((grid > GAP[0] + 0.1) & (grid < GAP[1] - 0.1)).flatten()
    bands, found = {}, {}
    prior, noise = likeliest(fitted(net, x, y, "all", "full"))
    print(f"prior precision {float(prior):.3f}, noise {float(noise):.3f} (true: {NOISE})")
    for name, kind in KINDS.items():
        fit = fitted(net, x, y, *kind)
        fit.prior_precision, fit.sigma_noise = prior, noise
        mean, variance = fit(grid)
        bands[name] = mean.flatten().detach(), variance.flatten().detach().sqrt()
        inside = (mean.detach() - exact(grid)).abs().flatten() <= 2 * bands[name][1]
        found[name] = (float(inside[seen | between].double().mean()), *(float(bands[name][1][part].mean()) for part in (seen, between)))
        at, gap = found[name][1:]
        print(f"{name:<16}{found[name][0]:.0%} of the exact function inside; deviation {at:.3f} at the data, {gap:.3f} in the gap")
    picture(folder / "bands.png", grid, bands, x, y)
    print(f"picture: {folder / 'bands.png'}")
    return found


def picture(path: Path, grid: Tensor, bands: dict[str, tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(bands), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, (name, (mean, deviation)) in zip(axes, bands.items(), strict=True):
        at = grid.flatten()
        axis.fill_between(at, mean - 2 * deviation, mean + 2 * deviation, alpha=0.3, label="two deviations")
        axis.plot(at, mean, label="network")
        axis.plot(at, exact(at), "k--", linewidth=1, label="exact")
        axis.plot(x.flatten(), y.flatten(), "k.", markersize=3)
        axis.set(title=name, ylim=(-4, 4))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
