"""Particles as rows: one container for all that a particle has, their weights, and who survives."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlens.guidance.guidance import Guided
from tiltlens.sampling.chain import State


@dataclass(frozen=True)
class Cloud:
    """All that belongs to a particle, row by row; what `index` does not move is a fault.

    state, guided: of the chain. level (B,) float64: log dP/dQ + log psi at the last step that guided the row; base: the
    level at its last resampling. root (B,): the row in which its path began.
    """

    state: State
    guided: Guided | None
    level: Tensor
    base: Tensor
    root: Tensor

    def weighed(self, beta: Tensor | float = 1.0) -> "Cloud":
        """The level log dP/dQ + beta log psi where this step took the twist of a row; as it was elsewhere."""
        guided = self.guided
        if guided.log_psi is None:
            return self
        level = self.state.log_dpdq + beta * guided.log_psi
        if guided.reads is not None:
            level = torch.where(guided.reads, level, self.level)
        return dataclasses.replace(self, level=level)

    def index(self, rows: Tensor) -> "Cloud":
        """Row i becomes row rows[i], with everything that belongs to it."""
        return _taken(self, rows)

    def log_w(self, size: int) -> Tensor:
        """(groups, size): since the last resampling. A particle that is not finite has weight 0."""
        log_w = self.level - self.base
        return torch.where(torch.isfinite(log_w), log_w, -math.inf).reshape(-1, size)


def _taken(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if dataclasses.is_dataclass(value):
        parts = {f.name: _taken(getattr(value, f.name), rows) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    if isinstance(value, dict):
        return {k: _taken(v, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_taken(v, rows) for v in value])
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a memory of guidance that particles cannot re-index: expected tensors (B, ...) in dataclasses, dicts, lists or "
        f"tuples, found {type(value).__name__}"
    )


@dataclass(frozen=True)
class Weights:
    """Of groups (K, G). log_mean (K,): log of the mean weight. w (K, G): normalised, all 0 in a group with no finite
    particle. ess (K,): 1/sum w^2, 0 in such a group."""

    log_mean: Tensor
    w: Tensor
    ess: Tensor

    @classmethod
    def of(cls, log_w: Tensor) -> "Weights":
        """log_w (K, G), -inf for weight 0. Sums run along the group in order (cumsum): they do not depend on K."""
        top = log_w.amax(1)
        alive = torch.isfinite(top)
        w = (log_w - torch.where(alive, top, 0.0)[:, None]).exp()
        total = w.cumsum(1)[:, -1]
        ess = total.square() / w.square().cumsum(1)[:, -1]
        log_mean = top + (total / log_w.shape[1]).log()
        return cls(
            torch.where(alive, log_mean, -math.inf),
            torch.where(alive[:, None], w / total[:, None], 0.0),
            torch.where(alive, ess, 0.0),
        )


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """Ancestors (K, G) int64 by systematic resampling: w (K, G) normalised weights, u (K,) one uniform a group.

    Particle i stands floor(G w_i) or one time more, G w_i times on average. Ancestors come in order.
    """
    size = w.shape[1]
    total = w.cumsum(1)
    at = (u[:, None] + torch.arange(size, dtype=w.dtype, device=w.device)) / size
    at = at.clamp_max(1 - 2**-53)  # rounding may not step over the end
    return torch.searchsorted(total / total[:, -1:], at, right=True)
