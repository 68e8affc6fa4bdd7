"""Laws of learned guidance: multipliers are least squares that chance does not move, heads read what the clean estimate
misreads, what is learned is frozen, kept and honest, and the gap falls."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from prior_folders import write_dit, write_pixel, write_text

from tiltlens.energies import Linear, Target
from tiltlens.guidance import Calibrated, Learned
from tiltlens.guidance.guidance import Step
from tiltlens.guidance.heads import fit_heads, fit_spread, fold_of
from tiltlens.guidance.learned import Lesson
from tiltlens.guidance.learning import Shadows, hats, judge, moments, place_knots, settle, shrunk
from tiltlens.modules.command_line import run
from tiltlens.modules.sampling_cli import main
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import Particles
from tiltlens.sampling import sampler as sampler_room
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.pilot import UnitPilot
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.sampling.shadow import cast
from tiltlens.units import Projection, UnitBank

GAUSSIAN = ([1.0], [[0.4, -0.3]], [0.5])
PLANE = ([0.6, 0.4], [[-1.0, 0.2], [0.8, 0.5]], [0.3, 0.1])
W = [1.0, -0.5]
TWO = ([0.7, 0.3], [[-1.0, 0.0], [1.0, 0.0]], [0.1, 0.1])


class Misread(Projection):
    """A unit of the second mode alone: between the modes, where the clean estimate is at high noise, it is flat."""

    def read(self, x):
        return self.of(super().read(x))

    @staticmethod
    def of(y):
        return 2 * torch.sigmoid(12 * (y - 0.7))

    @classmethod
    def log_z(cls, s):
        """Under TWO along the first axis, by the trapezoid rule."""
        y = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
        density = sum(
            w * torch.exp(-((y - m[0]) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v) for w, m, v in zip(*TWO)
        )
        return math.log(float((density * torch.exp(s * cls.of(y))).sum() * (y[1] - y[0])))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taught(guidance, prior=PLANE, units=(W,), steps=20, pilot=256, energy=None) -> Sampler:
    """Calibrated and ready."""
    units = [u if isinstance(u, Projection) else Projection(u) for u in units]
    made = Sampler(GaussianMixture(*prior), UnitBank(units), energy or Linear(False), guidance, steps)
    made.calibrate(made.run_pilot(pilot, 64))
    return made


def gap(made, s, log_z, n=1500):
    found = made.sample([Row(0, s, seed) for seed in range(n)])
    return found.path_kl + s * found.energy + log_z


def mean_se(x):
    return float(x.mean()), float(x.std()) / len(x) ** 0.5


# --- multipliers -------------------------------------------------------------------------

STEPS, LEVELS = 30, torch.linspace(-6, 8, 30, dtype=torch.float64)


def synthetic(multipliers, n, noise=1.0, seed=0, candidates=3):
    """Shadows whose a is sum_tj m_tj y_tj.z_t + noise; candidates overlap by a half. The head's column is empty."""
    z, own, common = normal(STEPS, n, 4, seed=seed), normal(STEPS, n, candidates, 4, seed=seed + 1), normal(STEPS, n, 1, 4, seed=seed + 2)  # fmt: skip
    y = (own + common) / 8
    y = torch.cat([y, 0 * y[:, :, :1]], 2)
    d = (y * z[:, :, None]).sum(3)
    a = (multipliers[:, None] * d[..., :candidates]).sum((0, 2)) + noise * normal(n, seed=seed + 3)
    return Shadows(d, torch.einsum("tncd,tned->tnce", y, y), a, torch.zeros(STEPS, n, dtype=torch.float64))


def settled(shadows, slope=None, variance=None):
    slope = torch.ones(STEPS, dtype=torch.float64) if slope is None else slope
    off = torch.zeros(STEPS, dtype=torch.bool)
    return settle(shadows, slope, 0 * slope, LEVELS, off, variance or float(shadows.a.var()))


