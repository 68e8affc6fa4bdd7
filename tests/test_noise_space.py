"""Laws of the referee: walks in noise space reach q_s of the discrete chain itself, with no gradient."""

import math

import numpy as np
import pytest
import torch
from chain_oracle import law_of, law_without_noise
from prior_folders import write_pixel
from test_wandb_curve import Offline

from tiltlens.api import tilt
from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import DPS
from tiltlens.modules.reweight import reweight_run
from tiltlens.modules.sampling_cli import main
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import NoiseSpace
from tiltlens.sampling.autocorrelation import autocorrelation_time
from tiltlens.sampling.chain_sampler import Parts
from tiltlens.sampling.equilibrium import equilibrium
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.noise_walk import NoiseMap, Point
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank

LINE = ([0.6, 0.4], [[-1.0], [1.2]], [0.3, 0.15])
ENERGIES = {"linear": (Linear(False), 0.0), "target": (Target(1.5, 0.6, False), 1.5)}
each_energy = pytest.mark.parametrize("energy", ENERGIES)
each_eta = pytest.mark.parametrize("eta", [0.0, 1.0])


def made(energy=None, steps=6, eta=1.0, prior=None, directions=((1.0,),), method=None) -> Sampler:
    """Calibrated and ready."""
    bank = UnitBank([Projection(list(w)) for w in directions])
    sampler = Sampler(
        prior or GaussianMixture(*LINE), bank, energy or Linear(False), DPS(), steps, eta, method=method or NoiseSpace(6, 1, 2)
    )  # fmt: skip
    sampler.calibrate(None)
    return sampler


def parts(sampler: Sampler) -> Parts:
    return Parts(sampler.prior, sampler.chain, sampler.constraint, sampler.guidance, "cpu", sampler.dtype)


def oracle(sampler: Sampler):
    return law_without_noise(sampler.chain) if sampler.chain.eta == 0 else law_of(sampler.chain, 5.5)


def rows(n: int, strength: float, unit: int = 0, first: int = 0) -> list[Row]:
    return [Row(unit, strength, first + i) for i in range(n)]


def within(values: torch.Tensor, truth: float, what: str, truth_se: float = 0.0) -> None:
    se = math.hypot(float(values.std()) / len(values) ** 0.5, truth_se)
    off = (float(values.mean()) - truth) / se
    assert abs(off) < 4, f"{what}: {float(values.mean()):.4f} +- {se:.4f}, truth {truth:.4f}"


# --- the law -----------------------------------------------------------------------------


@each_energy
@each_eta
def test_weights_are_exact_for_the_law_of_the_chain(energy, eta):
    """E_Q[w] = Z and E_Q[w f] = Z E_{q_s}[f], further moves included; path_kl is an upper bound with a gap >= 0."""
    e, level = ENERGIES[energy]
    sampler, s = made(e, eta=eta), 1.0
    found, base = sampler.sample(rows(2000, s)), oracle(sampler)
    at = lambda x: e(x, level)  # noqa: E731
    log_z, optimum = base.log_z(at, s), base.tilted(at, s)
    w = (found.log_w - log_z).exp()
    assert found.finite.all()
    assert w.sum() ** 2 / w.square().sum() > 0.2 * len(w), f"{energy}: few weights count"
    within(w, 1.0, f"{energy}, eta {eta}: w / Z")
    for what, f in (("x", lambda x: x), ("E", at), ("cos 3x", lambda x: (3 * x).cos())):
        within(w * (f(found.images[:, 0]) - optimum.mean(f)), 0.0, f"{energy}, eta {eta}: weighted {what}")
    assert torch.equal(found.path_kl, -(found.log_w + s * found.energy))
    gap = float(found.path_kl.mean() + s * found.energy.mean()) + log_z
    se = float(found.log_w.std()) / len(w) ** 0.5
    assert -4 * se < gap < 1, f"{energy}, eta {eta}: gap {gap:.3f} +- {se:.3f}"
    kl = -s * optimum.mean(at) - log_z
    assert found.path_kl.mean() > kl - gap - 4 * float(found.path_kl.std()) / len(w) ** 0.5


