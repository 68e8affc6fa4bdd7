"""Laws of the guided chain: strength 0 is the base chain, rows never meet, the weights are exact."""

import pytest
import torch
from prior_folders import write_pixel

from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import DPS, LGD, MPGD, Calibrated, Exact, Learned, MomentMatched
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.sampling.noise import STREAMS, Noise, stream_seed
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank

W = [[0.9, -0.5], [0.3, 0.8]]
PLANE = ([0.6, 0.4], [[-0.6, 0.2], [0.8, 0.5]], [0.5, 0.3])
GUIDANCES = {
    "dps": DPS, "lgd": lambda: LGD(samples=2), "mpgd": MPGD, "moment matched": MomentMatched, "exact": Exact,
    "calibrated": Calibrated, "calibrated, no memory": lambda: Calibrated(memory=0),
    "calibrated, redraws": lambda: Calibrated(redraws=2), "learned": Learned,
}  # fmt: skip
each = pytest.mark.parametrize("name", GUIDANCES)
ENERGIES = {"linear": Linear(False), "target": Target(1.0, 0.7, False), "threshold": Threshold(1.5, False)}
LEVELS = {"linear": 0.0, "target": 1.0, "threshold": 1.5}


def sampler(name, energy=None, steps=12, eta=1.0, prior=None, directions=W) -> Sampler:
    """Calibrated and ready."""
    bank = UnitBank([Projection(w) for w in directions])
    made = Sampler(prior or GaussianMixture(*PLANE), bank, energy or Linear(), GUIDANCES[name](), steps, eta)
    made.calibrate(made.run_pilot(64, 64))
    return made


def bound(made: Sampler, which, strengths):
    return made.constraint.rows(torch.tensor(which), torch.tensor(strengths, dtype=made.dtype))


def noise(made: Sampler, seeds) -> Noise:
    return Noise(seeds, made.chain.denoiser.shape, dtype=made.dtype)


MIXED = [Row(i % 2, (0.0, 0.5, 2.0)[i % 3], 7 * i) for i in range(16)]


# --- strength 0, batches, broken rows ----------------------------------------------------


@each
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_strength_zero_is_the_base_chain_bit_by_bit(name, eta):
    if name == "learned" and eta == 0:
        pytest.skip("learns from the noise of the steps")
    made, strengths = sampler(name, eta=eta), [0.0, 1.0, 0.0, 3.0]
    free = [state.x for state, _ in made.chain.run(noise(made, range(4)))]
    guided = list(made.chain.run(noise(made, range(4)), made.guidance, bound(made, [0, 1, 1, 0], strengths)))
    for number, (x, (state, info)) in enumerate(zip(free, guided)):
        assert torch.equal(x[[0, 2]], state.x[[0, 2]]), (
            f"{name}, eta {eta}: strength 0 differs at step {number}"
        )
        assert state.log_dpdq[[0, 2]].abs().max() == state.path_kl[[0, 2]].abs().max() == 0
        assert info.guidance_norm[[0, 2]].abs().max() == 0
    assert (free[-1][[1, 3]] - state.x[[1, 3]]).abs().amax(1).min() > 1e-3, f"{name}: guidance moves nothing"


@pytest.fixture(scope="module")
def tiny_unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior") / "pixel"
    write_pixel(folder)
    return load_prior(str(folder))


@pytest.mark.parametrize("name", [*GUIDANCES, "calibrated on a network"])
def test_a_row_is_the_same_in_any_batch_and_order(name, tiny_unet):
    """The same name gives the same image: batches of 1, 3 and 16, forwards and backwards."""
    if name == "calibrated on a network":
        directions = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)).div(14).tolist()
        made, tolerance, sizes = (
            sampler("calibrated", steps=6, prior=tiny_unet, directions=directions),
            1e-4,
            (3, 16),
        )
    else:
        made, tolerance, sizes = sampler(name), 1e-6, (1, 3, 16)
    whole = made.sample(MIXED)
    for size in sizes:
        rows = MIXED[::-1]
        parts = [made.sample(rows[i : i + size]) for i in range(0, 16, size)]
        for what in ("images", "activation", "energy", "log_w", "path_kl", "step_kl", "guidance_norm"):
            found = torch.cat([getattr(p, what) for p in parts]).flip(0)
            off = (found - getattr(whole, what)).abs().max()
            assert off < tolerance * (1 + getattr(whole, what).abs().max()), (
                f"{name}, batch {size}: {what} off by {off:.1e}"
            )


