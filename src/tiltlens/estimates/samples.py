"""What sampling recorded at one strength: the input of every estimator.

A guided chain draws paths from Q, the prior's chain from P; z are the standard normals of its steps and delta
the shift of each mean. Per sample the chain records

    path_kl = sum_t |delta|^2 / (2 v^2),   M = sum_t delta.z / v,   log w = -s E(x_0) + log dP/dQ = -s E - M -
    path_kl

so that E_Q[w] = Z(s), E_Q[M] = 0 and, with u = 0, 1, ..: E_Q[exp(-u E) dP/dQ] = Z(u) for *any* other strength
u. Where the chain is deterministic (eta = 0) P and Q have no density and log_w, path_kl are None.

*Particles.* The G particles of a group interact: the group, not the row, is what is independent. Its normaliser Zhat_g
is an unbiased estimate of Z, W_i are its weights (of sum 1), and a row records

    log w = log Zhat_g + log(G W_i),   path_kl = -s E_i - log Zhat_g

so that the mean of w f over a group is unbiased for Z E_{q_s}[f] as before, also at other strengths u. Means of what
was *sampled* are weighted by G W_i: they describe q^, the law of one particle drawn by its weight. E[path_kl] bounds
KL(q^||p) from above, since KL(q^||q_s) <= log Z - E[log Zhat]. There is no M: resampling has no z.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROUNDING = 1e-6  # of E[path_kl]: a variance of M below is that of sums in single precision


@dataclass(frozen=True)
class Samples:
    """Finite samples of one unit at one strength.

    strength: s >= 0; energy (n,): E of the final sample; log_w, path_kl (n,) in nats, or None; cluster (n,)
    int: the seed, or the group of particles. Samples of equal cluster share their noise, whatever the strength;
    clusters below zero are the pilot's. weight (n,): G W_i of a particle, None for independent samples. ancestor (n,): the
    seed in whose state a particle's path began, None where not recorded. Strength 0
    is the prior itself: log_w = path_kl = 0. Raises ValueError for a negative strength, a wrong shape or values that
    are not finite.
    """

    strength: float
    energy: np.ndarray
    log_w: np.ndarray | None
    path_kl: np.ndarray | None
    cluster: np.ndarray
    weight: np.ndarray | None = None
    ancestor: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"a strength is a Lagrange multiplier: expected s >= 0, found {self.strength}")
        if self.strength == 0:
            object.__setattr__(self, "log_w", np.zeros(len(self.energy)))
            object.__setattr__(self, "path_kl", np.zeros(len(self.energy)))
            object.__setattr__(self, "weight", None)
            object.__setattr__(self, "ancestor", None)
        for name in ("energy", "log_w", "path_kl", "weight", "ancestor"):
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

    @cached_property
    def martingale(self) -> np.ndarray | None:
        """M = sum_t delta.z/v (n,), of mean zero under Q; None without path weights or where M is rounding alone.

        var(M) = 2 E[path_kl] for steps of known noise. Samplers without them (annealing in noise space) record
        path_kl = -s E - log w, which leaves M = 0.
        """
        if self.log_w is None or self.path_kl is None or self.weight is not None or not len(self):
            return None
        m = -(self.log_w + self.strength * self.energy) - self.path_kl
        return m if m.var() > ROUNDING * abs(self.path_kl.mean()) else None

    @cached_property
    def groups(self) -> np.ndarray | None:
        """(n,) the number 0, 1, .. of each row's group of particles; None where rows are independent."""
        return None if self.weight is None else np.unique(self.cluster, return_inverse=True)[1]