def planted(scale, blend, tilt):
    """m_tj = scale (default (1 + tilt x_t), blend, 0), x_t from -1 to 1."""
    x = torch.linspace(-1, 1, STEPS, dtype=torch.float64)
    return scale * torch.stack([1 + tilt * x, blend + 0 * x, 0 * x], 1)


@pytest.mark.parametrize(("scale", "blend", "tilt"), [(1.0, 0.0, 0.0), (0.6, 0.0, 0.8), (0.8, 0.7, 0.0), (1.3, -0.4, -0.6)])  # fmt: skip
def test_a_planted_profile_is_recovered(scale, blend, tilt):
    """Within what 1200 trajectories tell, and the efficiency of the fit is that of the planted multipliers."""
    truth = planted(scale, blend, tilt)
    shadows = synthetic(truth, 1200)
    m = settled(shadows)
    found = hats(LEVELS, m.knots) @ m.theta
    off = (found[:, :3] - truth).abs().max()
    assert off < 0.25, f"off by {off:.2f}: {found[:, :3].T.tolist()}"
    told = m.found[m.kind]
    explained = 1 - 1 / float(shadows.a.var())
    assert abs(told.efficiency - explained) < 4 * told.efficiency_se + 0.02, (
        f"{told}, planted {explained:.3f}"
    )
    if (scale, blend, tilt) != (1.0, 0.0, 0.0):
        assert m.kind == "multipliers"
        assert told.left < m.found["default"].left


def test_chance_moves_nothing():
    """The default is the truth: over 60 pilots of 64 each block is left alone in all but a few, and then hardly moved."""
    kappas, thetas = [], []
    for seed in range(60):
        m = settled(synthetic(planted(1.0, 0.0, 0.0), 64, seed=10 * seed))
        kappas.append(m.kappa)
        thetas.append((m.theta[:, 0] - 1).abs().max())
    kept = (torch.stack(kappas) > 0).double().mean(0)
    assert kept.max() < 0.2, f"blocks moved by chance: {kept.tolist()}"
    assert torch.stack(thetas).median() == 0


def test_what_a_block_is_shrunk_by_is_its_own_error():
    """kappa = 1 - tr V / |x|^2 in one dimension: 1 - 1/t^2, and 0 below the threshold."""
    for t_wanted, n in ((1.0, 50), (4.0, 50), (10.0, 400)):
        noise = normal(n)
        noise = (noise - noise.mean()) / noise.std()
        off = (t_wanted / n**0.5 + noise)[:, None]
        one = torch.ones(1, dtype=torch.float64)
        theta, kappa = shrunk(
            off.mean(0), torch.cov(off.T).reshape(1, 1) / n, one[:, None], one, [one[:, None]]
        )
        expected = 1 - 1 / t_wanted**2 if t_wanted > 2 else 0.0
        assert float(kappa) == pytest.approx(expected, abs=1e-6)
        assert float(theta) == pytest.approx(1 + expected * t_wanted / n**0.5, abs=1e-6)


def test_candidates_that_are_one_and_the_same_are_no_trouble():
    """On a Gaussian with a linear unit all memories give one gradient: G is singular, and the default stays what it is."""
    shadows = synthetic(planted(0.7, 0.0, 0.0)[:, :1], 400, candidates=1)
    twice = Shadows(
        shadows.d[:, :, [0, 0, 0, 1]],
        shadows.gram[:, :, [0, 0, 0, 1]][..., [0, 0, 0, 1]],
        shadows.a,
        shadows.u,
    )
    m = settled(twice)
    assert torch.isfinite(m.theta).all()
    assert abs(float((hats(LEVELS, m.knots) @ m.theta).sum(1).mean()) - 0.7) < 0.15


