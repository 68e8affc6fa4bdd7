"""What to sample: rows (unit, strength, seed)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True, order=True)
class Row:
    """One sample's name. unit: index into the run's units."""

    unit: int
    strength: float
    seed: int


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Sorted, unique, as floats; numpy's numbers are numbers.

    Raises ValueError for an empty list, NaN, infinity or a negative strength.
    """
    if not isinstance(strengths, (list, tuple)) or not strengths:
        raise ValueError(f"strengths: expected a non-empty list of numbers >= 0, found {strengths!r}")
    out = []
    for s in strengths:
        if isinstance(s, bool) or not isinstance(s, Real) or not math.isfinite(s) or s < 0:
            raise ValueError(
                f"strengths: every strength is a finite number >= 0, found {s!r} in {list(strengths)}"
            )
        out.append(float(s) + 0.0)  # -0.0 and 0.0 are one strength
    return sorted(set(out))


def plan(units: int, strengths: Sequence[float], n: int, seed: int = 0) -> list[Row]:
    """Every (unit, strength, seed) for seeds seed..seed+n-1; unguided rows first, then unit by unit, strength by
    strength, seed by seed.

    Strength 0 leads, so that unguided rows share batches that need no graph. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: expected at least one sample for each unit and strength")
    levels = check_strengths(strengths)
    free = [Row(u, 0.0, seed + i) for u in range(units) for i in range(n) if 0.0 in levels]
    guided = [Row(u, s, seed + i) for u in range(units) for s in levels if s > 0 for i in range(n)]
    return free + guided