def test_a_longer_ladder_closes_the_gap():
    """The walk comes to equilibrium: gap = KL(Q||R) -> 0, path_kl -> KL(q_s||p)."""
    e, level = ENERGIES["target"]
    gaps = []
    for levels in (4, 16, 64):
        sampler = made(e, method=NoiseSpace(levels, 1, 0))
        log_z = oracle(sampler).log_z(lambda x: e(x, level), 1.0)
        gaps.append(log_z - float(sampler.sample(rows(400, 1.0)).log_w.mean()))
    assert gaps[0] > gaps[1] > gaps[2], gaps
    assert gaps[2] < 0.15, gaps


@each_energy
@pytest.mark.parametrize("d", [2, 16, 64])
def test_log_z_in_more_dimensions(energy, d):
    """Truth: 40,000 unguided samples of the same chain, re-weighted."""
    e, _ = ENERGIES[energy]
    g = torch.Generator().manual_seed(d)
    means = torch.randn(3, d, generator=g).mul(0.6).tolist()
    w = torch.randn(d, generator=g)
    direction = (w / w.norm()).tolist()
    sampler, s = (
        made(e, prior=GaussianMixture([0.5, 0.3, 0.2], means, [0.3, 0.5, 0.2]), directions=[direction]),
        0.7,
    )
    n = 40_000
    space = NoiseMap(sampler.chain, parts(sampler).bound(rows(n, s)))
    free = (-s * space(torch.randn(n, space.draws, d, generator=g, dtype=torch.float64)).energy).exp()
    z, se = float(free.mean()), float(free.std()) / n**0.5
    found = sampler.sample(rows(1000, s))
    within(found.log_w.exp() / z, 1.0, f"{energy}, dimension {d}: w / Z", se / z)
    within(
        found.log_w.exp() * found.energy,
        float(-free @ free.log() / (s * n)),
        f"{energy}, dimension {d}: w E",
        se,
    )


@each_eta
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_move_leaves_q_s_as_it_is(beta, eta):
    """From an exact sample of q_s, re-drawn from many, the moments stay, and the sample does not."""
    e, level = ENERGIES["target"]
    sampler, s, n = made(e, eta=eta), 1.5, 3000
    g = torch.Generator().manual_seed(1)
    pool = NoiseMap(sampler.chain, parts(sampler).bound(rows(40_000, s)))
    free = pool(torch.randn(40_000, pool.draws, 1, generator=g, dtype=torch.float64))
    taken = torch.multinomial((-s * free.energy).softmax(0), n, generator=g)
    point = Point(*(x[taken] for x in vars(free).values()))
    space = NoiseMap(sampler.chain, parts(sampler).bound(rows(n, s)))
    noise, start, moved = space.noise(range(n), "cpu", torch.float64), point, 0.0
    strength, step = torch.full((n,), s).double(), torch.full((n,), beta).double()
    for _ in range(4):
        point, move = space.move(point, strength, step, noise)
        moved += float(move.accepted.double().mean()) / 4
    assert moved > 0.2
    assert (point.x_0 != start.x_0).double().mean() > 0.4
    optimum = oracle(sampler).tilted(lambda x: e(x, level), s)
    x = point.x_0[:, 0]
    for what, f in (("x", lambda x: x), ("x^2", lambda x: x**2), ("E", lambda x: e(x, level)), ("P(x > 1)", lambda x: (x > 1).double())):  # fmt: skip
        within(f(x), optimum.mean(f), f"beta {beta}, eta {eta}: {what}")


def test_beta_one_is_independent_metropolis():
    """The proposal forgets where it came from; it is taken with probability min(1, exp(-s (E' - E)))."""
    sampler, s, n = made(), 2.0, 64
    space = NoiseMap(sampler.chain, parts(sampler).bound(rows(n, s)))
    make = lambda: space.noise(range(n), "cpu", torch.float64)  # noqa: E731
    eta = make().proposal()
    ones, strength = torch.ones(n).double(), torch.full((n,), s).double()
    proposed, log_u = space(eta), make().log_uniform()
    for sign in (1.0, -1.0):
        start = space(sign * make().start())
        end, move = space.move(start, strength, ones, make())
        expected = (-s * (proposed.energy - start.energy)).exp().clamp(max=1.0)
        torch.testing.assert_close(move.probability, expected)
        assert torch.equal(move.accepted, log_u < -s * (proposed.energy - start.energy))
        assert torch.equal(end.xi[move.accepted], eta[move.accepted])
        assert torch.equal(end.xi[~move.accepted], start.xi[~move.accepted])
        assert 0 < move.accepted.sum() < n


