"""The draws of all strengths in one pool, and the maximum of MBAR's likelihood; see `mbar`."""

from dataclasses import dataclass

import numpy as np

from tiltlens.estimates.importance import KL_ROOT, relative_variance
from tiltlens.estimates.samples import Samples

NEWTON = 200  # steps at most
TOLERANCE = 1e-10  # of N_k, that the likelihood's gradient may be off


@dataclass(frozen=True)
class Pool:
    """The draws of K >= 1 strengths, the first of them 0, and their likelihood's maximum.

    members: index of the run of each state; strengths, sizes, free_energy (K,): s_k, N_k, f_k. Of all N samples
    in one row: energy (N,) measured from `centre`, state (N,) and weight c_n (N,). log_mixture (N,): log D;
    share (K, N): the part of each state in D; hessian (K - 1, K - 1): of the likelihood, states 1.. alone.
    """

    members: tuple[int, ...]
    strengths: np.ndarray
    sizes: np.ndarray
    centre: float
    energy: np.ndarray
    state: np.ndarray
    weight: np.ndarray
    free_energy: np.ndarray
    log_mixture: np.ndarray
    share: np.ndarray
    hessian: np.ndarray

    def __len__(self) -> int:
        return len(self.members)


def pool_draws(samples: list[Samples]) -> Pool | None:
    """All runs whose weights are healthy for KL, with their solution; None without samples of p, the anchor.

    samples: sorted by strength, each strength once.
    """
    found = [(k, _draws(run)) for k, run in enumerate(samples)]
    found = [(k, size) for k, size in found if size]
    if not found or samples[found[0][0]].strength != 0:
        return None
    runs, sizes = [samples[k] for k, _ in found], np.array([size for _, size in found], float)
    centre = float(runs[0].energy.mean())  # E + c then moves log Z alone
    e = np.concatenate([run.energy for run in runs]) - centre
    s = np.array([run.strength for run in runs])
    state = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
    c = np.concatenate([_share_out(run, size) for run, size in zip(runs, sizes)])
    return Pool(tuple(k for k, _ in found), s, sizes, centre, e, state, c, *_maximum(s, sizes, e, c))


def _draws(run: Samples) -> float:
    """N_k: of how many draws of q_k these samples are worth; 0 for a run that may not take part."""
    if len(run) < 2:
        return 0.0
    if run.strength == 0:
        return float(len(run))
    variance = relative_variance(run, run.strength, KL_ROOT)
    if np.isnan(variance):
        return 0.0
    w = _share_out(run, 1.0)
    # even weights count for all n, be they of independent samples or of particles
    return float(min(1 / (w @ w), 1 / (variance + 1 / len(run))))


def _share_out(run: Samples, size: float) -> np.ndarray:
    w = np.exp(run.log_w - run.log_w.max())
    return size * w / w.sum()


def _maximum(s: np.ndarray, sizes: np.ndarray, e: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    """(f, log D, share, hessian) where sum_k N_k f_k - sum_n c_n log D(E_n) is largest, f_0 = 0: damped Newton."""
    log_sizes = np.log(sizes)

    def at(f: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        parts = (log_sizes + f)[:, None] - s[:, None] * e
        top = parts.max(0)
        log_d = top + np.log(np.exp(parts - top).sum(0))
        return parts, log_d, float(sizes @ f - c @ log_d)

    f = np.zeros(len(s))
    parts, log_d, value = at(f)
    for _ in range(NEWTON):
        share = np.exp(parts - log_d)
        expected = share @ c
        hessian = ((share * c) @ share.T - np.diag(expected))[1:, 1:]
        gradient = (sizes - expected)[1:]
        if (np.abs(gradient) <= TOLERANCE * sizes[1:]).all():
            break
        step = np.concatenate([[0.0], np.linalg.lstsq(-hessian, gradient, rcond=1e-14)[0]])
        step *= min(1.0, 20.0 / np.abs(step).max())  # far off, the likelihood is nearly linear
        for _ in range(40):
            trial = at(f + step)
            if trial[2] >= value - 1e-13 * abs(value):
                break
            step = step / 2
        f, (parts, log_d, value) = f + step, trial
    return f, log_d, share, hessian
