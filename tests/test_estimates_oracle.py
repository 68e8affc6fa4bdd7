"""A chain with every number in closed form, no network: the oracle of tests/test_estimates*.py.

x_0 = 0, x_{k+1} = a x_k + b_k + v z_k + delta_k in R^d, T steps; the guided direction is e = (1, 0, ..) and
x_T is normal under P with mean 0 and variance V = v^2 sum a^{2(T-1-k)} per dimension. For E = -<e, x_T> the
optimal control is delta_k = s v^2 a^{T-1-k} e: log Z = s^2 V / 2, KL(q_s||p) = s^2 V / 2, m(s) = -s V.
"""

import numpy as np
import pytest

from tiltlens.estimates.importance import tilt
from tiltlens.estimates.samples import Samples

A, V_STEP, STEPS = 0.9, 0.5, 6
POWERS = A ** np.arange(STEPS - 1, -1, -1)
V = float(V_STEP**2 * (POWERS**2).sum())


def linear(x):
    return -x[:, 0]


def target(tau):
    return lambda x: (x[:, 0] - tau) ** 2 / 2


def target_log_z(s, tau, v=V):
    """log E exp(-s (a - tau)^2 / 2), a ~ N(0, v)."""
    return -np.log1p(s * v) / 2 - s * tau**2 / (2 * (1 + s * v))


def gaussian_kl(mean, variance, v=V):
    return (variance / v + mean**2 / v - 1 - np.log(variance / v)) / 2


def optimal(scale=1.0):
    return lambda s, x, k: scale * s * V_STEP**2 * POWERS[k] * np.eye(x.shape[1])[0]


def uniform(scale=1.0):
    """The same drift at every step: at scale 1 the right mean, for more KL of the path than of its end."""
    return lambda s, x, k: scale * s * V / POWERS.sum() * np.eye(x.shape[1])[0]


def stateful(scale=1.0, kappa=0.15):
    """Depends on the state, and pushes the other dimensions too."""
    best = optimal(scale)
    return lambda s, x, k: best(s, x, k) - s * kappa * V_STEP * np.tanh(x)


def run(noise, n, s, energy=linear, control=None, d=2):
    """(energy, log_w, path_kl, x_T) of n paths; noise: a generator, or (n, STEPS, d) shared by strengths."""
    z = noise if isinstance(noise, np.ndarray) else noise.standard_normal((n, STEPS, d))
    x, log_dp_dq, path_kl = np.zeros((n, d)), np.zeros(n), np.zeros(n)
    for k in range(STEPS):
        delta = np.broadcast_to(control(s, x, k), x.shape) if control and s > 0 else np.zeros_like(x)
        path_kl += (delta**2).sum(1) / (2 * V_STEP**2)
        log_dp_dq -= ((delta * z[:, k]).sum(1) / V_STEP) + (delta**2).sum(1) / (2 * V_STEP**2)
        x = A * x + V_STEP * z[:, k] + delta
    e = energy(x)
    return e, -s * e + log_dp_dq, path_kl, x


def table_of(rng, n, strengths, energy=linear, control=None, d=2, weights=True):
    """The columns a run folder would hold: every strength with the same seeds, hence the same noise."""
    z = rng.standard_normal((n, STEPS, d))
    parts = []
    for s in strengths:
        e, log_w, path_kl, x = run(z, n, s, energy, control, d)
        nothing = np.full(n, np.nan)
        parts.append(
            {
                "strength": np.full(n, float(s)),
                "seed": np.arange(n),
                "activation": x[:, 0],
                "z": x[:, 0] / np.sqrt(V),
                "energy": e,
                "log_w": log_w if weights else nothing,
                "path_kl": path_kl if weights else nothing,
                "finite": np.ones(n, bool),
            }
        )
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def pilot_of(rng, n, energy=linear, d=2):
    e, _, _, x = run(rng, n, 0.0, energy, None, d)
    return {"energy": e, "activation": x[:, 0], "z": x[:, 0] / np.sqrt(V)}


def samples_of(rng, n, s, energy=linear, control=None, d=2):
    e, log_w, path_kl, _ = run(rng, n, s, energy, control, d)
    return Samples(s, e, log_w, path_kl, np.arange(n))


CONTROLS = {
    "optimal": optimal(),
    "half": optimal(0.5),
    "over": optimal(1.3),
    "uniform": uniform(),
    "stateful": stateful(),
}


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(("energy", "log_z"), [(linear, V / 2), (target(1.5), target_log_z(1.0, 1.5))])
def test_weights_are_unbiased_and_the_martingale_is_centred(name, energy, log_z):
    samples = samples_of(np.random.default_rng(1), 40_000, 1.0, energy, CONTROLS[name])
    w = np.exp(samples.log_w)
    assert abs(w.mean() - np.exp(log_z)) < 4 * w.std() / 200 + 1e-12
    assert abs(samples.martingale.mean()) < 4 * samples.martingale.std() / 200
    assert samples.martingale.var() == pytest.approx(2 * samples.path_kl.mean(), rel=0.05)
    found = tilt(samples, 1.0)
    assert found.log_z == pytest.approx(log_z, abs=4 / np.sqrt(found.ess))