def test_hats_sum_to_one_and_stand_on_the_steps_that_are_used():
    used = LEVELS > -2
    knots = place_knots(LEVELS, used)
    basis = hats(LEVELS, knots)
    torch.testing.assert_close(basis.sum(1), torch.ones(STEPS, dtype=torch.float64))
    assert float(knots[0]) == pytest.approx(float(LEVELS[used][0]))
    assert (basis >= 0).all()
    assert hats(LEVELS, place_knots(LEVELS, LEVELS > 7.9)).shape == (STEPS, 1)


def test_efficiency_has_no_unit_and_its_error_is_right():
    """Scale of gain and of a drop out; over 300 pilots the standard error is the spread."""
    m, told = planted(1.0, 0.3, 0.5), []
    for seed in range(300):
        shadows = synthetic(m, 60, seed=7 * seed)
        gain = (shadows.a[None] * (m[:, None] * shadows.d[..., :3]).sum(2)).sum(0)
        cost = torch.einsum("tnce,tc,te->n", shadows.gram[..., :3, :3], m, m)
        told.append(judge(gain, cost, 1 + float(cost.mean())))
        again = judge(3 * gain, 9 * cost, 1 + float(cost.mean()))
        assert again.efficiency == pytest.approx(told[-1].efficiency)
    values, errors = torch.tensor([t.efficiency for t in told]), torch.tensor([t.efficiency_se for t in told])
    assert abs(float(values.std() / errors.mean()) - 1) < 0.25
    truth = float((m[..., None] * m[:, None] * (torch.eye(3).double() + 1) * 4 / 64).sum())
    assert abs(float(values.mean()) - truth / (1 + truth)) < 4 * float(values.std()) / 300**0.5 + 0.02


# --- shadows -----------------------------------------------------------------------------


def test_shadows_follow_the_pilot_and_the_baseline_is_unbiased():
    """Their samples are the pilot's; with and without a - c_t - rho_t u_t the same b within the error, and less noise."""
    made = taught(Learned(shadows=512, head=False), pilot=512)
    tables, (unit,) = made.tables, made.bank.units
    seen = cast(made.guidance, made.chain, made.constraint, tables, 0, None, 512, dtype=torch.float64)
    torch.testing.assert_close(seen.a, made.pilots[0].members[:, 0].double(), atol=1e-6, rtol=1e-6)
    assert unit.size == 1
    steps = seen.d.shape[0]
    slope, intercept = tables.slope[0, :steps], tables.intercept[0, :steps]
    scale, basis = slope[:, None].expand(-1, seen.d.shape[2]), torch.ones(steps, 1, dtype=torch.float64)
    plain, _ = moments(seen, (seen.a - seen.a.mean()).expand(steps, -1), scale, basis)
    less, _ = moments(seen, seen.a - intercept[:, None] - slope[:, None] * seen.u, scale, basis)
    value, se = mean_se((less - plain)[:, 0])
    assert abs(value) < 4 * se, f"the baseline moves b by {value:.3f} +- {se:.3f}"
    assert less[:, 0].var() < plain[:, 0].var()


@pytest.mark.parametrize("finite", [False, True])
def test_shadows_of_the_default_are_what_calibrated_would_do(finite):
    """At a small strength the shift of Calibrated is s rho_t times the first column, its path KL s^2/2 the cost."""
    made, s = taught(Learned(head=False, shadows=32, finite=finite), pilot=64), 1e-3
    seen = cast(made.guidance, made.chain, made.constraint, made.tables, 0, None, 32, dtype=torch.float64)
    slope = made.tables.slope[0, :-1, None]
    cost = (slope**2 * seen.gram[:, :, 0, 0]).sum(0)
    guided = Calibrated(law="natural", finite=finite)
    guided.prepare(made.tables, made.prior, made.constraint)
    rows = made.constraint.rows(torch.zeros(32, dtype=torch.long), torch.full((32,), s, dtype=torch.float64))
    noise = Noise(range(32), (2,), dtype=torch.float64, domain="pilot")
    for state, _ in made.chain.run(noise, guided, rows):  # noqa: B007
        pass
    torch.testing.assert_close(state.path_kl / (s**2 / 2), cost, rtol=0.02, atol=0.02 * float(cost.mean()))


