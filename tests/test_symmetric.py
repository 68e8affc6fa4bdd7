"""Laws of the symmetric part of the Jacobian: exact where a denoiser is linear, that of forward mode on a network, nothing new where J is
a covariance."""

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltlens.energies import Linear
from tiltlens.guidance import Calibrated, Learned
from tiltlens.guidance.symmetric import jacobian_product
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank

GAUSSIAN = GaussianMixture([1.0], [[0.4, -0.3]], [0.5], points=200)
PLANE = GaussianMixture([0.6, 0.4], [[-1.0, 0.2], [0.8, 0.5]], [0.3, 0.1], points=200)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Skewed(nn.Module):
    """x0_hat = M x_t + c with an M that is no covariance, and the schedule of a prior."""

    def __init__(self, m):
        super().__init__()
        self.m, self.shape, self.schedule = m, (len(m),), GAUSSIAN.denoiser.schedule

    def forward(self, x_t, t):
        return x_t @ self.m.T + 0.3


def made(prior=PLANE, **how) -> Sampler:
    guidance = (Learned if how.pop("learned", False) else Calibrated)(**how)
    sampler = Sampler(prior, UnitBank([Projection([1.0, -0.5])]), Linear(False), guidance, 12)
    sampler.calibrate(sampler.run_pilot(64, 64))
    return sampler


def test_of_a_linear_denoiser_it_is_the_product():
    m, x, h = normal(5, 5), normal(4, 5, seed=1), normal(4, 5, seed=2)
    torch.testing.assert_close(jacobian_product(Skewed(m), x, h, 0), h @ m.T)
    assert torch.equal(jacobian_product(Skewed(m), x, torch.zeros_like(h), 0), torch.zeros_like(h))
    torch.testing.assert_close(jacobian_product(Skewed(m), torch.zeros_like(x), h, 0), h @ m.T)
    h[2] = 0.0  # one row of many, and a row alone
    found = jacobian_product(Skewed(m), x, h, 0)
    assert bool((found[2] == 0).all())
    torch.testing.assert_close(jacobian_product(Skewed(m), x[1:2], 1e-12 * h[1:2], 0), 1e-12 * found[1:2])


@pytest.mark.parametrize("clip", [False, True])
def test_guidance_pulls_back_by_the_symmetric_part(clip):
    """Of a clipped value there is none, neither way."""
    m, x, h = normal(3, 3), normal(6, 3, seed=1), normal(6, 3, seed=2)
    guidance, denoiser = Calibrated(symmetric=True), Skewed(m)
    step = made().chain.where(5, None)
    object.__setattr__(step, "clip", clip)
    leaf = x.clone().requires_grad_()
    x0_hat = denoiser(leaf, 0).clamp(-1, 1) if clip else denoiser(leaf, 0)
    free = h * (x0_hat.detach().abs() < 1) if clip else h
    assert not clip or 0 < int((free == 0).sum()) < free.numel()
    g = guidance.pull(denoiser, leaf, x0_hat, h, step)
    torch.testing.assert_close(g, free @ (m + m.T) / 2)


def test_of_an_exact_denoiser_it_is_what_it_was():
    """J is a covariance: on a Gaussian to rounding, on a mixture to the square of the difference."""
    for prior, tolerance in ((GAUSSIAN, 1e-9), (PLANE, 3e-2)):
        x, h = normal(64, 2, seed=3), normal(64, 2, seed=4)
        for t in (20, 80, 140):
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(prior.denoiser(leaf, t), leaf, h)
            off = jacobian_product(prior.denoiser, x, h, t) - g
            assert float(off.norm()) <= tolerance * float(g.norm())


