"""Soft constraints: activation -> energy.

The law of a unit is q_s(x) = p(x) exp(-s E(a(x))) / Z(s). E reads the *standardised* activation
z = (a - natural mean) / natural standard deviation unless `standardise` is False, and is zero force where the
constraint is met. Every energy also knows its Gaussian tilt

    log_tilt(m, V, s) = log E[exp(-s E(z))],   z ~ N(m, V),

the one formula behind the twists: V = 0 is DPS, V = J S J^T moment matching, the pilot's residual variance the
calibrated twist.
"""

import math
import re

import torch
from torch import Tensor

from tiltlens.units.calibration import Natural

FAR = 1e6
LEVEL_FORMS = 'a number (raw activation), "z=3" (natural standard deviations) or "q0.999" (natural quantile)'


def parse_level(level: float | str) -> tuple[str, float]:
    """('value' | 'z' | 'q', number). Raises ValueError for any other form, NaN, or a quantile outside (0, 1)."""
    kind, number = "value", level
    if isinstance(level, str):
        match = re.fullmatch(r"\s*(?:(z|value)\s*=\s*|(q|z)\s*=?\s*)?([-+0-9.eE]+)\s*", level)
        if match is None:
            raise ValueError(f"level {level!r} is not understood: expected {LEVEL_FORMS}")
        kind, number = match[1] or match[2] or "value", match[3]
    try:
        number = float(number)
    except (TypeError, ValueError):
        raise ValueError(f"level {level!r} is not understood: expected {LEVEL_FORMS}") from None
    if not math.isfinite(number) or (kind == "q" and not 0 < number < 1):
        raise ValueError(f"level {level!r}: expected a finite number, and for a quantile one inside (0, 1)")
    return kind, number


class Energy:
    """E(z): activations (B,) -> energies (B,).

    standardise: read z (the default) or the raw activation. level: where the constraint is met, resolved against
    the natural activations of each unit; None where the energy has none.
    """

    level: float | str | None = None

    def __init__(self, standardise: bool = True):
        self.standardise = standardise

    def resolve_level(self, natural: Natural) -> float:
        """The level in the units that E reads, for a unit with these natural activations."""
        if self.level is None:
            return 0.0
        kind, number = parse_level(self.level)
        if kind == "q":
            number = natural.quantile(number)
        elif kind == "z":
            number = natural.mean + number * natural.std
        return (number - natural.mean) / natural.std if self.standardise else number

    def note(self, natural: Natural) -> str | None:
        """What to know of the level for a unit with these natural activations: a quantile that they cannot tell."""
        kind, number = ("value", 0.0) if self.level is None else parse_level(self.level)
        if kind != "q" or not natural.beyond(number):
            return None
        enough = math.ceil(1 / min(number, 1 - number) - 1e-6)
        return (
            f"the level {self.level} takes {enough} natural activations, and there are {len(natural.activations)}: it is read off a "
            f"Gaussian tail, or is the outermost of them. Take model.pilot = {enough}, model.natural, or a level like z=3"
        )

    def __call__(self, z: Tensor, level: Tensor | float = 0.0) -> Tensor:
        """z (B,), level a number or (B,) -> E (B,)."""
        raise NotImplementedError

    def log_tilt(
        self, mean: Tensor, variance: Tensor | float, strength: Tensor, level: Tensor | float = 0.0
    ) -> Tensor:
        """log E[exp(-s E(z))] for z ~ N(mean, variance), all (B,). Closed form in every subclass."""
        raise NotImplementedError

    def describe(self) -> str:
        return type(self).__name__ + ("" if self.standardise else " of the raw activation")


class Linear(Energy):
    """More is better: E = -z. log tilt: s m + s^2 V / 2."""

    def __call__(self, z: Tensor, level: Tensor | float = 0.0) -> Tensor:
        return -z

    def log_tilt(
        self, mean: Tensor, variance: Tensor | float, strength: Tensor, level: Tensor | float = 0.0
    ) -> Tensor:
        return strength * mean + strength**2 * variance / 2


class Target(Energy):
    """Near a level: E = (z - level)^2 / (2 width^2).

    log tilt: with c = s / width^2, -(m - level)^2 c / (2 (1 + c V)) - log(1 + c V) / 2.
    """

    def __init__(self, level: float | str, width: float = 0.5, standardise: bool = True):
        super().__init__(standardise)
        parse_level(level)
        if not (math.isfinite(width) and width > 0):
            raise ValueError(f"Target: width must be a positive number, found {width}")
        self.level, self.width = level, width

    def __call__(self, z: Tensor, level: Tensor | float = 0.0) -> Tensor:
        return (z - level) ** 2 / (2 * self.width**2)

    def log_tilt(
        self, mean: Tensor, variance: Tensor | float, strength: Tensor, level: Tensor | float = 0.0
    ) -> Tensor:
        c = strength / self.width**2
        spread = 1 + c * variance
        return -((mean - level) ** 2) * c / (2 * spread) - _log(spread, mean) / 2

    def describe(self) -> str:
        return f"Target(level {self.level}, width {self.width:g})" + ("" if self.standardise else " raw")


class Threshold(Energy):
    """At least a level: E = max(0, level - z)^2 / 2, no force above the level.

    log tilt, with g = m - level: log[ Phi(g/sqrt V) + exp(-s g^2/(2(1 + sV))) / sqrt(1 + sV) Phi(-g/sqrt(V(1 + sV))) ].
    """

    def __init__(self, level: float | str, standardise: bool = True):
        super().__init__(standardise)
        parse_level(level)
        self.level = level

    def __call__(self, z: Tensor, level: Tensor | float = 0.0) -> Tensor:
        return torch.relu(level - z) ** 2 / 2

    def log_tilt(
        self, mean: Tensor, variance: Tensor | float, strength: Tensor, level: Tensor | float = 0.0
    ) -> Tensor:
        variance = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device).clamp_min(1e-12)
        spread = 1 + strength * variance
        gap = mean - level
        # beyond FAR deviations a slope of log Phi overflows, and 0 times it would be NaN
        above = torch.special.log_ndtr((gap / variance.sqrt()).clamp(-FAR, FAR))
        below = torch.special.log_ndtr((-gap / (variance * spread).sqrt()).clamp(-FAR, FAR))
        return torch.logaddexp(above, below - strength * gap**2 / (2 * spread) - spread.log() / 2)

    def describe(self) -> str:
        return f"Threshold(level {self.level})" + ("" if self.standardise else " raw")


def _log(x: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=like.dtype, device=like.device).log()
