"""The exact twist of the analytic prior."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.denoiser import Denoiser
from tiltlens.guidance.guidance import Guidance, PilotTables, Step
from tiltlens.priors.mixture import GaussianMixture
from tiltlens.units import Projection


class Exact(Guidance):
    """psi_t = E_p[exp(-s E(<w, x_0>)) | x_t] in closed form: the optimum that every other method is held against.

    Works for `GaussianMixture` priors and `Projection` units alone; anything else is a ValueError.
    """

    def check_target(self, prior: Any, units: Sequence[Any], energy: Any, strengths: Sequence[float]) -> None:
        if not isinstance(prior, GaussianMixture) or not all(isinstance(u, Projection) for u in units):
            raise ValueError(
                "Exact guidance needs the analytic prior (GaussianMixture) and Projection units; found "
                f"{type(prior).__name__} and {', '.join(sorted({type(u).__name__ for u in units}))}. Use Calibrated."
            )

    def prepare(self, pilot: PilotTables | None, prior: Any, constraint: Any) -> None:
        units = constraint.bank.units
        self.check_target(prior, units, constraint.energy, ())
        self._prior = prior
        self._directions = torch.tensor([list(u.direction) for u in units], dtype=torch.float64)
        self._mean, self._std = constraint.mean, constraint.std

    def twist(self, denoiser: Denoiser, x_t: Tensor, step: Step, rows: RowConstraint, memory: Any):
        which = rows.which.cpu()
        direction, level = self._directions[which].to(x_t), rows.level
        if (
            rows.energy.standardise
        ):  # E reads (<w, x> - mean)/std: a Projection scaled by 1/std, its level shifted
            std, mean = self._std[which].to(x_t), self._mean[which].to(x_t)
            direction, level = direction / std[:, None], level + mean / std
        leaf = x_t.detach().clone().requires_grad_()
        posterior = denoiser.posterior(leaf, step.t)
        log_psi = self._prior.log_psi(posterior, direction, rows.energy, rows.strength, level)
        (g,) = torch.autograd.grad(log_psi.sum(), leaf)
        x0_hat = denoiser.corrected(leaf, step.t, posterior)
        return x0_hat.clamp(-1, 1) if step.clip else x0_hat, g, log_psi, memory
