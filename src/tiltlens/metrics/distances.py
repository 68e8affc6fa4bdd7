"""Two distances between the laws of two samples of features, X and Y, n rows of d numbers each.

Kernel distance, the squared maximum mean discrepancy with k(x, y) = (x.y/d + 1)^3 (Binkowski et al., Demystifying
MMD GANs, 2018, there on Inception's features, "KID"), unbiased:

    KID = 1/(n(n-1)) sum_{i != j} [k(x_i, x_j) + k(y_i, y_j)] - 2/n^2 sum_{i, j} k(x_i, y_j)

Frechet distance of the Gaussians with the samples' means and covariances (Heusel et al., 2017, there "FID"); its
bias of order d/n is positive and does not go away by averaging: it means something next to a floor of the same n.

    |m_X - m_Y|^2 + tr(S_X + S_Y - 2 (S_X S_Y)^(1/2))
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel

ROWS = 1024  # of the kernel matrix at once: n^2 numbers would fill the memory for large n


class Estimate(NamedTuple):
    """A number and its standard error over the images."""

    value: float
    se: float


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """KID of features x, y (n, d), as torchmetrics' KernelInceptionDistance with one subset of all n rows.

    The standard error is that of a U-statistic with h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i),

        var = 4 (n-2)/(n(n-1)) var_i E_j h_ij + 2/(n(n-1)) var h_ij,

    whose first term vanishes where both laws are one (Sutherland et al., Generative Models and Model Criticism via
    Optimized Maximum Mean Discrepancy, 2017). Raises ValueError for fewer than 3 rows or two different shapes.
    """
    x, y = _pair(x, y)
    n = len(x)
    total, cross, squares, means = 0.0, 0.0, 0.0, []
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        within = poly_kernel(x[rows], x) + poly_kernel(y[rows], y)
        between = poly_kernel(x[rows], y)
        h = within - between - poly_kernel(y[rows], x)
        own = torch.arange(len(h))
        within[own, start + own] = 0
        h[own, start + own] = 0
        total, cross = total + within.sum(), cross + between.sum()
        squares, means = squares + h.square().sum(), [*means, h.sum(1) / (n - 1)]
    value = total / (n * (n - 1)) - 2 * cross / n**2
    mean = torch.cat(means)
    spread = squares / (n * (n - 1)) - mean.mean() ** 2
    # the variance of a row's mean over n - 1 others holds a share of the spread within the row
    between_rows = ((mean.var() - spread / (n - 1)) * (n - 1) / (n - 2)).clamp(min=0)
    variance = 4 * (n - 2) / (n * (n - 1)) * between_rows + 2 / (n * (n - 1)) * spread
    return Estimate(float(value), float(variance.clamp(min=0).sqrt()))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of features x, y (n, d), by torchmetrics. Raises ValueError as `kernel_distance`."""
    x, y = _pair(x, y)
    # Every rank has all rows already: summed over ranks they would count as so many more.
    metric = FrechetInceptionDistance(feature=_Given(x.shape[1]), sync_on_compute=False).set_dtype(
        torch.float64
    )
    metric.update(x, real=True)
    metric.update(y, real=False)
    return float(metric.compute())


class _Given(nn.Identity):
    """What torchmetrics takes for a network: its images are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 2 or len(x) < 3:
        raise ValueError(
            f"expected two samples of features of one shape (n, d) with n >= 3, found {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    return x.double(), y.double()