def test_chains_in_equilibrium_find_the_mean_energy():
    e, level = ENERGIES["target"]
    sampler, s = made(e), 1.0
    found = equilibrium(sampler.method, parts(sampler), 0, s, range(100), 40, warm=5)
    optimum = oracle(sampler).tilted(lambda x: e(x, level), s)
    off = (found.energy - optimum.mean(lambda x: e(x, level))) / found.energy_se
    assert abs(off) < 4, f"{off:.1f} standard errors"
    assert found.energies.shape == (100, 40)
    assert 100 < found.effective < 4000
    assert 0.1 < found.acceptance < 0.9


def test_one_walk_answers_for_its_whole_ladder():
    """Broken off at any level the weights are those of that strength."""
    sampler = made(Linear(False))
    walk, base = sampler.method.walk(parts(sampler), rows(1500, 1.5)), oracle(sampler)
    torch.testing.assert_close(walk.log_weights[:, -1], walk.log_w)
    for k in (2, 4, 6):
        s = float(walk.ladder[0, k])
        w = (walk.log_weights[:, k] - base.log_z(lambda x: -x, s)).exp()
        within(w, 1.0, f"level {k}: w / Z")
        mean = base.tilted(lambda x: -x, s).mean(lambda x: -x)
        within(w * (walk.energies[:, k] - mean), 0.0, f"level {k}: m(s)")


# --- names, neighbours, the burn-in --------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small network, two units."""
    folder = tmp_path_factory.mktemp("prior") / "pixel"
    write_pixel(folder)
    directions = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)).div(100).tolist()
    return load_prior(str(folder)), directions


