"""The natural activations of a unit: what zero and one standard deviation mean.

A simple unit's activation a is the encoder's number. A combination is a function of its members' *standardised*
activations, so the members' own natural mean and standard deviation come first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.units.unit import Unit


@dataclass(frozen=True)
class Natural:
    """Natural reference of one unit.

    member_mean, member_std: (k,) of the members, (0, 1) for a simple unit, whose activation stays raw. mean, std:
    of the activation. activations: (P,) sorted, empty if there is no reference (an uncalibrated, raw unit).
    """

    member_mean: Tensor
    member_std: Tensor
    mean: float
    std: float
    activations: Tensor

    @classmethod
    def identity(cls, unit: Unit) -> "Natural":
        """No reference: activation and z are both the raw number."""
        return cls(torch.zeros(unit.size), torch.ones(unit.size), 0.0, 1.0, torch.empty(0))

    @classmethod
    def from_members(cls, unit: Unit, members: Tensor) -> "Natural":
        """From raw member activations (P, k) on natural images.

        Raises ValueError where the unit does not vary (a dead unit has no standard deviation to measure by).
        """
        members = members.double().cpu()
        members = members[torch.isfinite(members).all(1)]
        if len(members) < 2:
            raise ValueError(
                f"unit {unit.name}: fewer than two finite natural activations; nothing to calibrate on"
            )
        mean, std = torch.zeros(unit.size, dtype=torch.float64), torch.ones(unit.size, dtype=torch.float64)
        if unit.size > 1:
            mean, std = members.mean(0), members.std(0)
            _check_alive(unit, std)
        a = unit.combine((members - mean) / std)
        _check_alive(unit, a.std())
        return cls(mean, std, float(a.mean()), float(a.std()), a.sort().values)

    @property
    def mean_se(self) -> float | None:
        """Standard error of mean, std / sqrt(P); None without a reference."""
        return self.std / math.sqrt(len(self.activations)) if len(self.activations) else None

    @property
    def std_se(self) -> float | None:
        """Standard error of std, std sqrt((kurtosis - 1) / (4 P)), kurtosis = E[(a - mean)^4] / std^4; None without a
        reference."""
        if not len(self.activations):
            return None
        kurtosis = float(((self.activations - self.mean) / self.std).pow(4).mean())
        return self.std * math.sqrt(max(kurtosis - 1, 0.0) / (4 * len(self.activations)))

    def quantile(self, q: float) -> float:
        """The q-quantile of the natural activation. Beyond 1 - 1/P of the reference it is read off a Gaussian tail
        fitted to mean and standard deviation when that lies further out than the largest reference value."""
        if not len(self.activations):
            raise ValueError(
                "a quantile level needs natural activations; this run has no calibration (pilot = 0)"
            )
        value = float(torch.quantile(self.activations, q))
        if not self.beyond(q):
            return value
        tail = self.mean + self.std * float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
        return max(value, tail) if q > 0.5 else min(value, tail)

    def beyond(self, q: float) -> bool:
        """Whether the q-quantile lies beyond what this many activations can tell."""
        edge = 1 / max(len(self.activations), 1)
        return not edge <= q <= 1 - edge


def _check_alive(unit: Unit, std: Tensor) -> None:
    if not bool((std > 1e-8).all()):
        raise ValueError(
            f"unit {unit.name} is dead on the natural reference: its activation has standard deviation "
            f"{float(std.min()):.2g}. Choose another unit, or a larger pilot."
        )
