"""Laws of the analytic prior: Tweedie, the closed forms of the tilt, and a chain whose law is the mixture's."""

import pytest
import torch

from tiltlens.energies import Linear, Target, Threshold
from tiltlens.priors import GaussianMixture
from tiltlens.schedule import step_coefficients, step_indices

ENERGIES = {"linear": Linear(False), "target": Target(1.0, 0.7, False), "threshold": Threshold(1.5, False)}
LEVELS = {"linear": 0.0, "target": 1.0, "threshold": 1.5}
each_energy = pytest.mark.parametrize("name", ENERGIES)
MIXTURES = {
    "one component": ([1.0], [[0.5, -1.0, 2.0]], [0.3]),
    "three components": (
        [0.5, 0.3, 0.2],
        [[-1.0, 0.2, 0.0], [0.6, 0.4, -0.3], [1.0, -1.0, 0.8]],
        [0.2, 0.05, 0.5],
    ),
}
LINE = ([0.6, 0.4], [[-0.8], [1.1]], [0.3, 0.15])  # one dimension: everything can be integrated


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_density(prior, x, alpha=1.0, sigma=0.0):
    """log p_t(x), straight from the definition: x_t | k ~ N(alpha m_k, (alpha^2 v_k + sigma^2) I)."""
    m, v = prior.denoiser.means, prior.denoiser.variances
    law = torch.distributions.Normal(alpha * m, (alpha**2 * v + sigma**2).sqrt()[:, None])
    return torch.logsumexp(prior.weights.log() + law.log_prob(x[:, None]).sum(-1), 1)


def line():
    """(a grid on R, the spacing, log p on it) of the one-dimensional prior."""
    x = torch.linspace(-9, 9, 60_001, dtype=torch.float64)
    return x, float(x[1] - x[0]), log_density(GaussianMixture(*LINE), x[:, None])


def some_indices(prior):
    return [int(i) for i in torch.linspace(0, len(prior.denoiser.schedule) - 1, 7)]


# --- the denoiser ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_clean_estimate_is_tweedie(kind):
    """E[x_0 | x_t] = (x_t + sigma^2 grad log p_t) / alpha."""
    prior = GaussianMixture(*MIXTURES[kind], points=500)
    for t in some_indices(prior):
        alpha, sigma = float(prior.denoiser.schedule.alpha[t]), float(prior.denoiser.schedule.sigma[t])
        x = (alpha * normal(20, 3) + sigma * normal(20, 3, seed=1)).requires_grad_()
        (score,) = torch.autograd.grad(log_density(prior, x, alpha, sigma).sum(), x)
        expected = (x + sigma**2 * score) / alpha
        found = prior.denoiser(x, t)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_correction_is_half_c_times_c_score_plus_div_c(kind):
    """C = (sigma^2/alpha) d x0_hat/d x_t and (div C)_i = sum_j d C_ij/d x_j, by autograd; in three dimensions."""
    prior = GaussianMixture(*MIXTURES[kind], points=500)
    exact = prior.denoiser
    for t in some_indices(prior):
        alpha, sigma = float(exact.schedule.alpha[t]), float(exact.schedule.sigma[t])
        corrected = exact.for_steps({t: 0.8})
        for x in alpha * normal(3, 3) + sigma * normal(3, 3, seed=1):
            mean = lambda y: exact(y[None], t)[0]  # noqa: B023, E731
            jacobian = torch.autograd.functional.jacobian
            covariance = sigma**2 / alpha * jacobian(mean, x)
            slopes = jacobian(lambda y: sigma**2 / alpha * jacobian(mean, y, create_graph=True), x)  # noqa: B023
            divergence = torch.einsum("ijj->i", slopes)
            score = (alpha * mean(x) - x) / sigma**2
            expected = mean(x) - 0.4 * (covariance @ score + divergence)
            found = corrected(x[None], t)[0]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(exact.for_steps({})(normal(2, 3), t), exact(normal(2, 3), t))


def chain_law(prior, eta, steps, spacing, corrected):
    """(mean, variance) of a chain on one component of one dimension: affine maps, propagated exactly."""
    exact = prior.denoiser
    indices = step_indices(exact.schedule, steps, spacing)
    c = [step_coefficients(exact.schedule, t, r, eta) for t, r in zip(indices, [*indices[1:], None])]
    denoiser = exact.for_steps({t: k.x0 for t, k in zip(indices[:-1], c)}) if corrected else exact
    mean, variance = 0.0, exact.schedule.start_std(indices[0]) ** 2
    for t, k in zip(indices, c):
        at_0, at_1 = denoiser(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t)[:, 0].tolist()
        slope = k.x0 * (at_1 - at_0) + k.x
        mean, variance = slope * mean + k.x0 * at_0, slope**2 * variance + k.v**2
    return mean, variance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance", [0.05, 1.0, 8.0])