@each_eta
def test_a_row_is_the_same_to_the_bit_in_any_company(tiny, eta):
    prior, directions = tiny
    new = lambda: made(prior=prior, directions=directions, steps=3, eta=eta, method=NoiseSpace(2, 1, 1, 4))  # noqa: E731
    mixed = [Row(i % 2, (0.0, 0.5, 2.0)[i % 3], 7 * (i // 3)) for i in range(9)]
    whole = new().sample(mixed)
    assert (whole.log_w.abs() > 0).tolist() == [r.strength > 0 for r in mixed]
    other = new()  # a fresh burn-in, as after a resume, and another order
    pieces = [other.sample(piece) for piece in (mixed[::-1][:2], mixed[::-1][2:3], mixed[::-1][3:])]
    found = lambda what: torch.cat([getattr(p, what) for p in pieces]).flip(0)  # noqa: E731
    assert torch.equal(found("images"), whole.images), f"eta {eta}"
    for what in (
        "activation",
        "energy",
        "log_w",
        "path_kl",
    ):  # a projection is one product of the whole batch
        torch.testing.assert_close(
            found(what), getattr(whole, what), rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}"
        )


@each_eta
def test_strength_zero_is_the_base_chain_bit_by_bit(tiny, eta):
    prior, directions = tiny
    sampler = made(prior=prior, directions=directions, steps=4, eta=eta, method=NoiseSpace(2, 1, 0, 4))
    for state, _ in sampler.chain.run(Noise(range(3), prior.denoiser.shape)):  # noqa: B007
        pass
    for plan in (rows(3, 0.0), [*rows(3, 0.0), *rows(2, 1.0)]):
        found = sampler.sample(plan)
        assert torch.equal(found.images[:3], state.x), f"eta {eta}"
        assert found.log_w[:3].abs().max() == found.path_kl[:3].abs().max() == 0


def test_steps_are_frozen_and_know_nothing_of_the_plan():
    """What is learned in the burn-in stays; a stronger row, another unit or an earlier batch changes nothing."""
    alone, busy = made(), made(directions=[(1.0,), (0.5,)])
    a = alone.method.walk(parts(alone), rows(4, 1.0))
    busy.method.walk(parts(busy), [*rows(2, 6.0), *rows(2, 0.3, unit=1)])
    burn_in = busy.method.burn_in(parts(busy), 0)
    before = list(zip(burn_in.strengths, burn_in.betas, burn_in.lengths))
    b = busy.method.walk(parts(busy), [*rows(4, 1.0), *rows(3, 4.0, unit=1)])
    for what in ("ladder", "beta", "log_w", "accepted"):
        assert torch.equal(getattr(a, what), getattr(b, what)[:4]), what
    assert before == list(zip(burn_in.strengths, burn_in.betas, burn_in.lengths))
    ladder = a.ladder[0]
    assert ladder[0] == 0
    assert ladder[-1] == 1.0
    assert (ladder.diff() > 0).all()
    assert ((a.beta > 0) & (a.beta <= 1)).all()


def test_step_sizes_bring_the_acceptance_to_its_target():
    """Where a strong tilt would refuse everything, the burn-in makes steps small."""
    sampler = made(
        Target(1.5, 0.1, False), prior=GaussianMixture([1.0], [[0.0]], [1.0]), method=NoiseSpace(12, 4, 8)
    )
    walk = sampler.method.walk(parts(sampler), rows(200, 5.0))
    assert float(walk.beta[0, -1]) < 0.5
    assert 0.15 < float(walk.accepted[:, -1].mean()) < 0.5
    assert float(walk.accepted.mean(0).min()) > 0.1


def test_a_constraint_that_all_samples_meet_costs_nothing():
    """E = 0 everywhere: no spread to make steps by, and Z = 1."""
    sampler = made(Threshold(-50.0, False))
    walk = sampler.method.walk(parts(sampler), rows(8, 3.0))
    assert walk.log_w.abs().max() == 0
    torch.testing.assert_close(walk.accepted, torch.ones_like(walk.accepted))
    assert torch.allclose(walk.ladder[0], torch.linspace(0, 3, 7).double())


# --- no gradient, broken proposals, what is told -------------------------------------------


def test_no_gradient_is_ever_asked_for(monkeypatch):
    sampler = made()
    seen, read = [], sampler.bank.read
    monkeypatch.setattr(sampler.bank, "read", lambda *a: seen.append(torch.is_grad_enabled()) or read(*a))
    with torch.enable_grad():
        walk = sampler.method.walk(parts(sampler), rows(3, 1.0))
    assert seen
    assert not any(seen)
    assert not any(x.requires_grad for x in [*vars(walk.point).values(), walk.log_w])


def test_a_proposal_that_is_not_finite_is_refused_and_counted(monkeypatch):
    sampler = made()
    denoiser, t = sampler.chain.denoiser, sampler.chain.indices[0]
    posterior = denoiser.posterior

    def broken(x_t, index):
        log_r, mu, tau = posterior(x_t, index)
        return (
            (log_r, torch.where(x_t[:, None] > 1.0, torch.nan, mu), tau) if index == t else (log_r, mu, tau)
        )

    monkeypatch.setattr(denoiser, "posterior", broken)
    walk = sampler.method.walk(parts(sampler), rows(100, 1.0))
    start = (
        NoiseMap(sampler.chain, parts(sampler).bound(rows(100, 1.0)))
        .noise(range(100), "cpu", torch.float64)
        .start()
    )
    whole = start[:, 0, 0] * sampler.chain.denoiser.schedule.start_std(t) <= 1.0
    assert torch.equal(torch.isfinite(walk.log_w), whole), "a walk is lost only where it starts lost"
    assert torch.isfinite(walk.point.x_0[whole]).all()
    assert walk.lost[whole].sum() > 0
    assert sampler.sample(rows(100, 1.0)).finite.tolist() == whole.tolist()
    assert sampler.method.diagnostics()[0]["lost"] > 0


def test_diagnostics_tell_how_the_walks_moved():
    sampler = made(method=NoiseSpace(5, 2, 20))
    sampler.sample([*rows(40, 1.0), *rows(3, 0.0)])
    sampler.sample(rows(24, 1.0, first=40))
    (told,) = sampler.method.diagnostics()
    assert (told["unit"], told["strength"], told["n"], told["lost"]) == (0, 1.0, 64, 0)
    assert len(told["ladder"]) == len(told["beta"]) == len(told["acceptance"]) == 5
    assert told["ladder"][-1] == 1.0
    assert all(0 < a <= 1 for a in told["acceptance"])
    assert 1 <= told["autocorrelation"] < 20
    assert told["effective"] == pytest.approx(64 * 21 / told["autocorrelation"])


@each_eta
def test_a_run_folder_holds_weights_and_diagnostics(tmp_path, eta):
    """From the one call that a notebook makes; at eta = 0 the KL is there too."""
    unit = Projection([1.0])
    found = tilt(GaussianMixture(*LINE), unit, [0.0, 1.0], 32, energy=Linear(False), guidance=DPS(), pilot=0, steps=6,
                 eta=eta, sampler=NoiseSpace(4, 1, 2), out=tmp_path, accelerator="cpu")  # fmt: skip
    row = found.curve[1]
    assert row["log_z"] is not None
    assert row["path_kl"] > row["kl_lower"] > 0
    assert not any("eta = 0" in w for w in found.warnings)
    (told,) = found.folder.read_manifest()["diagnostics"]
    assert (told["unit"], told["strength"], told["n"]) == (unit.name, 1.0, 32)
    again = reweight_run(tmp_path, [1.0])["rows"][0]
    assert (again["kl"], again["log_z"]) == (row["kl"], row["log_z"])


def test_a_walk_on_wandb_has_its_ladder_and_what_its_moves_are_worth(tmp_path):
    main([
        "--config=configs/sample/analytic.yaml", "--model.sampler=NoiseSpace", "--model.sampler.init_args.levels=4",
        "--model.guidance=DPS", "--model.steps=6", "--model.pilot=16", "--data.n=16", "--data.strengths=[0,1]",
        "--trainer.accelerator=cpu", f"--out={tmp_path}",
    ])  # fmt: skip
    (told,) = RunFolder(tmp_path).read_manifest()["diagnostics"]
    run = Offline(tmp_path)
    (x,) = [name for name in run.metrics if "/ladder/" in name]
    prefix, at = x.split("/ladder/")
    for name in ("acceptance", "beta"):
        assert run.metrics[f"{prefix}/{name}/{at}"] == x
        assert [h[f"{prefix}/{name}/{at}"] for h in run.history if x in h] == pytest.approx(told[name])
    assert [h[x] for h in run.history if x in h] == pytest.approx(told["ladder"])
    for name in ("autocorrelation", "effective"):
        assert run.summary[f"{prefix}/{name}/{at}"] == pytest.approx(told[name])


class Raised(Target):
    """E + 7."""

    def __call__(self, z, level=0.0):
        return super().__call__(z, level) + 7


def test_a_constant_in_the_energy_moves_log_w_alone():
    plain, raised = (made(kind(1.5, 0.6, False)).sample(rows(16, 1.5)) for kind in (Target, Raised))
    assert torch.equal(raised.images, plain.images)
    torch.testing.assert_close(raised.log_w, plain.log_w - 7 * 1.5, atol=1e-9, rtol=0)
    torch.testing.assert_close(raised.path_kl, plain.path_kl, atol=1e-9, rtol=0)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_autocorrelation_of_an_autoregression(phi):
    """x' = phi x + noise has tau = (1 + phi) / (1 - phi)."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal(20)]
    for _ in range(4999):
        x.append(phi * x[-1] + (1 - phi**2) ** 0.5 * rng.standard_normal(20))
    tau, effective = autocorrelation_time(np.stack(x, 1))
    assert tau == pytest.approx((1 + phi) / (1 - phi), rel=0.06)
    assert effective == pytest.approx(100_000 / tau)


def test_chains_that_are_stuck_are_worth_half_a_draw_each():
    stuck = np.repeat(np.random.default_rng(0).standard_normal((30, 1)), 50, 1)
    assert 12 < autocorrelation_time(stuck)[1] < 18
    assert autocorrelation_time(np.ones((3, 4)))[1] == 0


@pytest.mark.parametrize(("setting", "value"), [("levels", 0), ("moves", 0), ("final", -1), ("replicas", 2)])
def test_a_setting_out_of_range_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} = {value}"):
        NoiseSpace(**{setting: value})


def test_diagnostics_are_of_all_calls_of_a_run(tmp_path):
    """A plan that grows: what was walked before is told, too, as by one call."""

    def run(out, strengths, n):
        found = tilt(GaussianMixture(*LINE), Projection([1.0]), strengths, n, energy=Linear(False), guidance=DPS(), pilot=0,
                     steps=6, sampler=NoiseSpace(4, 1, 2), out=tmp_path / out, batch_size=8, accelerator="cpu")  # fmt: skip
        return found.folder.read_manifest()["diagnostics"]

    run("grown", [0.0, 1.0], 16)
    grown = run("grown", [0.0, 1.0, 2.0], 24)
    assert [(d["strength"], d["n"]) for d in grown] == [(1.0, 24), (2.0, 24)]
    assert grown == run("whole", [0.0, 1.0, 2.0], 24)
