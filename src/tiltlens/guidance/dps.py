"""Plain diffusion posterior sampling."""

from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.guidance import Guidance, Step, unchanged


class DPS(Guidance):
    """psi_t = exp(-s E(a(x0_hat))): the posterior of x_0 taken as a point.

    Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2023, without its normalisation by
    the residual's norm, which leaves the tilted family. It over-tilts: a(x0_hat) is trusted at every noise level alike.
    """

    def cotangent(self, clean: Tensor, step: Step, rows: RowConstraint, memory: Any):
        u = rows.argument(rows.read(rows.decode(clean), step.log_snr))
        log_psi = rows.log_tilt(u, 0.0)
        (h,) = torch.autograd.grad(log_psi.sum(), clean)
        return h, memory, unchanged(log_psi)