def test_the_corrected_chain_has_the_variance_of_the_mixture(eta, variance):
    """100 "index" steps: within 1 %, where the plain conditional mean narrows a Gaussian by several percent."""
    prior = GaussianMixture([1.0], [[0.7]], [variance])
    mean, found = chain_law(prior, eta, 100, "index", corrected=True)
    _, plain = chain_law(prior, eta, 100, "index", corrected=False)
    where = (
        f"eta {eta}, v {variance}: corrected {found / variance - 1:+.4f}, plain {plain / variance - 1:+.4f}"
    )
    assert abs(found / variance - 1) < 1e-2, where
    assert plain / variance - 1 < -2e-2, where
    assert abs(mean - 0.7) < 1e-2 * variance**0.5, f"{where}; mean {mean}"


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["index", "log-snr"])
def test_the_error_of_the_corrected_chain_is_second_order(eta, spacing):
    """Against the variance of the last clean estimate: the table ends at log-SNR 8, 3e-4 of the variance short."""
    prior = GaussianMixture([1.0], [[0.0]], [0.6])
    end = torch.zeros(1, 1, dtype=torch.float64), 0
    variance = 0.6 - float(prior.denoiser.posterior(*end)[2])
    errors = [abs(chain_law(prior, eta, n, spacing, True)[1] / variance - 1) for n in (40, 160)]
    assert errors[1] < errors[0] / 8, (
        f"four times the steps: {errors[0]:.2e} -> {errors[1]:.2e}, expected about 1/16"
    )


# --- closed forms of the tilt ------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("s", [0.0, 0.5, 3.0])
def test_the_tilted_mixture_is_the_tilt(kind, s):
    """log q_s(x) = log p(x) + s <w, x> - log Z at every x."""
    prior, w = (
        GaussianMixture(*MIXTURES[kind], points=50),
        torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64),
    )
    x = 2 * normal(50, 3)
    expected = log_density(prior, x) + s * x @ w - prior.log_z(w, s)
    torch.testing.assert_close(log_density(prior.tilt(w, s), x), expected, atol=1e-9, rtol=1e-9)


def test_a_strong_tilt_leaves_the_components_that_it_reaches():
    """Weights that underflow are absent, not an error."""
    far = GaussianMixture([0.5, 0.5], [[-50.0], [50.0]], [1.0, 1.0], points=50).tilt(
        torch.tensor([1.0]), 20.0
    )
    assert float(far.weights @ far.denoiser.means[:, 0]) == pytest.approx(70.0)


def test_reweighted_exact_samples_agree_with_the_tilt():
    prior, w = (
        GaussianMixture(*MIXTURES["three components"], points=50),
        torch.tensor([1.0, -0.5, 0.3]).double(),
    )
    x, tilted = prior.sample(40_000, torch.Generator().manual_seed(0)), prior.tilt(w, 0.8)
    weight = torch.exp(0.8 * x @ w - prior.log_z(w, 0.8))
    expected = tilted.weights @ tilted.denoiser.means
    terms = weight[:, None] * (x - expected)
    z = terms.mean(0) / (terms.std(0) / len(x) ** 0.5)
    assert z.abs().max() < 4.5, f"mean of re-weighted samples, in standard errors off: {z.tolist()}"


@each_energy
@pytest.mark.parametrize("s", [0.3, 2.0])
def test_log_z_mean_energy_and_kl_are_the_integrals(name, s):
    prior, energy, level = GaussianMixture(*LINE, points=50), ENERGIES[name], LEVELS[name]
    x, dx, log_p = line()
    w = 1.3
    e = energy(w * x, level)
    log_z = float(torch.logsumexp(log_p - s * e, 0) + torch.tensor(dx).log())
    q = torch.exp(log_p - s * e - log_z) * dx
    mean, kl = float((q * e).sum()), float((q * (-s * e - log_z)).sum())
    arguments = (torch.tensor([w], dtype=torch.float64), s, energy, level)
    assert float(prior.log_z(*arguments)) == pytest.approx(log_z, abs=1e-6)
    assert prior.mean_energy(*arguments) == pytest.approx(mean, abs=1e-6)
    assert prior.kl(*arguments) == pytest.approx(kl, abs=1e-6)
    h, variance = 1e-3, float((q * (e - mean) ** 2).sum())
    slope = (
        prior.mean_energy(*arguments[:1], s + h, energy, level)
        - prior.mean_energy(*arguments[:1], s - h, energy, level)
    ) / (2 * h)
    assert slope == pytest.approx(-variance, rel=1e-4), f"{name}: dm/ds {slope}, -Var {-variance}"