def test_on_a_gaussian_the_optimum_is_all_there_is():
    """Everything is linear: efficiency about 1, and with short steps Calibrated's multipliers are nearly right."""
    made = taught(Learned(shadows=512), GAUSSIAN, steps=60, pilot=512)
    (told,) = made.guidance.outcome()
    value, se = told["efficiency_after"]
    assert abs(value - 1) < 4 * se, told
    assert se < 0.1
    share = made.guidance._multipliers[0, :, :-1].sum(1)
    assert (share - 1).abs().max() < 0.35, share.tolist()
    assert abs(told["gap_after"][0]) < 4 * told["gap_after"][1]


# --- heads -------------------------------------------------------------------------------


def test_a_head_that_is_there_is_found_and_one_that_is_not_is_not():
    steps, count, width = 8, 256, 20
    phi = 3 + normal(steps, count, width)
    w = torch.zeros(width, dtype=torch.float64)
    w[:3] = torch.tensor([0.5, -0.4, 0.3])
    there = 0.6 * normal(steps, count, seed=1) + (phi - 3) @ w
    residual = torch.stack([there - there.mean(1, keepdim=True), normal(steps, count, seed=2)])
    heads = fit_heads(phi, residual, fold_of(count))
    explained = float(w @ w) / (float(w @ w) + 0.36)
    assert (heads.gain[0] - explained).abs().max() < 0.1, heads.gain[0]
    torch.testing.assert_close(heads.weight[0], w.expand(steps, -1), atol=0.12, rtol=0)
    value = (heads.weight[0][:, None] * phi).sum(2) + heads.offset[0][:, None]
    assert float((there - value).var()) == pytest.approx(0.36, rel=0.15)
    assert float(heads.gain[1].max()) < 0.02
    assert (heads.gain[1] > 0).sum() <= 1
    assert heads.weight[1][heads.gain[1] == 0].abs().sum() == 0


def test_the_head_of_a_fold_never_saw_its_trajectories():
    phi, residual = normal(3, 64, 5), normal(1, 3, 64, seed=1) + normal(3, 64, 5).sum(2)
    fold = fold_of(64)
    changed = residual.clone()
    changed[..., fold == 2] += 0.3 * normal(1, 3, 16, seed=2)
    one, two = fit_heads(phi, residual, fold), fit_heads(phi, changed, fold)
    assert torch.equal(one.fold_weight[2], two.fold_weight[2])
    assert not torch.equal(one.fold_weight[1], two.fold_weight[1])


def test_a_spread_that_is_there_is_found_and_one_that_is_not_is_not():
    """Residuals of variance r^2 (1 + v.phi) where phi has mean 0, with a mean that the first head takes away."""
    steps, count, width = 6, 2048, 8
    phi = normal(steps, count, width).clamp(-2, 2)
    v = torch.zeros(width, dtype=torch.float64)
    v[0] = 0.4
    wide = normal(steps, count, seed=1) * (1 + phi @ v).sqrt() + phi[..., 1]
    residual = torch.stack([wide, normal(steps, count, seed=2)])
    fold = fold_of(count)
    found = fit_spread(phi, residual, fold, fit_heads(phi, residual, fold))
    assert (found.gain[0] > 0).all()
    torch.testing.assert_close(found.weight[0], v.expand(steps, -1), atol=0.12, rtol=0)
    assert (found.gain[1] > 0).sum() <= 1


