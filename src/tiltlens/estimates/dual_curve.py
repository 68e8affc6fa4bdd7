"""What the dual is solved on: the value that is constrained, as a smooth function of the strength, and its trust."""

import numpy as np

from tiltlens.estimates import mbar
from tiltlens.estimates.bootstrap import replicate
from tiltlens.estimates.bounds import log_z_floor
from tiltlens.estimates.importance import KL_ROOT, level, relative_variance, tilt
from tiltlens.estimates.pool import Pool
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.sweep import CLEARLY
from tiltlens.estimates.trust import refuted
from tiltlens.estimates.widening import of_pool, of_run

REPLICATES = 200
GRID = 80  # strengths at which trust is asked for, up to FAR times the largest
FAR = 4.0


class Curve:
    """MBAR's value(s) and slope, of the mean activation or of KL, up to where its draws are trusted."""

    def __init__(self, runs: list[Samples], activations: list[np.ndarray], kind: str, pool: Pool):
        self.runs, self.activations, self.kind, self.pool = runs, activations, kind, pool
        self.top = self._reach()
        a, e = activations[0], runs[0].energy
        self.linear = bool(
            np.ptp(a) and np.ptp(e) and np.corrcoef(a, e)[0, 1] < -1 + 1e-9
        )  # then q_s is the nearest law

    def __call__(
        self, s: np.ndarray, counts: list[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "kl":
            found = mbar.evaluate(self.pool, s, counts)
            return found.kl(s), s * found.variance
        value, cov = mbar.expectation(self.pool, s, self.activations, counts)
        return value, -cov

    def _reach(self) -> float:
        """The largest strength up to which every estimate is healthy, and none refuted by a run's own bound."""
        spread = float(self.runs[0].energy.std()) or 1.0
        far = max(FAR * self.runs[-1].strength, 10 / spread)
        last = 0.0
        for s in far * np.geomspace(0.005, 1, GRID):
            log_z = float(mbar.evaluate(self.pool, np.array([s])).log_z[0])
            error = 1 / np.sqrt(mbar.trusted_draws(self.pool, s))
            if not mbar.healthy(self.pool, s, KL_ROOT) or refuted(log_z, error, log_z_floor(self.runs, s)):
                break
            last = float(s)
        return last

    def solve(self, target: float) -> float | None:
        """s with value(s) = target, by Newton inside a bracket; None where the curve ends before."""
        low, high = 0.0, self.top
        ends = self(np.array([low, high]))[0]
        if not high or not ends[0] <= target <= ends[1]:
            return None
        s = low + (high - low) * (target - ends[0]) / max(ends[1] - ends[0], 1e-300)
        for _ in range(60):
            value, slope = (float(x[0]) for x in self(np.array([s])))
            low, high = (s, high) if value < target else (low, s)
            step = s - (value - target) / slope if slope > 0 else np.nan
            following = step if low < step < high else (low + high) / 2
            if abs(following - s) <= 1e-9 * self.top:
                return float(following)
            s = following
        return float(s)

    def alone(self, s: float) -> int | None:
        """The run at s, where its own weights are healthy."""
        k = next((k for k, r in enumerate(self.runs) if r.strength == s), None)
        return k if k is not None and np.isfinite(relative_variance(self.runs[k], s, KL_ROOT)) else None

    def mean(self, s: float) -> tuple[float, float]:
        """Mean activation at s and its standard error: MBAR's; or of the run at s alone, where MBAR ends before, or where
        it is clearly better: its control variate may know more."""
        k = self.alone(s)

        def both(counts: list[np.ndarray]) -> np.ndarray:
            joint = mbar.expectation(self.pool, np.array([s]), self.activations, counts)[0][..., 0]
            own = joint if k is None else tilt(self.runs[k], s, counts[k], self.activations[k]).energy
            return np.stack([joint, own], -1)

        found = replicate(both, [r.cluster for r in self.runs], REPLICATES)
        wider = [of_pool(self.pool, s, self.runs)]
        wider.append(wider[0] if k is None else of_run(self.runs[k], s))
        se = found.se() * np.array(wider)
        if k is not None and not level(self.runs[k], s):  # see `integral.disagreements`
            known = 2 * se[0] if s <= self.top else 0.0
            se[1] = np.hypot(se[1], max(abs(found.values[0, 1] - found.values[0, 0]) - known, 0.0))
        best = int(k is not None and (s > self.top or se[1] < CLEARLY * se[0]))
        return float(found.values[0, best]), float(se[best])

    def least_kl(self, mean: float) -> float | None:
        """sup_t [t c - log E_p exp(t a)] over t >= 0 whose draws are healthy: no law of mean activation c is nearer."""
        a = np.concatenate([self.activations[k] for k in self.pool.members])
        a_0 = float(self.activations[0].mean())
        log_p = np.log(self.pool.weight) - self.pool.log_mixture
        log_p -= np.logaddexp.reduce(log_p)
        best, floor = 0.0, mbar.floor(self.pool, KL_ROOT)
        for t in np.geomspace(1e-3, 1e2, 400) / (float(self.activations[0].std()) or 1.0):
            if mbar.draws_behind(self.pool, t * (a - a_0)) < floor:
                break
            best = max(best, float(t * (mean - a_0) - np.logaddexp.reduce(log_p + t * (a - a_0))))
        return best
