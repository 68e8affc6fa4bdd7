"""What sampling recorded at one strength: the input of every estimator.

A guided chain draws paths from Q, the prior's chain from P; z are the standard normals of its steps and delta
the shift of each mean. Per sample the chain records

    path_kl = sum_t |delta|^2 / (2 v^2),   M = sum_t delta.z / v,   log w = -s E(x_0) + log dP/dQ = -s E - M -
    path_kl

so that E_Q[w] = Z(s), E_Q[M] = 0 and, with u = 0, 1, ..: E_Q[exp(-u E) dP/dQ] = Z(u) for *any* other strength
u. Where the chain is deterministic (eta = 0) P and Q have no density and log_w, path_kl are None.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Finite samples of one unit at one strength.

    strength: s >= 0; energy (n,): E of the final sample; log_w, path_kl (n,) in nats, or None; cluster (n,)
    int: the seed. Samples of equal cluster share their noise, whatever the strength; clusters below zero are
    the pilot's. Strength 0 is the prior itself: log_w = path_kl = 0. Raises ValueError for a negative
    strength, a wrong shape or values that are not finite.
    """

    strength: float
    energy: np.ndarray
    log_w: np.ndarray | None
    path_kl: np.ndarray | None
    cluster: np.ndarray

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"a strength is a Lagrange multiplier: expected s >= 0, found {self.strength}")
        if self.strength == 0:
            object.__setattr__(self, "log_w", np.zeros(len(self.energy)))
            object.__setattr__(self, "path_kl", np.zeros(len(self.energy)))
        for name in ("energy", "log_w", "path_kl"):
            value = getattr(self, name)
            if value is None:
                continue
            value = np.asarray(value, np.float64)
            object.__setattr__(self, name, value)
            if value.shape != np.shape(self.cluster) or not np.isfinite(value).all():
                raise ValueError(
                    f"strength {self.strength}: expected {len(self.cluster)} finite values "
                    f"of {name}, found shape {value.shape}, {np.isfinite(value).sum()} finite; "
                    "drop the rows that are not"
                )

    def __len__(self) -> int:
        return len(self.energy)

    @property
    def martingale(self) -> np.ndarray | None:
        """M = sum_t delta.z/v (n,), of mean zero under Q; None without path weights."""
        if self.log_w is None or self.path_kl is None:
            return None
        return -(self.log_w + self.strength * self.energy) - self.path_kl
