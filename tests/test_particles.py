"""Laws of twisted sequential Monte Carlo: Z is unbiased for any twist and any resampling, a group is the same in any
company, and what a particle has goes where the particle goes."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from prior_folders import write_pixel
from test_wandb_curve import Offline

from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import DPS, LGD, MPGD, Calibrated, Exact, MomentMatched
from tiltlens.modules.command_line import run as run_command
from tiltlens.modules.sampling_cli import main
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import Independent, Particles
from tiltlens.sampling.cloud import Cloud, Weights, systematic
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.sampling.tempering import conditional_ess, exponent
from tiltlens.units import Projection, UnitBank, build_unit

LINE = GaussianMixture([0.6, 0.4], [[-0.9], [1.1]], [0.3, 0.2], points=200)
PLANE = GaussianMixture([0.6, 0.4], [[-0.6, 0.2], [0.8, 0.5]], [0.5, 0.3], points=200)
W = [[0.9, -0.5], [0.3, 0.8]]


class Wrong(DPS):
    """Pushes as DPS does and calls it another twist: any positive function will do."""

    def cotangent(self, clean, step, rows, memory):
        h, memory, _ = super().cotangent(clean, step, rows, memory)
        return h, memory, lambda g, _: (g, torch.sin(3 * clean.detach().sum(1)) + 0.3)


class Unpushed(DPS):
    """The twist alone: nothing is shifted."""

    def shift(self, g, step, rows):
        return torch.zeros_like(g)


GUIDANCES = {
    "dps": DPS, "lgd": lambda: LGD(samples=2), "mpgd": MPGD, "moment matched": MomentMatched, "exact": Exact,
    "calibrated": lambda: Calibrated(law="gaussian", finite=False), "natural": Calibrated, "wrong": Wrong, "unpushed": Unpushed, "late": lambda: DPS([0.1, 0.7]),
}  # fmt: skip
LINEAR, TARGET, THRESHOLD = Linear(False), Target(0.8, 1.2, False), Threshold(1.0, False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Thousands of rows of one number a step: no more of each stream than is used."""
    monkeypatch.setattr("tiltlens.sampling.noise.BLOCK", 64)


def sampler(
    name="dps", method=None, energy=LINEAR, prior=LINE, directions=((1.0,),), steps=10, spacing="index"
):
    """Calibrated and ready."""
    bank = UnitBank([Projection(w) for w in directions])
    made = Sampler(prior, bank, energy, GUIDANCES[name](), steps, 1.0, spacing, method=method)
    made.calibrate(made.run_pilot(64, 64))
    return made


def rows(size, groups, strength=1.0, unit=0, seed=0):
    return [Row(unit, strength, seed + i) for i in range(size * groups)]


def log_z_hat(found, size):
    """log Z^ of each group: the mean of exp(log_w) over its members."""
    return found.log_w.reshape(-1, size).logsumexp(1) - math.log(size)


def chain_z(made, strength):
    """Z of the discrete chain in one dimension, by quadrature: psi_k(x) = E[psi_{k+1}(mu(x) + v z)], backwards."""
    chain, grid = made.chain, torch.linspace(-9, 9, 4001, dtype=torch.float64)
    node, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(31))
    weight, energy = weight / weight.sum(), made.energy
    level = float(made.constraint.level[0])
    last = chain.denoiser(grid[:, None], chain.indices[-1])[:, 0]
    psi = (-strength * energy(last, level)).exp()
    for k in reversed(range(len(chain) - 1)):
        c = chain.coefficients[k]
        mu = c.x0 * chain.denoiser(grid[:, None], chain.indices[k])[:, 0] + c.x * grid
        at = (mu[:, None] + c.v * node).numpy()
        psi = torch.from_numpy(np.interp(at, grid.numpy(), psi.numpy())) @ weight
    start = chain.denoiser.schedule.start_std(chain.indices[0]) * node
    return float(np.interp(start.numpy(), grid.numpy(), psi.numpy()) @ weight.numpy())


def z_score(found, size, truth):
    z = log_z_hat(found, size).exp()
    se = float(z.std()) / len(z) ** 0.5
    return (float(z.mean()) - truth) / se, se / truth


# --- Z ------------------------------------------------------------------------------------

