"""Loss-guided diffusion: a Monte-Carlo twist."""

import math
from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.guidance import Guidance, Step, clean_spread, unchanged


class LGD(Guidance):
    """psi_t = mean_k exp(-s E(a(x0_hat + r_t xi_k))), xi_k ~ N(0, I) from each row's own twist stream.

    Song et al., Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation, 2023; r_t is the posterior
    standard deviation of data of standard deviation `sigma_data`. samples: K, each one pass of the encoder.
    """

    def __init__(self, samples: int = 4, sigma_data: float = 0.5, profile: Any = None):
        super().__init__(profile)
        if samples < 1 or not sigma_data > 0:
            raise ValueError(f"LGD needs samples >= 1 and sigma_data > 0, found {samples} and {sigma_data}")
        self.samples, self.sigma_data = samples, sigma_data

    def cotangent(self, clean: Tensor, step: Step, rows: RowConstraint, memory: Any):
        noise = step.twist_noise(self.samples).transpose(0, 1)  # (K, B, *shape)
        around = clean[None] + clean_spread(step, self.sigma_data) * noise.to(clean)
        a = rows.read(rows.decode(around.flatten(0, 1)), step.log_snr)
        u = rows.argument(a).reshape(self.samples, -1)
        log_psi = rows.log_tilt(u, 0.0).logsumexp(0) - math.log(self.samples)
        (h,) = torch.autograd.grad(log_psi.sum(), clean)
        return h, memory, unchanged(log_psi)
