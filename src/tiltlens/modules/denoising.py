"""The loss that trains a denoiser, one formula for every parametrisation.

With x_t = alpha_t x_0 + sigma_t eps and x0_hat = skip_t x_t + out_t F(in_t x_t, time_t) (see `tiltlens.denoiser`),
the network's target is linear in what was drawn, and its error is that of the clean estimate, scaled:

    F* = (x_0 - skip_t x_t) / out_t = ((1 - skip_t alpha_t) x_0 - skip_t sigma_t eps) / out_t
    |x0_hat - x_0|^2 = out_t^2 |F - F*|^2

(eps, v = alpha_t eps - sigma_t x_0, x_0 or eps - x_0, as the prior has it). With SNR = alpha_t^2 / sigma_t^2 the loss is

    L = E[ w_t |F - F*|^2 ],   w_t = min(SNR, gamma) out_t^2,   or w_t = 1 where gamma is None

(min-SNR-gamma: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023), for eps
w = min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1), for x_0 min(SNR, gamma). For a flow, plain
flow matching is gamma = None.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiltlens.errors import UserError
from tiltlens.priors.families import Family

Network = Callable[[Tensor, Tensor], Tensor]
LOG_SNR_EDGES = (-4.0, -2.0, 0.0, 2.0, 4.0)


class Errors(NamedTuple):
    """Of one noised batch, each (B,): the weighted loss, the mean squared error of x0_hat, log-SNR."""

    loss: Tensor
    clean: Tensor
    log_snr: Tensor


class DenoisingLoss(nn.Module):
    """L of the module's docstring for a family. gamma: of min-SNR; None for equal weights. No weights of its own.

    Raises UserError for a gamma that is not above 0.
    """

    ROWS = ("alpha", "sigma", "scale_in", "time", "of_clean", "of_noise", "out2", "weight", "log_snr")

    def __init__(self, family: Family, gamma: float | None = 5.0):
        super().__init__()
        if gamma is not None and not gamma > 0:
            raise UserError(f"model.gamma = {gamma}: expected a number above 0, or null for equal weights")
        schedule, table = family.schedule, family.tables
        alpha, sigma, skip, out = schedule.alpha, schedule.sigma, table["skip"], table["out"]
        weight = (
            torch.ones_like(alpha) if gamma is None else (alpha / sigma).square().clamp(max=gamma) * out**2
        )
        # In float64 first: 1 - skip alpha is a difference of near numbers.
        rows = (
            alpha, sigma, table["scale_in"], schedule.time, (1 - skip * alpha) / out, -skip * sigma / out, out**2,
            weight, schedule.log_snr,
        )  # fmt: skip
        self.register_buffer("table", torch.stack(rows).float(), persistent=False)

    def __len__(self) -> int:
        return self.table.shape[1]

    def forward(
        self,
        network: Network,
        x_0: Tensor,
        t: Tensor,
        generator: torch.Generator,
        teacher: Network | None = None,
    ) -> Errors:
        """network: F(x (B, ...), time (B,)). x_0 (B, ...), t (B,) indices of the training table, cleanest first. teacher: whose F
        takes the place of F* in the loss; the error of x0_hat is against x_0 all the same."""
        eps = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0)
        at = dict(zip(self.ROWS, self.table[:, t.to(self.table.device)]))
        wide = {k: v.view(-1, *(1,) * (x_0.ndim - 1)) for k, v in at.items()}
        x_t = wide["alpha"] * x_0 + wide["sigma"] * eps
        target = wide["of_clean"] * x_0 + wide["of_noise"] * eps
        f = network(wide["scale_in"] * x_t, at["time"]).float()
        error = loss = (f - target).square().flatten(1).mean(1)
        if teacher:
            loss = (f - teacher(wide["scale_in"] * x_t, at["time"])).square().flatten(1).mean(1)
        return Errors(at["weight"] * loss, at["out2"] * error, at["log_snr"])


def by_noise(clean: Tensor, log_snr: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Mean of clean (B,) and number of rows, by the bins of log-SNR that hold any."""
    which = torch.bucketize(log_snr, torch.tensor(LOG_SNR_EDGES, device=log_snr.device))
    rows = {name: clean[which == k] for k, name in enumerate(bin_names())}
    return {name: (x.mean(), x.numel()) for name, x in rows.items() if x.numel()}


def bin_names() -> list[str]:
    """Names of the bins of log-SNR, noisiest first: below -4, -4..-2, ..., above 4."""
    inner = [f"{a:g}..{b:g}" for a, b in pairwise(LOG_SNR_EDGES)]
    return [f"below{LOG_SNR_EDGES[0]:g}", *inner, f"above{LOG_SNR_EDGES[-1]:g}"]
