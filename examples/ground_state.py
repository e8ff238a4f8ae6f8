"""The ground state of the harmonic oscillator, -u''/2 + x^2 u/2 = E u, by variational Monte Carlo; its energy is 0.5."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from training import arguments, network

import partials as pt
from partials.solve import NaturalGradient, log_derivatives


class LogPsi(nn.Module):
    """log psi(x): a network, and a parabola that is too flat but makes psi vanish far away."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(1, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1) -> (N,)"""
        return self.net(x).squeeze(-1) - x.square().sum(-1) / 8


def local_energy(log_psi: nn.Module, x: Tensor) -> Tensor:
    """H psi / psi at each point, (N,); the same number everywhere if psi is an eigenfunction."""
    d = pt.derivatives(log_psi, "x", "xx", coords="x")(x)
    return (-(d.xx + d.x.square()) / 2).detach() + x.square().sum(-1) / 2


def walked(log_psi: nn.Module, x: Tensor, moves: int = 10, width: float = 1.5) -> Tensor:
    """The points after some Metropolis moves, which leave |psi|^2 as it is."""
    with torch.no_grad():
        old = log_psi(x)
        for _ in range(moves):
            proposed = x + width * torch.randn_like(x)
            new = log_psi(proposed)
            taken = torch.rand_like(new).log() < 2 * (new - old)
            x, old = torch.where(taken[:, None], proposed, x), torch.where(taken, new, old)
    return x


def main() -> None:
    options = arguments(__doc__, 200, "ground_state.png")
    log_psi = LogPsi()
    x = walked(log_psi, torch.randn(512, 1, dtype=torch.float64), moves=100)
    optimizer = NaturalGradient(log_psi.parameters(), lr=0.1, damping=1e-4, momentum=0.5, max_norm=0.5)
    energies: list[Tensor] = []
    for _ in range(options.steps):
        x = walked(log_psi, x)
        e = local_energy(log_psi, x)
        energies.append(e.mean())
        optimizer.step(lambda x=x, e=e: (log_derivatives(log_psi, x), e))
    last = local_energy(log_psi, torch.cat([walked(log_psi, x, moves=50) for _ in range(8)]))
    error = last.std() / len(last) ** 0.5
    print(f"energy {last.mean():.5f} +- {error:.5f} (exact: 0.5), variance of the local energy {last.var():.1e}")
    draw(options.picture, energies, log_psi)


def draw(path: str, energies: list[Tensor], log_psi: nn.Module) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.semilogy([abs(float(energy) - 0.5) for energy in energies])
    left.set(xlabel="step", title="|energy - 0.5|")
    x = torch.linspace(-4, 4, 200, dtype=torch.float64)[:, None]
    psi = (log_psi(x) - log_psi(torch.zeros_like(x[:1]))).exp().detach()
    right.plot(x, psi, label="exp(log psi)")
    right.plot(x, torch.exp(-x.square() / 2), "--", label="exact")
    right.set(xlabel="x", title="the wave, 1 at x = 0")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
