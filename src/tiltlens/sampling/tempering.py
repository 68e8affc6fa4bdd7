"""Tempering of a twist: exponents beta_t, fixed before the run, that keep one step from spending all the weights.

A twist that is too sure of itself at high noise leaves a few particles with all the weight. psi_t^beta_t is as valid a
twist, and Z stays unbiased as long as beta_t knows nothing of the run that it serves: it is found on a pilot group with
noise of its own. There beta_t is the largest number in [0, 1] at which the conditional effective sample size of the step
(Zhou, Johansen and Aston, Toward Automatic Model Comparison, 2016),

    CESS = (sum W w)^2 / sum W w^2,    W the weights before the step, w what the step multiplies them by,

is at least `target` of the particles; where none is, the one that comes nearest.
It tempers the twist alone: a guidance that pushes too far is not cured by it.
"""

import torch
from torch import Tensor

GRID = 32
HALVINGS = 12


def conditional_ess(log_w: Tensor, log_step: Tensor) -> Tensor:
    """CESS as a fraction in [0, 1]: log_w (G,), -inf for weight 0; log_step (..., G)."""
    seen = torch.isfinite(log_w) & torch.isfinite(log_step)
    w = log_w.softmax(-1)
    step = torch.where(seen, log_step, -torch.inf)
    step = (step - step.amax(-1, keepdim=True)).exp()
    step = torch.where(seen, step, 0.0)  # all of them -inf: no particle is left
    return (w * step).sum(-1) ** 2 / (w * step**2).sum(-1).clamp_min(1e-300)


def exponent(log_w: Tensor, rest: Tensor, log_psi: Tensor, target: float) -> float:
    """The largest beta in [0, 1] at which a step that multiplies the weights by exp(rest + beta log_psi) keeps a CESS of
    `target`; all (G,)."""

    def keeps(beta: Tensor) -> Tensor:
        return conditional_ess(log_w, rest + beta[..., None] * log_psi)

    grid = torch.linspace(0, 1, GRID + 1, dtype=log_w.dtype, device=log_w.device)
    kept = keeps(grid)
    good = (kept >= target).nonzero()[:, 0]
    if not len(good):
        return float(grid[kept.argmax()])
    low, high = float(grid[good[-1]]), min(float(grid[good[-1]]) + 1 / GRID, 1.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(keeps(grid.new_tensor(middle))) >= target else (low, middle)
    return high if high == 1.0 and float(keeps(grid.new_tensor(1.0))) >= target else low