@pytest.mark.parametrize("kind", ["pixel", "text", "dit"])
def test_features_come_with_the_same_forward(kind, tmp_path):
    """x0_hat to the bit, finite features of x_t, the same in any batch, with a gradient."""
    {"pixel": write_pixel, "text": write_text, "dit": write_dit}[kind](tmp_path)
    denoiser = load_prior(str(tmp_path)).denoiser
    t = 10
    x = normal(5, *denoiser.shape).float()
    calls = []
    handle = denoiser.network.register_forward_hook(lambda *_: calls.append(0))
    x0_hat, phi = denoiser.with_features(x, t)
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(x0_hat, denoiser(x, t))
    assert phi.shape == (5, {"pixel": 32, "text": 32, "dit": 16}[kind])
    assert torch.equal(denoiser.with_features(x[3:4], t)[1], phi[3:4])
    assert phi.std(0).min() > 0
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(denoiser.with_features(leaf, t)[1][0].sum(), leaf)
    assert g[0].abs().max() > 0
    assert g[1:].abs().max() == 0


# --- the guidance ------------------------------------------------------------------------


def test_the_default_is_calibrated():
    """Untaught, or where the pilot tells no better, to rounding."""
    learned, calibrated = (
        taught(Learned(redraws=2)),
        taught(Calibrated(redraws=2, finite=False, blend=1.0)),
    )
    learned.guidance.adopt([Lesson.default(20, len(learned.guidance.candidates) + 1)])
    rows = [Row(0, 1.0, seed) for seed in range(8)]
    one, two = learned.sample(rows), calibrated.sample(rows)
    for what in ("images", "log_w", "path_kl"):
        torch.testing.assert_close(getattr(one, what), getattr(two, what), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("s", [0.5, 1.0])
def test_learned_multipliers_lower_the_gap(s):
    """At 20 steps a Tweedie shift over-tilts; closed-form log Z; predicted before and after with an honest error."""
    prior = GaussianMixture(*PLANE)
    log_z = float(prior.log_z(W, s))
    learned = taught(Learned(head=False))
    tweedie = Calibrated(law="gaussian", finite=False, blend=1.0)
    before, after = gap(taught(tweedie), s, log_z), gap(learned, s, log_z)
    value, se = mean_se(before - after)
    assert value > 4 * se, f"the gap falls by {value:.3f} +- {se:.3f}"
    value, se = mean_se(after)
    assert value > -4 * se
    (told,) = learned.guidance.outcome()
    assert told["gap_after"][0] < told["gap_before"][0]
    assert told["kappa"]["scale"] > 0


def test_a_head_lowers_the_gap_of_a_unit_that_the_clean_estimate_misreads():
    """The same seeds, Calibrated, multipliers alone and with the head; predicted efficiencies in the same order."""
    unit, s = Misread([1.0, 0.0]), 1.0
    made = [
        taught(g, TWO, [unit], 40, 512) for g in (Calibrated(), Learned(head=False), Learned(shadows=512))
    ]
    gaps = [gap(m, s, Misread.log_z(s), 1000) for m in made]
    for other, name in zip(gaps, ("Calibrated", "multipliers")):
        value, se = mean_se(other - gaps[2])
        assert value > 4 * se, f"against {name} the gap falls by {value:.3f} +- {se:.3f}"
    assert mean_se(gaps[2])[0] > -4 * mean_se(gaps[2])[1]
    (told,) = made[2].guidance.outcome()
    assert told["learned"] == "head"
    assert told["headed_steps"] > 3
    assert told["efficiency_after"][0] > told["efficiency_before"][0] + 3 * told["efficiency_after"][1]


def test_a_spread_lowers_the_gap_of_a_target_energy():
    """Between two modes a(x_0) is wide, at one of them narrow; the twist of a target depends on which."""
    prior, energy, s = GaussianMixture(*TWO), Target(1.0, 0.5, False), 1.0
    log_z = float(prior.log_z([1.0, 0.0], s, energy, 1.0))
    plain, wide = (
        gap(taught(Learned(shadows=64, law="gaussian", spread=x), TWO, [[1.0, 0.0]], 40, 512, energy), s, log_z, 400)
        for x in (False, True)
    )  # fmt: skip
    value, se = mean_se(plain - wide)
    assert value > 4 * se, f"the gap falls by {value:.3f} +- {se:.3f}"
    assert mean_se(wide)[0] > -4 * mean_se(wide)[1]


def headed() -> Sampler:
    units = [Misread([1.0, 0.0]), Projection([0.3, 0.8])]
    return taught(Learned(shadows=128, spread=True), TWO, units, 20, 256)


def test_the_mean_weight_is_z_with_a_head():
    made, s = headed(), 0.5
    assert (made.guidance._weight[0] != 0).any()
    assert (made.guidance._wide[0] != 0).any()
    found = made.sample([Row(0, s, seed) for seed in range(3000)])
    w = (found.log_w - Misread.log_z(s)).exp()
    value, se = mean_se(w)
    assert abs(value - 1) < 4 * se, f"mean weight {value:.3f} +- {se:.3f} Z"


def test_rows_with_a_head_and_without_never_meet():
    """Two units, several strengths, any batch: the same to rounding, which products of matrices owe to their size; strength 0 is the base chain."""
    made = headed()
    rows = [Row(i % 2, (0.0, 0.5, 2.0)[i % 3], 7 * i) for i in range(16)]
    whole = made.sample(rows)
    for size in (1, 3):
        parts = [made.sample(rows[i : i + size]) for i in range(0, 16, size)]
        for what in ("images", "log_w", "path_kl"):
            one_by_one = torch.cat([getattr(p, what) for p in parts])
            torch.testing.assert_close(
                one_by_one, getattr(whole, what), rtol=1e-12, atol=1e-12, msg=lambda m, w=what: f"{w}: {m}"
            )
    free = made.sample([Row(r.unit, 0.0, r.seed) for r in rows])
    still = [i for i, r in enumerate(rows) if r.strength == 0]
    assert torch.equal(free.images[still], whole.images[still])
    assert whole.path_kl[still].abs().max() == 0


def test_log_psi_is_that_of_clean_estimate_and_head():
    """log tilt of N(c + rho u + w.x + o, r^2 (1 - gain)), at a step with a head."""
    made, energy = (
        taught(
            Learned(shadows=128, law="gaussian"), TWO, [Misread([1.0, 0.0])], 20, 256, Target(1.5, 0.5, False)
        ),
        1.5,
    )
    g, tables = made.guidance, made.tables
    number = int((g._weight[0] != 0).any(1).nonzero()[-1])
    x = normal(3, 2)
    rows = made.constraint.rows(torch.zeros(3, dtype=torch.long), torch.full((3,), 0.7, dtype=torch.float64))
    where = Step(number, made.chain.indices[number], made.chain.denoiser.schedule, False, None)
    out = g(made.chain.denoiser, x, where, rows, g.start(x))
    u = Misread.of(made.chain.denoiser(x, where.t)[:, 0])
    mean = (
        tables.intercept[0, number]
        + tables.slope[0, number] * u
        + x @ g._weight[0, number]
        + g._offset[0, number]
    )
    expected = made.constraint.energy.log_tilt(mean, g._residual[0, number].expand(3), rows.strength, energy)
    torch.testing.assert_close(out.log_psi, expected)
    assert g._residual[0, number] < tables.residual_variance[0, number]


def test_units_are_learned_one_by_one():
    both = taught(Learned(), units=(W, [0.3, 0.8]))
    for i, w in enumerate((W, [0.3, 0.8])):
        alone = taught(Learned(), units=(w,))
        torch.testing.assert_close(both.lessons[i].theta, alone.lessons[0].theta)
        torch.testing.assert_close(both.lessons[i].found, alone.lessons[0].found, equal_nan=True)


def test_every_smoothing_is_a_candidate(tmp_path):
    """[2, 4]: the default's two views, and one column more, which is the default of four views to the bit."""
    write_pixel(tmp_path)
    prior, unit = load_prior(str(tmp_path)), Projection(normal(192).div(14).tolist())
    seen = {}
    for views in ([2, 4], 4):
        made = Sampler(prior, UnitBank([unit]), Linear(), Learned(smoothing=views, head=False, shadows=32), 4)
        made.calibrate(made.run_pilot(32, 32), lessons=[Lesson.default(4, len(made.guidance.candidates) + 1)])
        slope = torch.ones_like(made.tables.slope)  # a random prior has none
        tables = dataclasses.replace(made.tables, slope=slope)
        seen[str(views)] = cast(made.guidance, made.chain, made.constraint, tables, 0, None, 8)
    both, four = seen["[2, 4]"].d, seen["4"].d
    assert both.shape[2] == four.shape[2] + 1
    assert torch.equal(both[:, :, -2], four[:, :, 0])
    assert not torch.equal(both[:, :, 0], four[:, :, 0])
    with pytest.raises(ValueError, match="different smoothings"):
        Learned(smoothing=[2, 2])


def test_broken_trajectories_teach_nothing():
    made = taught(Learned(shadows=32), pilot=64)
    (pilot,) = made.pilots
    members, path = pilot.members.clone(), pilot.path.clone()
    members[5] = path[3:, 5] = float("nan")
    made.calibrate([UnitPilot(members, path, pilot.features)])
    assert torch.isfinite(made.lessons[0].theta).all()


def test_what_it_needs_is_asked_for():
    with pytest.raises(ValueError, match="at least 32"):
        Learned(shadows=8)
    made = Sampler(GaussianMixture(*PLANE), UnitBank([Projection(W)]), Linear(False), Learned(), 10)
    with pytest.raises(ValueError, match="pilot"):
        made.calibrate(None)
    with pytest.raises(ValueError, match="at least 32 trajectories"):
        made.calibrate(made.run_pilot(16, 16))
    bare = [UnitPilot(p.members, p.path) for p in made.run_pilot(32, 32)]
    with pytest.raises(ValueError, match="features"):
        made.calibrate(bare)
    still = Sampler(GaussianMixture(*PLANE), UnitBank([Projection(W)]), Linear(False), Learned(), 10, eta=0.0)
    with pytest.raises(ValueError, match="eta > 0"):
        still.calibrate(still.run_pilot(32, 32))


# --- a run -------------------------------------------------------------------------------

ARGUMENTS = [
    f"--config={Path(__file__).parent.parent / 'configs' / 'sample' / 'analytic.yaml'}", "--model.steps=10", "--model.prior.init_args.points=60",
    "--model.guidance=Learned", "--model.pilot=64", "--data.strengths=[0,1]", "--data.n=8", "--data.batch_size=8",
    "--trainer.accelerator=cpu", "--trainer.logger=false",
]  # fmt: skip


def test_a_run_learns_once_and_goes_on_with_what_it_learned(tmp_path, monkeypatch):
    """The second call learns nothing and its rows are those of a run of one call, to the bit."""
    calls, learn = [], sampler_room.learn
    monkeypatch.setattr(sampler_room, "learn", lambda *a, **k: calls.append(0) or learn(*a, **k))
    main([*ARGUMENTS, f"--out={tmp_path / 'one'}", "--data.n=4"])
    main([*ARGUMENTS, f"--out={tmp_path / 'one'}"])
    assert len(calls) == 1
    main([*ARGUMENTS, f"--out={tmp_path / 'two'}"])
    one, two = (
        {
            (r["strength"], r["seed"]): (r["activation"], r["log_w"])
            for r in RunFolder(tmp_path / n).samples().to_pylist()
        }
        for n in ("one", "two")
    )
    assert one == two
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    (told,) = manifest["learned"].values()
    assert told["shadows"] == 64
    assert {
        "learned",
        "kappa",
        "theta",
        "efficiency_before",
        "efficiency_after",
        "gap_before",
        "gap_after",
    } <= told.keys()
    assert manifest["guidance"]["shadows"] == 128
    # stopped between pilot and lesson: learned again from the same pilot
    (lesson,) = (tmp_path / "two" / "pilot").glob("*.learned.safetensors")
    before = lesson.read_bytes()
    lesson.unlink()
    main([*ARGUMENTS, f"--out={tmp_path / 'two'}"])
    assert lesson.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [("--model.pilot=0", "needs a pilot"), ("--model.pilot=16", "at least 32 trajectories"), ("--model.eta=0", "eta > 0"),
     ('--model.guidance={"class_path":"Learned","init_args":{"shadows":4}}', "shadows must be at least 32")],
)  # fmt: skip
def test_a_run_that_cannot_learn_ends_with_status_2(tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([*ARGUMENTS, f"--out={tmp_path / 'out'}", change]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_particles_carry_its_memories():
    """Memory of every candidate goes with its particle: E[Z^] = Z over 150 groups of 8, resampled at every step."""
    s, prior = 1.0, GaussianMixture(*PLANE)
    bank = UnitBank([Projection(W)])
    made = Sampler(prior, bank, Target(1.5, 0.7, False), Learned(shadows=32), 12, method=Particles(8, 1.0))
    made.calibrate(made.run_pilot(64, 64))
    found = made.sample([Row(0, s, seed) for seed in range(1200)])
    z = found.log_w.exp().reshape(-1, 8).mean(1)
    value, se = mean_se(z / float(prior.log_z(W, s, Target(1.5, 0.7, False), 1.5).exp()))
    assert abs(value - 1) < 4 * se, f"mean Z^ {value:.3f} +- {se:.3f} Z"
    assert se < 0.1


def test_a_head_on_a_network_is_the_same_in_any_batch(tmp_path):
    """Features of a UNet steer, one forward a step; rows are the same to the bit alone, and strength 0 is not steered."""
    write_pixel(tmp_path)
    units = [Projection(normal(192, seed=i).div(14).tolist()) for i in range(2)]
    made = Sampler(load_prior(str(tmp_path)), UnitBank(units), Linear(), Learned(smoothing=1, shadows=32), 5)
    made.calibrate(made.run_pilot(32, 32))
    rows = [Row(i % 2, (0.0, 1.0, 2.0)[i % 3], i) for i in range(6)]
    unsteered = made.sample(rows)
    head = 0.3 * normal(5, 32, seed=9)
    made.guidance.adopt([dataclasses.replace(made.lessons[0], weight=head), made.lessons[1]])
    made.guidance._multipliers[0, :, -1] = 1.0
    whole = made.sample(rows)
    for i, row in enumerate(rows):
        alone = made.sample([row])
        assert torch.equal(alone.images[0], whole.images[i]), row
        assert alone.path_kl[0] == whole.path_kl[i]
        moved = row.unit == 0 and row.strength > 0
        assert torch.equal(unsteered.images[i], whole.images[i]) != moved, row


def test_another_run_takes_pilot_and_lessons_from_the_cache(tmp_path, monkeypatch):
    """Of the same prior, unit, chain and guidance; another number of steps has its own. Rows are those of a run without a cache."""
    calls, learn = [], sampler_room.learn
    monkeypatch.setattr(sampler_room, "learn", lambda *a, **k: calls.append(0) or learn(*a, **k))
    cached = [*ARGUMENTS, f"--model.cache={tmp_path / 'cache'}"]
    main([*ARGUMENTS, f"--out={tmp_path / 'plain'}"])
    main([*cached, f"--out={tmp_path / 'one'}"])
    assert len(calls) == 2
    main([*cached, f"--out={tmp_path / 'two'}", "--data.seed=100"])
    assert len(calls) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    main([*cached, f"--out={tmp_path / 'three'}", "--model.steps=12"])
    assert len(calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    main([*cached, f"--out={tmp_path / 'four'}"])
    assert len(calls) == 4
    plain, one, four = (RunFolder(tmp_path / n).samples() for n in ("plain", "one", "four"))
    assert plain["log_w"] == one["log_w"] == four["log_w"]
