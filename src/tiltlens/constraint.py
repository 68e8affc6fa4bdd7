"""The soft constraint on a batch: images -> activation -> z -> energy, row by row.

Rows of different units and strengths share a batch: every number that belongs to a unit is a table, indexed by the
row's unit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltlens.energies import Energy
from tiltlens.units.bank import UnitBank
from tiltlens.units.calibration import Natural


class Constraint:
    """E(a(x)) for several units at once.

    bank: reads the units. energy: shared by all. naturals: one a unit. decode: chain state -> what the encoder sees.
    """

    def __init__(
        self, bank: UnitBank, energy: Energy, naturals: Sequence[Natural], decode: Callable[[Tensor], Tensor]
    ):
        self.bank, self.energy, self.decode = bank, energy, decode
        self.naturals = list(naturals)
        width = max(n.member_mean.numel() for n in naturals)
        self.member_mean = torch.zeros(len(naturals), width, dtype=torch.float64)
        self.member_std = torch.ones(len(naturals), width, dtype=torch.float64)
        for i, n in enumerate(naturals):
            self.member_mean[i, : n.member_mean.numel()] = n.member_mean
            self.member_std[i, : n.member_std.numel()] = n.member_std
        self.mean = torch.tensor([n.mean for n in naturals], dtype=torch.float64)
        self.std = torch.tensor([n.std for n in naturals], dtype=torch.float64)
        self.level = torch.tensor([energy.resolve_level(n) for n in naturals], dtype=torch.float64)

    def natural_arguments(self) -> list[Tensor]:
        """What the energy reads on natural images, unit by unit: (P,) sorted, empty where there is no reference."""
        standardise = self.energy.standardise
        return [(n.activations - n.mean) / n.std if standardise else n.activations for n in self.naturals]

    def rows(self, which: Tensor, strength: Tensor) -> "RowConstraint":
        """which (B,) unit indices, strength (B,) >= 0."""
        return RowConstraint(self, which, strength)


class RowConstraint:
    """The constraint of each row of one batch. strength, level: (B,)."""

    def __init__(self, constraint: Constraint, which: Tensor, strength: Tensor):
        self._all = constraint
        self.which, self.strength = which, strength
        pick = lambda table: table[which.cpu()].to(strength)  # noqa: E731
        self.level = pick(constraint.level)
        self._mean, self._std = pick(constraint.mean), pick(constraint.std)
        self._member_mean, self._member_std = pick(constraint.member_mean), pick(constraint.member_std)
        self.energy = constraint.energy

    def decode(self, x_0: Tensor) -> Tensor:
        return self._all.decode(x_0)

    def read(self, images: Tensor, log_snr: float | None = None) -> Tensor:
        """Images (B, 3, H, W), or (V B, 3, H, W) for V views of every row, view after view -> activation a, (V B,).
        log_snr: of clean estimates, which a noise-aware twin reads where there is one; None for samples."""
        views = len(images) // len(self.which)
        which = self.which.repeat(views)
        members = self._all.bank.read(images, which, log_snr).to(self.strength.dtype)
        mean, std = self._member_mean.repeat(views, 1), self._member_std.repeat(views, 1)
        return self._all.bank.combine((members - mean) / std, which)

    def standardise(self, a: Tensor) -> Tensor:
        """a (V B,) -> z = (a - natural mean) / natural standard deviation, whatever the energy reads."""
        views = len(a) // len(self.which)
        return (a - self._mean.repeat(views)) / self._std.repeat(views)

    def argument(self, a: Tensor) -> Tensor:
        """What the energy reads: z, or a itself for a raw energy."""
        return self.standardise(a) if self.energy.standardise else a

    def energy_of(self, a: Tensor) -> Tensor:
        """Activation a (B,) -> E (B,)."""
        return self.energy(self.argument(a), self.level)

    def log_tilt(self, mean: Tensor, variance: Tensor | float) -> Tensor:
        """log E[exp(-s E)] of each row for an argument ~ N(mean, variance): (B,), or (M, B) of M Gaussians a row."""
        return self.energy.log_tilt(mean, variance, self.strength, self.level)