@each
def test_a_broken_row_never_touches_its_neighbours(name, monkeypatch):
    made = sampler(name, Target("z=1"))
    rows = [Row(0, 1.0, seed) for seed in range(5)]
    sound, denoiser = made.sample(rows), made.chain.denoiser
    posterior = denoiser.posterior

    def broken(x_t, t):
        log_r, mu, tau = posterior(x_t, t)
        row = torch.tensor([1.0, 1, float("nan"), 1, 1], dtype=mu.dtype).repeat(len(mu) // 5)[:, None, None]
        return (log_r, mu * row, tau) if t == made.chain.indices[4] else (log_r, mu, tau)

    monkeypatch.setattr(denoiser, "posterior", broken)
    found, others = made.sample(rows), [0, 1, 3, 4]
    assert found.finite.tolist() == [True, True, False, True, True], f"{name}: {found.finite}"
    for what in ("images", "log_w", "path_kl", "activation"):
        assert torch.equal(getattr(found, what)[others], getattr(sound, what)[others]), (
            f"{name}: {what} of a neighbour"
        )


@each
def test_the_last_step_is_not_guided(name):
    made = sampler(name)
    infos = [
        info
        for _, info in made.chain.run(noise(made, [1, 2]), made.guidance, bound(made, [0, 1], [1.0, 2.0]))
    ]
    assert any(i.guided for i in infos[:-1])
    assert not infos[-1].guided
    assert infos[-1].guidance_norm.abs().max() == infos[-1].path_kl.abs().max() == 0


@pytest.mark.parametrize("name", [g for g in GUIDANCES if g != "learned"])
def test_without_noise_there_are_no_weights(name):
    made = sampler(name, eta=0.0)
    states = [
        s for s, _ in made.chain.run(noise(made, [1, 2]), made.guidance, bound(made, [0, 1], [1.0, 2.0]))
    ]
    assert states[-1].log_dpdq.abs().max() == states[-1].path_kl.abs().max() == 0
    found = made.sample([Row(0, 1.0, 1), Row(0, 0.0, 1)])
    assert found.log_w is None
    assert found.path_kl is None
    assert found.finite.all()
    assert not torch.equal(found.images[0], found.images[1]), "eta = 0 is still guided"


# --- weights -----------------------------------------------------------------------------


class Recorder:
    """A guidance that keeps what it said."""

    def __init__(self, inner):
        self.inner, self.start, self.said = inner, inner.start, []

    def __call__(self, *arguments):
        self.said.append(self.inner(*arguments))
        return self.said[-1]


@each
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_log_dpdq_is_the_difference_of_two_gaussian_log_densities(name, eta):
    """Recomputed by brute force from the recorded path, in float64."""
    made = sampler(name, Target("z=1"), eta=eta)
    record, c = Recorder(made.guidance), made.chain.coefficients
    rows, draws = bound(made, [0, 1, 0], [0.5, 1.0, 2.0]), noise(made, [3, 4, 5])
    state, brute, kl = made.chain.start(draws, record), 0.0, 0.0
    for number, t in enumerate(made.chain.indices):
        x = state.x
        state, _ = made.chain.step(state, number, draws, record, rows)
        if number == len(made.chain) - 1:
            break
        base = c[number].x0 * made.chain.denoiser(x, t) + c[number].x * x
        said = record.said[number].shift
        guided = base if said is None else base + c[number].x0 * said
        p, q = (torch.distributions.Normal(mean, c[number].v) for mean in (base, guided))
        brute = brute + (p.log_prob(state.x) - q.log_prob(state.x)).sum(1)
        kl = kl + torch.distributions.kl_divergence(q, p).sum(1)
    assert len(record.said) == len(made.chain) - 1
    assert kl.min() > 1e-3, f"{name}: nothing was guided"
    torch.testing.assert_close(state.log_dpdq, brute, atol=1e-8, rtol=1e-8, msg=lambda e: f"{name}: {e}")
    torch.testing.assert_close(state.path_kl, kl, atol=1e-8, rtol=1e-8, msg=lambda e: f"{name}: {e}")


def run_guided(name, energy, s, n, steps):
    """(final states, log dP/dQ, path KL, the prior) of n paths guided at strength s for the first unit."""
    made = sampler(name, energy, steps=steps)
    for state, _ in made.chain.run(noise(made, range(n)), made.guidance, bound(made, [0] * n, [s] * n)):  # noqa: B007
        pass
    return state.x, state.log_dpdq, state.path_kl, made.prior


@each
def test_the_mean_weight_is_z_whatever_the_guidance(name):
    """E_Q[w] = Z. The guidance is a wrong one, too weak by half, and for two of the energies that of another: any shift
    keeps the weights exact."""
    x, log_dpdq, kl, prior = run_guided(name, ENERGIES["linear"], 0.5, 3000, 40)
    assert kl.mean() > 1e-3, f"{name}: nothing was guided"
    for energy, level in LEVELS.items():
        e = ENERGIES[energy](x @ torch.tensor(W[0], dtype=torch.float64), level)
        w = (log_dpdq - e - prior.log_z(W[0], 1.0, ENERGIES[energy], level)).exp()
        ess = float(w.sum() ** 2 / w.square().sum()) / len(w)
        z = float((w.mean() - 1) / (w.std() / len(w) ** 0.5))
        assert ess > 0.1, f"{name}, {energy}: a z-test on weights of relative ESS {ess:.3f} says nothing"
        assert abs(z) < 4, (
            f"{name}, {energy}: mean weight {w.mean():.4f} Z, {z:.1f} standard errors; ESS {ess:.2f}"
        )


@each
@pytest.mark.parametrize("energy", ENERGIES)
def test_path_kl_bounds_kl_and_the_gap_is_not_negative(name, energy):
    """path KL >= KL(q'||p) >= -l E_q'[E] - log Z(l) for every l; at l = s that is gap >= 0."""
    level = LEVELS[energy]
    x, _, kl, prior = run_guided(name, ENERGIES[energy], 1.0, 600, 30)
    e = ENERGIES[energy](x @ torch.tensor(W[0], dtype=torch.float64), level)
    for other in (0.3, 1.0, 2.0):
        gap = kl + other * e + float(prior.log_z(W[0], other, ENERGIES[energy], level))
        se = float(gap.std()) / len(e) ** 0.5
        assert gap.mean() > -4 * se - 0.01, (
            f"{name}, {energy}, l {other}: {float(gap.mean()):.3f} +- {se:.3f}"
        )


@pytest.mark.parametrize("energy", ENERGIES)
def test_the_exact_twist_reaches_the_optimum_with_short_steps(energy):
    """Its gap is small at 40 steps; its path KL exceeds the optimum in proportion to the step and is met in the limit:
    extrapolated from 60 and 120 steps."""
    level, kls = LEVELS[energy], []
    for steps in (60, 120):
        x, _, kl, prior = run_guided("exact", ENERGIES[energy], 1.0, 800, steps)
        gap = kl + ENERGIES[energy](x @ torch.tensor(W[0], dtype=torch.float64), level)
        gap, se = gap + float(prior.log_z(W[0], 1.0, ENERGIES[energy], level)), float(gap.std()) / 800**0.5
        assert abs(gap.mean()) < 4 * se + 0.02, (
            f"{energy}, {steps} steps: gap {float(gap.mean()):.3f} +- {se:.3f}"
        )
        kls.append(kl)
    limit, optimum = 2 * kls[1] - kls[0], prior.kl(W[0], 1.0, ENERGIES[energy], level)
    se = float(limit.std()) / 800**0.5
    assert abs(limit.mean() - optimum) < 4 * se + 0.02 * optimum, (
        f"{energy}: path KL {kls[0].mean():.3f}, {kls[1].mean():.3f} -> {limit.mean():.3f} +- {se:.3f}, optimum {optimum:.3f}"
    )


# --- noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4), (3, 48, 48)])
def test_noise_has_a_name(stream, shape):
    """The same whatever the batch, its order, the grouping of draws, the other streams' use, or the precision."""
    whole = Noise([5, 6, 7], shape)
    draws = torch.stack([whole.draw(stream) for _ in range(7)], 1)
    other = Noise([7, 5], shape, dtype=torch.float64)
    for name in STREAMS:
        if name != stream:
            other.draw(name, 3)
    grouped = torch.cat([other.draw(stream, 2), other.draw(stream)[:, None], other.draw(stream, 4)], 1)
    assert torch.equal(grouped.float(), draws[[2, 0]])


def test_streams_domains_and_seeds_are_independent():
    """No two of them correlate beyond chance (4.5 standard errors, 20,000 numbers), and each is standard normal."""
    names = [(d, s, stream) for d in ("sample", "pilot") for s in (0, 1) for stream in STREAMS]
    assert len({stream_seed(*name) for name in names}) == len(names)
    drawn = torch.stack([Noise([s], (20_000,), domain=d).draw(stream)[0] for d, s, stream in names]).double()
    off = (torch.corrcoef(drawn) - torch.eye(len(names))).abs().max() * 20_000**0.5
    assert off < 4.5, f"a correlation of {off:.1f} standard errors"
    assert drawn.mean(1).abs().max() < 4.5 / 20_000**0.5
    assert (drawn.var(1) - 1).abs().max() < 4.5 * (2 / 20_000) ** 0.5


def test_an_unknown_stream_is_refused():
    with pytest.raises(ValueError, match="stream"):
        Noise([0], (2,)).draw("weather")