@each_energy
def test_log_z_and_mean_energy_agree_with_monte_carlo(name):
    """In three dimensions, from exact samples: Z = E_p[exp(-s E)], m = E_p[E exp(-s E)] / Z."""
    prior, energy, level, s = (
        GaussianMixture(*MIXTURES["three components"], points=50),
        ENERGIES[name],
        LEVELS[name],
        0.6,
    )
    w = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    x = prior.sample(40_000, torch.Generator().manual_seed(3))
    e = energy(x @ w, level)
    weight = torch.exp(-s * e - prior.log_z(w, s, energy, level))
    for what, terms in [
        ("Z", weight - 1),
        ("mean energy", weight * (e - prior.mean_energy(w, s, energy, level))),
    ]:
        z = float(terms.mean() / (terms.std() / len(x) ** 0.5))
        assert abs(z) < 4.5, f"{name}, {what}: {z:.1f} standard errors off"


@each_energy
def test_levels_keep_their_digits(name):
    """A level that float32 cannot hold: log Z by the definition, term by term."""
    prior, w, s, level = (
        GaussianMixture(*LINE, points=50),
        torch.tensor([1.3]).double(),
        torch.tensor(5.0).double(),
        1.1,
    )
    m, v = prior.denoiser.means @ w, prior.denoiser.variances * (w @ w)
    terms = prior.weights.log() + ENERGIES[name].log_tilt(m, v, s, torch.tensor(level, dtype=torch.float64))
    assert float(prior.log_z(w, 5.0, ENERGIES[name], level)) == pytest.approx(
        float(terms.logsumexp(0)), abs=1e-13
    )


@each_energy
def test_the_exact_twist_is_a_martingale(name):
    """The integral of p_t psi_t is Z at every noise level, and psi at the clean end is exp(-s E)."""
    prior, energy, s = GaussianMixture(*LINE, points=500), ENERGIES[name], 1.2
    w = torch.tensor([1.3], dtype=torch.float64)
    log_z = float(prior.log_z(w, s, energy, LEVELS[name]))
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    rows = [torch.full((len(x),), value, dtype=torch.float64) for value in (s, LEVELS[name])]
    for t in some_indices(prior):
        alpha, sigma = float(prior.denoiser.schedule.alpha[t]), float(prior.denoiser.schedule.sigma[t])
        log_psi = prior.log_psi(prior.denoiser.posterior(x, t), w.expand(len(x), 1), energy, *rows)
        found = torch.logsumexp(log_density(prior, x, alpha, sigma) + log_psi, 0) + (x[1, 0] - x[0, 0]).log()
        assert float(found) == pytest.approx(log_z, abs=1e-5), f"{name}, t {t}"
    near = prior.sample(20, torch.Generator().manual_seed(0))
    log_psi = prior.log_psi(
        prior.denoiser.posterior(near, 0), w.expand(20, 1), energy, rows[0][:20], rows[1][:20]
    )
    torch.testing.assert_close(log_psi, -s * energy(near @ w, LEVELS[name]), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], [[0.0]], [1.0]), "found"),
        (([1.0], [[float("nan")]], [1.0]), "finite"),
        (([1.0], [[0.0]], [0.0]), "positive"),
        (([1.0, -0.1], [[0.0], [1.0]], [1.0, 1.0]), "positive"),
        (
            ([0.5, 0.5], [[0.0, 0.0], [1.0, 2.0, 3.0]], [1.0, 1.0]),
            r"means: .*rows of one length d, .*\[2, 3\]",
        ),
        (([1.0], [[0.0]], [1.0], 0), "points = 0: expected a whole number >= 2"),
        (([1.0], [[0.0]], [1.0], 1), "points = 1"),
    ],
)
def test_numbers_that_are_no_mixture_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)