@pytest.mark.parametrize("learned", [False, True])
def test_a_run_on_a_gaussian_is_the_same_with_and_without(learned):
    rows = [Row(0, 1.0, seed) for seed in range(8)]
    one, other = (made(GAUSSIAN, learned=learned, symmetric=s).sample(rows) for s in (False, True))
    torch.testing.assert_close(one.path_kl, other.path_kl, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(one.log_w, other.log_w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("finite", [False, True])
def test_beside_a_head_the_clean_estimates_part_alone_is_made_symmetric(finite):
    """On a Gaussian nothing changes; a head that is there adds the same with and without."""
    shifts = []
    for symmetric in (False, True):
        sampler = made(GAUSSIAN, learned=True, law="gaussian", symmetric=symmetric, finite=finite)
        g, number, x = sampler.guidance, 8, normal(3, 2)
        rows = sampler.constraint.rows(torch.zeros(3, dtype=torch.long), torch.full((3,), 0.7).double())
        g._weight = torch.zeros(1, 12, 2).double()
        g._weight[0, number] = torch.tensor([0.3, -0.2])
        shifts.append(g(sampler.chain.denoiser, x, sampler.chain.where(number, None), rows, g.start(x)).shift)
    torch.testing.assert_close(*shifts, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.99), ("bfloat16", 0.98)])
def test_of_a_network_it_is_that_of_forward_mode(precision, least):
    """Cosine, at levels where the scene is decided, and where only details are left."""
    exact, rounded = load_prior("bundled").denoiser, load_prior("bundled", precision=precision).denoiser
    draw = torch.Generator().manual_seed(5)
    for t in (700, 300):
        x, image, h = (torch.randn(4, 3, 32, 32, generator=draw) for _ in range(3))
        h = torch.nn.functional.avg_pool2d(h, 5, 1, 2)  # as smooth as an encoder's gradients are
        image = 2 * torch.nn.functional.avg_pool2d(image, 9, 1, 4)
        x = float(exact.schedule.alpha[t]) * image + float(exact.schedule.sigma[t]) * x
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            _, expected = jvp(lambda v, t=t: exact(v, t), (x,), (h,))
        found = jacobian_product(rounded, x, h, t)
        cosine = torch.cosine_similarity(found.flatten(1), expected.flatten(1))
        assert float(cosine.min()) > least
        torch.testing.assert_close(found.norm(), expected.norm(), rtol=0.1, atol=0.0)


def test_a_networks_jacobian_is_a_covariance_only_roughly():
    """Why the symmetric part is taken: J^T h and J h of the bundled prior lie apart, and no further than an error of training."""
    denoiser, draw = load_prior("bundled").denoiser, torch.Generator().manual_seed(6)
    for t in (700, 500, 300):
        eps, image, h = (torch.randn(8, 3, 32, 32, generator=draw) for _ in range(3))
        h, image = (torch.nn.functional.avg_pool2d(v, k, 1, k // 2) for v, k in ((h, 5), (2 * image, 9)))
        leaf = (
            float(denoiser.schedule.alpha[t]) * image + float(denoiser.schedule.sigma[t]) * eps
        ).requires_grad_()
        (g,) = torch.autograd.grad(denoiser(leaf, t), leaf, h)
        across = jacobian_product(denoiser, leaf.detach(), h, t)
        cosine = torch.cosine_similarity(g.flatten(1), across.flatten(1))
        assert 0.9 < float(cosine.mean()) < 0.98


def test_the_length_of_the_difference_is_between_rounding_and_curvature(monkeypatch):
    """A tenth of it is worse in bfloat16, five times of it in single precision."""
    draw, t = torch.Generator().manual_seed(7), 500
    exact, rounded = load_prior("bundled").denoiser, load_prior("bundled", precision="bfloat16").denoiser
    eps, image, h = (torch.randn(4, 3, 32, 32, generator=draw) for _ in range(3))
    h, image = (torch.nn.functional.avg_pool2d(v, k, 1, k // 2) for v, k in ((h, 5), (2 * image, 9)))
    x = float(exact.schedule.alpha[t]) * image + float(exact.schedule.sigma[t]) * eps
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, expected = jvp(lambda v: exact(v, t), (x,), (h,))

    def cosine(denoiser, part):
        monkeypatch.setattr("tiltlens.guidance.symmetric.PART", part)
        found = jacobian_product(denoiser, x, h, t)
        return float(torch.cosine_similarity(found.flatten(1), expected.flatten(1)).mean())

    assert cosine(rounded, 0.1) > cosine(rounded, 0.01) + 0.01
    assert cosine(exact, 0.1) > cosine(exact, 0.5) + 0.01
