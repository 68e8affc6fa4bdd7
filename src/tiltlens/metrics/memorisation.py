"""Does a prior hand out its training images?

A sample's distance to its nearest training image says nothing alone; held-out images are the measure: they come from
the same law and were never seen. With D the distance of a sample and D' that of a held-out image,

    nearer = P(D < D') + P(D = D')/2,     copied = P(D < the 1 % quantile of D')

(the first is the Mann-Whitney statistic of Meehan et al., A Non-Parametric Test to Detect Data-Copying in Generative
Models, 2020). A prior that generalises and draws as sharply as nature has nearer = 1/2 and copied = 0.01; copies drive
both to 1. A blurred or odd sample is far from everything: nearer < 1/2 is no proof of innocence for the few that copied
counts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tiltlens.metrics.distances import Estimate

QUANTILE = 0.01
ROWS = 256


class Memorisation(NamedTuple):
    """nearer and copied as above. sample, held_out: median distances to the nearest training image."""

    nearer: Estimate
    copied: Estimate
    sample: float
    held_out: float


def nearest_distance(x: Tensor, train: Tensor) -> Tensor:
    """Euclidean distance (N,) of each row of x (N, d) to the nearest row of train (M, d)."""
    centre = train.mean(0)
    x, train = x - centre, train - centre
    squares, nearest = train.square().sum(1), []
    for part in x.split(ROWS):
        which = (squares - 2 * part @ train.T).argmin(1)
        # by differences: |a|^2 - 2 a.b + |b|^2 would not give the zero distance of a copy
        nearest.append((part - train[which]).norm(dim=1))
    return torch.cat(nearest)


def memorisation(samples: Tensor, held_out: Tensor, train: Tensor) -> Memorisation:
    """Of features (N, d), (M, d), (K, d). Standard errors over samples and held-out images.

    Raises ValueError for fewer than 2 rows on either side.
    """
    if min(len(samples), len(held_out)) < 2 or not len(train):
        raise ValueError(
            "memorisation: expected at least 2 samples, 2 held-out images and a training image, found "
            f"{len(samples)}, {len(held_out)} and {len(train)}"
        )
    d, natural = (nearest_distance(x, train).double() for x in (samples, held_out))
    wins = (d[:, None] < natural).double() + (d[:, None] == natural).double() / 2
    # DeLong's variance of the Mann-Whitney statistic: that of either side's own mean
    variance = wins.mean(1).var() / len(d) + wins.mean(0).var() / len(natural)
    copied = (d < natural.quantile(QUANTILE)).double()
    # the quantile is estimated too, with the relative error of the count below it
    share, below = copied.mean(), max(QUANTILE * len(natural), 1.0)
    se = (share * (1 - share) / len(d) + (QUANTILE**2) / below).sqrt()
    return Memorisation(
        Estimate(float(wins.mean()), float(variance.sqrt())),
        Estimate(float(share), float(se)),
        float(d.median()),
        float(natural.median()),
    )
