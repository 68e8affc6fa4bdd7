"""The symmetric part of a denoiser's Jacobian: what a covariance leaves of a network's.

Of an exact denoiser J = dx0_hat/dx_t = (alpha_t / sigma_t^2) Cov(x_0 | x_t) is symmetric. A network's is so only roughly
(cosine of J^T h and J h on the bundled prior: 0.9 to 0.98, tests/test_symmetric.py), and what is antisymmetric in it, A, is
taken for error: <h, A h> = 0, so that to first order it costs nats and moves nothing at this step. J^T h is what a
vector-Jacobian product gives; J h is the change of x0_hat along h, here by a central difference, so that it takes two
forwards without a graph and asks nothing of the network (no second derivative, no forward mode).
"""

import torch
from torch import Tensor

from tiltlens.denoiser import Denoiser

# Of x_t, in root mean square: far below it bfloat16's rounding tells, far above it the network's curvature.
PART = 0.1


@torch.no_grad()
def jacobian_product(denoiser: Denoiser, x_t: Tensor, h: Tensor, t: int) -> Tensor:
    """J h (B, *shape), with J = dx0_hat/dx_t at x_t (B, *shape) and index t, for h (B, *shape); zero where h is. Two forwards;
    row i depends on row i alone."""
    h = h.to(x_t)
    scale = (PART * _size(x_t) / _size(h)).nan_to_num(1.0, 1.0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, *[1] * (h.ndim - 1))
    return (denoiser(x_t + scale * h, t) - denoiser(x_t - scale * h, t)) / (2 * scale)


def _size(v: Tensor) -> Tensor:
    """(B,)"""
    return v.flatten(1).square().mean(1).sqrt()
