"""Laws of the finite step: the optimum of the discrete chain on a Gaussian, Tweedie's shift for short steps and open directions."""

import math

import pytest
import torch
from torch import nn

from tiltlens.energies import Linear, Target
from tiltlens.guidance import Calibrated, Learned
from tiltlens.guidance.guidance import Step, finite_step
from tiltlens.priors import GaussianMixture
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.schedule import step_coefficients
from tiltlens.units import Projection, UnitBank

W = torch.tensor([0.8, -0.6, 0.3], dtype=torch.float64)
RARE = ([0.9, 0.1], [[-0.3], [2.7]], [0.1, 0.2])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step_of(schedule, t, r):
    return Step(0, t, schedule, False, None, gain=float(schedule.log_snr[r] - schedule.log_snr[t]))


@pytest.mark.parametrize("variance", [0.01, 0.5, 20.0])
@pytest.mark.parametrize(("t", "r"), [(900, 700), (600, 300), (300, 30), (100, 90)])
def test_on_a_gaussian_it_is_the_optimum_of_the_discrete_chain(variance, t, r):
    """psi_r is log-linear there: the tilted kernel N(mu, v^2) psi_r has its mean moved by v^2 grad log psi_r, exactly."""
    prior, s = GaussianMixture([1.0], [[0.4, -0.2, 0.1]], [variance]), 1.7
    schedule, x_t = prior.denoiser.schedule, normal(5, 3).requires_grad_()
    x0_hat = prior.denoiser(x_t, t)
    h = (s * W).expand(5, 3)
    (g,) = torch.autograd.grad(x0_hat, x_t, h)
    step, c = step_of(schedule, t, r), step_coefficients(schedule, t, r, 1.0)
    delta = c.x0 * step.sigma**2 / step.alpha * finite_step(h, g, step)[:, None] * g
    x_r = normal(5, 3, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad((prior.denoiser(x_r, r) @ W).sum() * s, x_r)
    torch.testing.assert_close(delta, c.v**2 * slope, rtol=1e-6, atol=1e-12)


def test_it_is_tweedies_for_a_step_of_no_length_and_for_an_open_direction():
    schedule = GaussianMixture(*RARE).denoiser.schedule
    h = normal(4, 6)
    for share, gain, expected in ((0.7, 0.0, 1.0), (0.0, 2.0, 1.0), (1.0, 2.0, math.exp(-2.0)), (5.0, 2.0, math.exp(-2.0))):  # fmt: skip
        step = Step(0, 300, schedule, False, None, gain=gain)
        part = finite_step(h, share / step.alpha * h, step)
        torch.testing.assert_close(part, torch.full((4,), expected, dtype=torch.float64))
    step = Step(0, 300, schedule, False, None, gain=1.0)
    assert torch.isfinite(finite_step(torch.zeros(2, 3), torch.zeros(2, 3), step)).all()
    # a scale of h is none of it, and a row is the same alone
    g = h * normal(6).abs()
    torch.testing.assert_close(finite_step(7 * h, 7 * g, step), finite_step(h, g, step))
    assert torch.equal(finite_step(h[2:3], g[2:3], step), finite_step(h, g, step)[2:3])


@pytest.mark.parametrize("law", ["gaussian", "natural"])
@pytest.mark.parametrize(("steps", "share"), [(12, 0.4), (25, 0.6)])
@pytest.mark.parametrize("energy", [Linear(False), Target(1.0, 0.8, False)], ids=["linear", "target"])
def test_few_steps_no_longer_over_tilt(law, steps, share, energy):
    """The gap, path KL + s E + log Z, on the same noise: a share of that of Tweedie's shifts, on a unit with a rare mode."""
    prior, s, gaps = GaussianMixture(*RARE, points=1000), 0.7, []
    log_z = float(prior.log_z([1.0], s, energy, energy.level or 0.0))
    for finite in (False, True):
        guidance = Calibrated(memory=0, law=law, finite=finite)
        sampler = Sampler(prior, UnitBank([Projection([1.0])]), energy, guidance, steps)
        sampler.calibrate(sampler.run_pilot(256, 256))
        found = sampler.sample([Row(0, s, seed) for seed in range(800)])
        gaps.append(found.path_kl + s * found.energy + log_z)
    spared = share * gaps[0] - gaps[1]
    assert float(spared.mean()) > 3 * float(spared.std()) / 800**0.5, [float(g.mean()) for g in gaps]


def test_with_a_head_the_shift_is_that_of_both_parts(monkeypatch):
    """The clean estimate's part is shortened, the head's is not."""
    prior = GaussianMixture([0.6, 0.4], [[-1.0, 0.2], [0.8, 0.5]], [0.3, 0.1], points=200)
    sampler = Sampler(
        prior, UnitBank([Projection([1.0, -0.5])]), Linear(False), Learned(law="gaussian", finite=True), 12
    )
    sampler.calibrate(sampler.run_pilot(64, 64))
    g, number, x = sampler.guidance, 8, normal(3, 2)
    rows = sampler.constraint.rows(torch.zeros(3, dtype=torch.long), torch.full((3,), 0.7).double())
    where = sampler.chain.where(number, None)
    monkeypatch.setattr(sampler.chain.denoiser, "with_features", lambda x_t, t: (sampler.chain.denoiser(x_t, t), x_t.flatten(1)))  # fmt: skip
    alone = g(sampler.chain.denoiser, x, where, rows, g.start(x)).shift
    weight = torch.tensor([0.3, -0.2], dtype=torch.float64)
    g._weight = torch.zeros(1, 12, 2).double()
    g._weight[0, number] = weight
    both = g(sampler.chain.denoiser, x, where, rows, g.start(x)).shift
    share = float(g._multipliers[0, number, -1])
    expected = alone + where.sigma**2 / where.alpha * 0.7 * share * weight
    torch.testing.assert_close(both, expected)


def test_a_network_whose_jacobian_is_no_covariance_is_shortened_within_bounds():
    """<h, J^T h> may be negative there: the part stays in [exp(-gain), 1]."""
    net, x = nn.Linear(6, 6).double(), normal(8, 6).requires_grad_()
    h = normal(8, 6, seed=3)
    (g,) = torch.autograd.grad(net(x), x, h)
    step = Step(0, 300, GaussianMixture(*RARE).denoiser.schedule, False, None, gain=0.8)
    part = finite_step(h, g, step)
    assert bool((part >= math.exp(-0.8) - 1e-12).all())
    assert bool((part <= 1).all())


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_steps_that_are_not_ancestral_keep_tweedies_shift(eta):
    prior = GaussianMixture(*RARE)
    images = []
    for finite in (False, True):
        guidance = Calibrated(memory=0, law="gaussian", finite=finite)
        sampler = Sampler(prior, UnitBank([Projection([1.0])]), Linear(False), guidance, 12, eta)
        sampler.calibrate(sampler.run_pilot(64, 64))
        images.append(sampler.sample([Row(0, 0.7, seed) for seed in range(8)]).images)
    assert torch.equal(*images)