CASES = [
    *(
        (name, threshold, TARGET)
        for name in ("dps", "calibrated", "natural", "wrong")
        for threshold in (0.0, 0.8, 1.0)
    ),
    *((name, 1.0, TARGET) for name in ("lgd", "mpgd", "moment matched", "unpushed", "late")),
    *((name, 1.0, energy) for name, energy in (("exact", LINEAR), ("mpgd", THRESHOLD))),
]


@pytest.mark.parametrize(("name", "threshold", "energy"), CASES)
def test_z_is_unbiased_with_four_particles(name, threshold, energy):
    """1000 groups against the quadrature of the same chain, whatever the twist, resampled never, sometimes or always."""
    made = sampler(name, Particles(4, threshold), energy, steps=14)
    found = made.sample(rows(4, 1000))
    score, se = z_score(found, 4, chain_z(made, 1.0))
    assert se < 0.1, f"{name}: a z-test with a standard error of {se:.2f} says nothing"
    assert abs(score) < 4, f"{name}, threshold {threshold}: {score:.1f} standard errors"
    share = (found.ancestors[:, -1] < 4).double().mean()
    assert share == 0 if threshold == 0 else share > 0.02, f"{name}: resampled in {share:.2f} of the groups"


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_particles_may_change_places_at_every_step(threshold, monkeypatch):
    """A place in the group means nothing: with everything of theirs moved along, Z^ keeps its mean and its spread."""
    made, moved = sampler("calibrated", Particles(4, threshold), TARGET, steps=14), []
    truth, weighed = chain_z(made, 1.0), Cloud.weighed
    plain = z_score(made.sample(rows(4, 1000)), 4, truth)
    generator = torch.Generator().manual_seed(0)

    def shuffled(self, beta=1.0):
        places = torch.rand(len(self.level) // 4, 4, generator=generator).argsort(1)
        moved.append(places)
        return weighed(self.index((places + 4 * torch.arange(len(places))[:, None]).flatten()), beta)

    monkeypatch.setattr(Cloud, "weighed", shuffled)
    score, se = z_score(made.sample(rows(4, 1000)), 4, truth)
    assert len(moved) == len(made.chain)
    assert abs(score) < 4, f"{score:.1f} standard errors"
    assert 0.8 < se / plain[1] < 1.25, (se, plain[1])


@pytest.mark.parametrize(
    ("name", "dimension", "energy"),
    [
        *((name, d, LINEAR) for name in ("exact", "calibrated") for d in (1, 2, 16, 64)),
        *((name, d, TARGET) for name, d in (("exact", 64), ("calibrated", 64), ("natural", 8))),
    ],
)
def test_closed_forms_of_the_mixture(name, dimension, energy):
    """log Z and mean energy within 4 standard errors over groups (and half a per cent of a chain of 40 steps)."""
    generator = torch.Generator().manual_seed(dimension)
    means = torch.randn(3, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    prior = GaussianMixture([0.5, 0.3, 0.2], means.tolist(), [0.4, 0.3, 0.6], points=200)
    w = torch.randn(dimension, generator=generator, dtype=torch.float64)
    w = (w / w.norm()).tolist()
    made = sampler(name, Particles(16), energy, prior, (w,), steps=40)
    level = float(made.constraint.level[0])
    found = made.sample(rows(16, 48, 1.5))
    z = log_z_hat(found, 16).exp()
    truth = float(prior.log_z(w, 1.5, energy, level).exp())
    error, se = float(z.mean()) / truth - 1, float(z.std()) / truth / 48**0.5
    assert abs(error) < 4 * se + 0.005, f"Z off by {error:.3f}, standard error {se:.3f}"
    mine = (found.weight * found.energy).reshape(-1, 16).sum(1)
    mean = float((z * mine).sum() / z.sum())
    se = float((z * (mine - mean)).std() / z.mean()) / 48**0.5
    exact = prior.mean_energy(w, 1.5, energy, level)
    assert abs(mean - exact) < 4 * se + 0.01, (
        f"mean energy {mean:.3f} +- {se:.3f}, {exact:.3f} in closed form"
    )
    output = found.energy.repeat_interleave(found.copies).reshape(-1, 16).mean(1)
    mean = float((z * output).sum() / z.sum())
    se = float((z * (output - mean)).std() / z.mean()) / 48**0.5
    assert abs(mean - exact) < 4 * se + 0.01, (
        f"mean energy {mean:.3f} +- {se:.3f} of the equally weighted output"
    )


def test_path_kl_bounds_the_kl_of_the_output():
    """E[-s E - log Z^] >= -l E[E] - log Z(l) for every l, E of the output; at l = s that is log Z - E[log Z^] >= 0, and
    less with more particles."""
    missing = []
    for size in (1, 4, 32):
        with pytest.warns(UserWarning, match="one particle resamples nothing") if size == 1 else _nothing():
            made = sampler("unpushed", Particles(size))
        found = made.sample(rows(size, 2048 // size, 1.5))
        for other in (0.5, 1.0, 1.5):
            above = found.weight * (found.path_kl + other * found.energy)
            above = above.reshape(-1, size).sum(1) + math.log(chain_z(made, other))
            se = float(above.std()) / len(above) ** 0.5
            assert above.mean() > -4 * se, (
                f"{size} particles, l {other}: {float(above.mean()):.3f} +- {se:.3f}"
            )
        missing.append(float(above.mean()))
    assert missing[0] > 3 * missing[1] > 9 * missing[2], missing


class _nothing:  # noqa: N801
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_an_output_particle_is_drawn_by_its_weight_wherever_it_stands():
    """Systematic resampling: floor or ceiling of G w copies, G w on average over u, under every permutation; never one of
    weight 0, up to the ends of u."""
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(5, 7, generator=generator, dtype=torch.float64) ** 3
    w[:, 2] = 0
    w /= w.sum(1, keepdim=True)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for order in (torch.arange(7), torch.randperm(7, generator=generator)):
        for one in w[:, order]:
            ancestors = systematic(one.expand(len(u), 7), u)
            copies = torch.nn.functional.one_hot(ancestors, 7).sum(1)
            assert ((copies - 7 * one).abs() < 1).all()
            torch.testing.assert_close(copies.double().mean(0), 7 * one, atol=1e-3, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert set(systematic(torch.tensor([[0.0, 1.0, 0.0]] * 2).double(), ends).flatten().tolist()) == {1}


def test_exponents_are_the_largest_that_keep_the_conditional_ess():
    generator = torch.Generator().manual_seed(0)
    log_w, rest, log_psi = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    for target in (0.2, 0.35):
        beta = exponent(log_w, 0.5 * rest, 3 * log_psi, target)
        assert 0 < beta < 1
        step = 0.5 * rest + 3 * beta * log_psi
        w, v = log_w.softmax(0), step.exp()
        assert float((w * v).sum() ** 2 / (w * v**2).sum()) == pytest.approx(target, abs=2e-3)
        assert float(conditional_ess(log_w, step)) == pytest.approx(target, abs=2e-3)
    assert exponent(log_w, 0 * rest, 0.01 * log_psi, 0.5) == 1.0
    assert exponent(log_w, -2 * log_psi, log_psi, 0.99) == 1.0, "out of reach: the nearest"
    log_w[0], rest[1] = -math.inf, math.nan
    assert 0 < exponent(log_w, 0.5 * rest, 3 * log_psi, 0.35) < 1


def test_a_tempered_twist_leaves_z_unbiased_and_more_weight_at_every_step():
    """Exponents come from a pilot of their own: they are the same for every group, alone or in a batch."""
    plain, made = (
        sampler("unpushed", Particles(16, 0.8, temper), TARGET, steps=14) for temper in (None, 0.9)
    )
    found, whole = made.sample(rows(16, 300, 3.0)), plain.sample(rows(16, 300, 3.0))
    score, se = z_score(found, 16, chain_z(made, 3.0))
    assert abs(score) < 4, f"{score:.1f} standard errors"
    assert se < 0.06
    (beta,) = made.method._found.values()
    assert 0 <= min(beta) < 0.9
    (told,) = made.method.diagnostics([made.method.recorded()])
    assert (told["unit"], told["strength"], told["exponents"]) == (0, 3.0, pytest.approx(beta))
    assert found.ess[:, :-1].amin(1).mean() > whole.ess[:, :-1].amin(1).mean() + 0.5
    fresh = sampler("unpushed", Particles(16, 0.8, 0.9), TARGET, steps=14)
    same(fresh.sample(rows(16, 2) + rows(16, 2, 3.0)), slice(32, 64), made.sample(rows(16, 2, 3.0)))


class Raised(Target):
    """E + 7."""

    def __call__(self, z, level=0.0):
        return super().__call__(z, level) + 7

    def log_tilt(self, mean, variance, strength, level=0.0):
        return super().log_tilt(mean, variance, strength, level) - 7 * strength


@pytest.mark.parametrize("name", ["dps", "calibrated", "natural", "lgd", "exact"])
def test_a_constant_in_the_energy_moves_log_z_alone(name):
    plain, raised = (
        sampler(name, Particles(8, 0.9), kind(0.8, 0.6, False)).sample(rows(8, 12, 2.0))
        for kind in (Target, Raised)
    )
    assert plain.ancestors[:, -1].min() < 8
    assert torch.equal(raised.ancestors, plain.ancestors)
    assert torch.equal(raised.copies, plain.copies)
    if name in ("dps", "calibrated"):  # the others exponentiate, which rounds the gradient
        assert torch.equal(raised.images, plain.images)
    torch.testing.assert_close(raised.log_w, plain.log_w - 14, atol=1e-9, rtol=0)
    torch.testing.assert_close(raised.path_kl, plain.path_kl, atol=1e-9, rtol=0)


def test_one_particle_is_an_independent_row():
    with pytest.warns(UserWarning, match="one particle"):
        one = sampler("calibrated", Particles(1)).sample(rows(1, 20))
    free = sampler("calibrated", Independent()).sample(rows(1, 20))
    assert torch.equal(one.images, free.images)
    assert torch.equal(one.log_w, free.log_w)
    assert (one.weight == 1).all()
    assert one.copies.tolist() == [1] * 20
    torch.testing.assert_close(one.path_kl, -(free.log_w + free.energy), msg="log dQ/dP of the path")


# --- known faults -------------------------------------------------------------------------


def test_weights_are_kept_where_nothing_is_resampled():
    """Never resampled, particles are importance sampling, to the bit."""
    for name in ("dps", "calibrated", "wrong", "late"):
        found = sampler(name, Particles(8, 0.0)).sample(rows(8, 4))
        free = sampler(name, Independent()).sample(rows(8, 4))
        assert torch.equal(found.images, free.images), name
        assert torch.equal(found.log_w, free.log_w), name


@pytest.mark.parametrize("left", ["level", "x", "memory", "shift"])
def test_what_is_not_moved_with_its_particle_is_noticed(left, monkeypatch):
    """The z-test has the power to see it: one part of the state, the twist first of all, left where it was."""
    name = {"memory": "calibrated", "shift": "mpgd"}.get(left, "exact")
    made = sampler(name, Particles(4, 1.0), TARGET, steps=16)
    truth, whole = chain_z(made, 1.5), Cloud.index

    def partial(self, at):
        out = whole(self, at)
        if left == "level":
            return dataclasses.replace(out, level=self.level)
        if left == "shift":
            return dataclasses.replace(out, guided=dataclasses.replace(out.guided, shift=self.guided.shift))
        if left == "memory":
            return dataclasses.replace(out, guided=dataclasses.replace(out.guided, memory=self.guided.memory))
        return dataclasses.replace(out, state=dataclasses.replace(out.state, x=self.state.x))

    score, _ = z_score(made.sample(rows(4, 1000, 1.5)), 4, truth)
    assert abs(score) < 4
    monkeypatch.setattr(Cloud, "index", partial)
    faulty, _ = z_score(made.sample(rows(4, 1000, 1.5)), 4, truth)
    if left in (
        "level",
        "x",
    ):  # the others are of the past: a proposal may be anything, but it is not the particle's own
        assert abs(faulty) > 6, f"{left}: {faulty:.1f} standard errors"
    assert faulty != score, left


def by_objects(made, group):
    """The same algorithm, a particle an object: what it has is copied with it, once. Groups of four."""
    chain, noise, bound = made.chain, made.parts().noise(group), made.parts().bound(group)
    size = len(group)
    state = chain.start(noise, made.guidance)
    log_z, base = 0.0, [0.0] * size
    level = [0.0] * size
    for number in range(len(chain)):
        guided = chain.estimate(state, number, noise, made.guidance, bound)
        if guided.log_psi is not None:
            level = [float(state.log_dpdq[i] + guided.log_psi[i]) for i in range(size)]
            w = np.exp(np.array(level) - base)
            if w.sum() ** 2 / (w**2).sum() < made.method.threshold * size:
                log_z += math.log(w.mean())
                ends, u = np.cumsum(w / w.sum()), float(noise.uniform("resampling", [0])[0])
                chosen = [int(np.argmax(ends > (u + i) / size)) for i in range(size)]
                people = [
                    (state.x[i], state.log_dpdq[i], state.path_kl[i], guided.x0_hat[i], guided.shift[i],
                     guided.memory.h[i], guided.memory.weight[i], level[i])
                    for i in chosen
                ]  # fmt: skip
                x, dpdq, kl, x0_hat, shift, h, weight = (
                    torch.stack([p[k] for p in people]) for k in range(7)
                )
                memory = type(guided.memory)(h, weight)
                state = type(state)(x, dpdq, kl, memory)
                guided = dataclasses.replace(guided, x0_hat=x0_hat, shift=shift, memory=memory)
                level = [p[7] for p in people]
                base = list(level)
        state, _ = chain.move(state, number, guided, noise)
    energy = -bound.read(state.x)
    return state.x, log_z + state.log_dpdq - bound.strength * energy - torch.tensor(base, dtype=torch.float64)


def test_ancestors_are_applied_once():
    """Against particles that are objects; with memory, over many resamplings."""
    made, group = sampler("calibrated", Particles(4, 1.0), steps=12), rows(4, 1, 3.0, seed=8)
    found = made.sample(group)
    x, log_w = by_objects(made, group)
    assert found.ancestors[0, -1] < 4
    torch.testing.assert_close(found.images, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.log_w, log_w, atol=1e-9, rtol=0)


def test_an_unknown_memory_is_refused_and_not_left_behind():
    state = sampler().chain.start(sampler().parts().noise(rows(4, 1)))
    zero = state.log_dpdq
    cloud = Cloud(dataclasses.replace(state, memory=object()), None, zero, zero, zero)
    with pytest.raises(TypeError, match="re-index"):
        cloud.index(torch.tensor([0, 0, 1, 2]))


# --- groups -------------------------------------------------------------------------------

WHAT = (
    "images",
    "log_w",
    "path_kl",
    "weight",
    "copies",
    "ancestor",
    "ess",
    "ancestors",
    "energy",
    "step_kl",
    "guidance_norm",
)


def same(found, at, alone, what=WHAT):
    for name in what:
        assert torch.equal(getattr(found, name)[at], getattr(alone, name)), name


@pytest.fixture(scope="module")
def tiny_unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior") / "pixel"
    write_pixel(folder)
    return load_prior(str(folder))


@pytest.mark.parametrize("name", ["dps", "lgd", "calibrated", "exact", "network"])
def test_a_group_is_the_same_to_the_bit_in_any_company(name, tiny_unet):
    """Groups of two units, three strengths and several seeds in one batch, each alone, and in another order. One of the
    units is unread at first: its twist may not depend on who else is guided."""
    size = 5
    if name == "network":
        units = [build_unit(f"bundled,class={name}") for name in ("horse", "ship")]
        made = Sampler(
            tiny_unet, UnitBank(units), Linear(), Calibrated(smoothing=1), 3, method=Particles(size, 1.0)
        )
        made.calibrate(made.run_pilot(16, 16))
    else:
        made = sampler(name, Particles(size, 0.9), TARGET, PLANE, W, 12, "log-snr")
    if name in ("calibrated", "network"):
        made.tables.slope[0, :1] = 0
        made.tables.slope[1] = made.tables.slope[1].clamp_min(0.1)
    groups = [rows(size, 1, s, u, seed) for s in (0.0, 1.0, 4.0) for u in (0, 1) for seed in (0, 15)]
    groups = [groups[0], groups[8], groups[10]] if name == "network" else groups
    together = made.sample([r for g in groups for r in g])
    assert together.ancestors[:, -1].min() < size
    backwards = made.sample([r for g in groups[::-1] for r in g])
    for k, group in enumerate(groups):
        alone = made.sample(group)
        same(together, slice(k * size, (k + 1) * size), alone)
        same(backwards, slice((len(groups) - 1 - k) * size, (len(groups) - k) * size), alone)
        assert alone.copies.sum() == size
        assert {r.seed for r in group} >= set(alone.ancestor.tolist())
        assert len(set(alone.ancestor.tolist())) == alone.ancestors[0, -1]
        assert alone.group.tolist() == [group[0].seed] * size
        assert float(alone.weight.sum()) == pytest.approx(1)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_strength_zero_is_the_base_chain_bit_by_bit(threshold):
    made = sampler("dps", Particles(4, threshold), TARGET, PLANE, W)
    free = sampler("dps", Independent(), TARGET, PLANE, W).sample(rows(4, 2, 0.0))
    for found in (made.sample(rows(4, 2, 0.0)), made.sample(rows(4, 2, 0.0) + rows(4, 2, 9.0))):
        assert torch.equal(found.images[:8], free.images)
        assert found.log_w[:8].abs().max() == found.path_kl[:8].abs().max() == 0
        assert (found.weight[:8] == 0.25).all()
        assert found.copies[:8].tolist() == [1] * 8
        assert found.group[:8].tolist() == [0] * 4 + [4] * 4
        assert (found.ancestors[:8] == 4).all()
        assert (found.ess[:8] == 4).all()


@pytest.mark.parametrize("broken", [[1], [0, 1, 2, 3]])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_particle_that_is_not_finite_has_no_weight(broken, threshold, monkeypatch):
    """Its group goes on without it, and with it again if resampled; a group of such is marked; no other group is touched."""
    made = sampler("dps", Particles(4, threshold), TARGET, PLANE, W)
    sound, whole = made.sample(rows(4, 3, 2.0)), made.chain.denoiser.posterior

    def posterior(x_t, t):
        log_r, mu, tau = whole(x_t, t)
        if t == made.chain.indices[3]:
            mu = mu.clone()
            mu[broken] = math.nan
        return log_r, mu, tau

    monkeypatch.setattr(made.chain.denoiser, "posterior", posterior)
    found = made.sample(rows(4, 3, 2.0))
    same(found, slice(4, 12), dataclasses.replace(sound, **{k: getattr(sound, k)[4:] for k in WHAT}))
    lost = len(broken) == 4 or threshold == 0
    assert found.finite.tolist() == [not (lost and i in broken) for i in range(12)]
    if len(broken) == 4:
        assert found.copies[:4].tolist() == [0] * 4
        assert not torch.isfinite(found.log_w[:4]).any()
        return
    assert torch.isfinite(log_z_hat(found, 4)).all()
    assert float(found.weight[:4].sum()) == pytest.approx(1)
    assert int(found.copies[:4].sum()) == 4
    if lost:
        assert (float(found.weight[1]), int(found.copies[1])) == (0, 0)
        others = [0, 2, 3]
        assert torch.equal(found.log_w[others], sound.log_w[others])


def test_weights_of_great_spread_do_not_overflow():
    log_w = [[1e5, 0.0, -1e5], [-1e300, -math.inf, -math.inf], [-math.inf] * 3]
    weights = Weights.of(torch.tensor(log_w, dtype=torch.float64))
    assert weights.w.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert weights.ess.tolist() == [1, 1, 0]
    assert float(weights.log_mean[0]) == 1e5 - math.log(3)


def test_a_broken_group_or_setting_is_refused():
    made = sampler("dps", Particles(4))
    for bad in (
        rows(3, 1),
        rows(4, 1)[::-1],
        rows(2, 1) + rows(2, 1, 2.0, seed=2),
        rows(4, 1)[:3] + rows(1, 1, seed=9),
    ):
        with pytest.raises(ValueError, match="whole groups of 4"):
            made.sample(bad)
    for arguments in ((0,), (4, 1.5), (4, math.nan), (4, 0.5, 1.0)):
        with pytest.raises(ValueError, match="expected"):
            Particles(*arguments)
    with pytest.raises(ValueError, match="eta > 0"):
        Sampler(LINE, UnitBank([Projection([1.0])]), LINEAR, DPS(), 5, 0.0, method=Particles(4))


# --- the command line ---------------------------------------------------------------------

CONFIG = Path(__file__).parent.parent / "configs" / "sample" / "analytic.yaml"
COMMAND = [
    f"--config={CONFIG}", "--model.steps=8", "--model.prior.init_args.points=60", "--data.strengths=[0,1,3]", "--data.n=12",
    "--model.guidance=DPS", "--model.sampler=Particles", "--model.sampler.init_args.particles=4", "--data.batch_size=6",
    "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("particles") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sample.py"])
        main([*COMMAND, f"--out={out}"])
    return RunFolder(out)


def table(folder):
    return folder.samples().drop_columns("seconds").to_pylist()


def test_rows_of_a_run_know_their_group(folder):
    assert folder.read_manifest()["identity"]["sampler"] == {
        "class": "Particles", "particles": 4, "threshold": 0.5, "temper": None,
    }  # fmt: skip
    samples = table(folder)
    assert [r["group"] for r in samples] == [0] * 4 + [4] * 4 + [8] * 4 + samples_groups(2)
    for k in range(0, len(samples), 4):
        assert sum(r["weight"] for r in samples[k : k + 4]) == pytest.approx(1)
        assert sum(r["copies"] for r in samples[k : k + 4]) == 4
    steps = folder.steps().to_pylist()
    assert all(1 <= s["ess"] <= 4 + 1e-9 and 1 <= s["ancestors"] <= 4 for s in steps)
    assert min(s["ancestors"] for s in steps) < 4


def samples_groups(times):
    return ([0] * 4 + [4] * 4 + [8] * 4) * times


def test_a_group_with_a_missing_member_is_sampled_again_as_a_whole(folder, tmp_path):
    """Half of a run, cut anywhere, is finished in other batches to the same table."""
    main([*COMMAND, "--trainer.logger=false", f"--out={tmp_path}"])
    whole = pq.read_table(tmp_path / "samples.parquet")
    gone = pc.or_(  # one row of a group, and all of another
        pc.and_(pc.equal(whole["strength"], 1), pc.equal(whole["seed"], 2)),
        pc.and_(pc.equal(whole["strength"], 3), pc.greater_equal(whole["seed"], 8)),
    )
    pq.write_table(whole.filter(pc.invert(gone)), tmp_path / "samples.parquet")
    main([*COMMAND, "--trainer.logger=false", "--data.batch_size=1", f"--out={tmp_path}"])
    done = RunFolder(tmp_path)
    timings = done.read_manifest()["timings"]
    assert (timings["rows_reused"], timings["rows_sampled"]) == (28, 8)
    assert table(done) == table(folder)


def test_ess_and_ancestors_are_curves_on_wandb(folder):
    run = Offline(folder.path)
    (x,) = [name for name in run.metrics if name.endswith("/log_snr")]
    prefix = x.removesuffix("/log_snr")
    assert prefix.endswith("/dps-8-eta1-particles4")
    for name in ("ess", "ancestors"):
        key = f"{prefix}/{name}/strength 3"
        assert run.metrics[key] == x
        logged = [h[key] for h in run.history if x in h]
        stored = [
            np.mean([s[name] for s in folder.steps().to_pylist() if s["strength"] == 3 and s["step"] == k and s["seed"] % 4 == 0])
            for k in range(8)
        ]  # fmt: skip
        assert logged == pytest.approx(stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data.n=14"], "12 or 16 fits"),
        (["--data.n=2"], "expected a multiple of 4; 4 fits, and 16 or more let errors be told"),
        (["--model.eta=0"], "expected eta > 0"),
        (["--model.sampler.init_args.threshold=2"], "threshold = 2.0"),
        (["--model.sampler.init_args.particls=2"], "Particles has no argument 'particls'. Did you mean particles?"),
        (["--model.sampler=Particels"], "unknown class 'Particels'. Did you mean Particles?"),
    ],
)  # fmt: skip
def test_user_errors_end_with_status_2_and_write_nothing(tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*COMMAND, "--trainer.logger=false", f"--out={tmp_path / 'out'}", *change]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_exponents_of_tempering_are_in_the_manifest(tmp_path):
    main([*COMMAND, "--model.sampler.init_args.temper=0.9", "--trainer.logger=false", f"--out={tmp_path}"])
    told = RunFolder(tmp_path).read_manifest()["diagnostics"]
    assert [d["strength"] for d in told] == [1.0, 3.0]
    assert all(len(d["exponents"]) == 8 and min(d["exponents"]) >= 0 for d in told)
    assert min(told[1]["exponents"]) < 1  # strength 1 may need none


def test_another_number_of_particles_is_another_run(folder, capsys):
    with pytest.raises(SystemExit):
        run_command(
            lambda: main(
                [
                    *COMMAND,
                    "--trainer.logger=false",
                    "--model.sampler.init_args.particles=2",
                    f"--out={folder.path}",
                ]
            )
        )
    assert "sampler.particles: 4 in the folder, 2 asked for" in capsys.readouterr().err
