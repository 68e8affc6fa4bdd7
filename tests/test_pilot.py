"""Laws of the pilot: slopes are regressions, a pilot is named by nothing but itself, and what Calibrated makes of it."""

import math

import pytest
import torch

from tiltlens.constraint import Constraint
from tiltlens.denoiser import Denoiser
from tiltlens.energies import Linear, Target
from tiltlens.guidance import DPS, Calibrated
from tiltlens.guidance.guidance import PilotTables, Step, redrawn
from tiltlens.priors import GaussianMixture
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.pilot import UnitPilot, regression, run_pilot, tables
from tiltlens.sampling.sampler import Sampler
from tiltlens.schedule import Schedule
from tiltlens.units import Combination, Projection, UnitBank
from tiltlens.units.calibration import Natural

PLANE = ([0.6, 0.4], [[-0.6, 0.2], [0.8, 0.5]], [0.5, 0.3])
SCHEDULE = Schedule.from_log_snr(torch.tensor([2.0, -1.0, -4.0]))
FACTOR = float(SCHEDULE.sigma[1] ** 2 / SCHEDULE.alpha[1])
A, B = Projection([1.0, -0.5]), Projection([0.3, 0.8])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sampler(units=(A, B), steps=10) -> Sampler:
    return Sampler(GaussianMixture(*PLANE), UnitBank(list(units)), Linear(), DPS(), steps)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_prior_whose_samples_are_not_finite_is_told_as_such(kept, monkeypatch):
    """And not its unit; a few samples that are lost are no error."""
    made = sampler((A,), 3)

    def decode(x):
        return torch.where((torch.arange(len(x)) < kept)[:, None], x, float("nan"))

    monkeypatch.setattr(made.prior, "decode", decode)
    if kept == 2:
        assert int(made.run_pilot(8, 8)[0].members.isfinite().sum()) == 2
        return
    with pytest.raises(
        ValueError, match=f"samples of the prior are not finite.*pilot's 8 to be, found {kept}"
    ):
        made.run_pilot(8, 8)


# --- the regression ----------------------------------------------------------------------


def known(slope, noise, count=4000, steps=6, seed=0):
    """u (steps, P), a = 0.3 + slope u + noise; the same slope at every step but the last, which is a itself."""
    u = normal(1, count, seed=seed).expand(steps, count).clone()
    a = 0.3 + slope * u[0] + noise * normal(count, seed=seed + 1)
    u[-1] = a
    return u, a


def test_a_known_line_is_recovered():
    """Slope, intercept and residual variance within four standard errors; steps 0 to 2 do not pool with the last."""
    for slope, noise in [(0.2, 1.0), (0.7, 0.5), (1.0, 0.1), (3.0, 2.0)]:
        found, intercept, residual = regression(*known(slope, noise))
        se = noise / 4000**0.5
        where = f"slope {slope}, noise {noise}"
        assert abs(found[0] - slope) < 4 * se + 2 * se**2, f"{where}: found {found[0]:.4f}"
        assert abs(intercept[0] - 0.3) < 4 * se, f"{where}: intercept {intercept[0]:.4f}"
        assert abs(residual[0] / noise**2 - 1) < 4 * (2 / 4000) ** 0.5, f"{where}: residual {residual[0]:.4f}"


def test_the_last_step_is_the_sample_itself():
    slope, intercept, residual = regression(*known(0.5, 1.0))
    assert (float(slope[-1]), float(residual[-1])) == (1.0, 0.0)
    assert abs(float(intercept[-1])) < 1e-12


def test_a_slope_that_is_not_there_is_zero():
    """Below two standard errors zero: of 200 independent regressions about 2 % (one side) are kept, and those small."""
    kept = []
    for seed in range(200):
        a = normal(64, seed=2 * seed + 1)
        slope, _, residual = regression(normal(1, 64, seed=2 * seed).expand(3, 64).clone(), a)
        kept.append(float(slope[0]))
        if slope[0] == 0:
            assert residual[0] == pytest.approx(float((a - a.mean()).square().sum() / 62)), (
                "unread: all of a's variance"
            )
    kept = torch.tensor(kept)
    share = float((kept > 0).double().mean())
    assert share < 0.06, f"{share:.3f} of independent units are guided"
    assert kept.min() == 0
    assert kept.max() < 0.5


def test_a_negative_slope_is_noise():
    slope, _, _ = regression(*known(-0.8, 0.3))
    assert slope[0] == 0


def test_a_slope_is_shrunk_by_its_own_error():
    """By 1 - 1/t^2, t = slope/se: with few trajectories more than with many, and never beyond least squares."""
    ratios = []
    for count in (24, 200, 4000):
        u, a = known(1.0, 1.0, count)
        u[-1] = u[0]  # nothing but the line
        uc, ac = u[0] - u[0].mean(), a - a.mean()
        plain = (uc * ac).sum() / uc.square().sum()
        error = ((ac - plain * uc).square().sum() / (count - 2) / uc.square().sum()).sqrt()
        found = regression(u, a)[0][0]
        assert found == pytest.approx(float(plain * (1 - (error / plain) ** 2)), rel=1e-9), (
            f"{count} trajectories"
        )
        ratios.append(float(found / plain))
    assert ratios[0] < ratios[1] < ratios[2] < 1


def test_what_a_reader_tells_has_a_slope_about_one_until_the_pilot_knows_better():
    """u = E[a | x_t] of 2 % of Var a, 64 trajectories: the line of most pilots is not seen, and is there; of many trajectories it is their own."""
    told = torch.tensor([True] * 5 + [False])
    off, blind = [], 0
    for seed in range(60):
        u, a = known(1.0, 7.0, 64, seed=2 * seed)
        blind += int(regression(u, a)[0][0] == 0)
        slope, intercept, _ = regression(u, a, told)
        off.append(float(slope[0] - 1))
        assert intercept[0] == pytest.approx(float(a.mean() - slope[0] * u[0].mean()), abs=1e-9)
    assert blind > 30
    assert max(map(abs, off)) < 0.25
    assert min(map(abs, off)) > 0  # the pilot is heard
    u, a = known(0.4, 0.5)
    torch.testing.assert_close(regression(u, a, told)[0][:3], regression(u, a)[0][:3], rtol=5e-3, atol=0)
    none = torch.zeros(6, dtype=torch.bool)
    for with_none, plain in zip(regression(u, a, none), regression(u, a)):
        assert torch.equal(with_none, plain)
    silent = torch.zeros_like(u)  # a reader that knows nothing yet
    assert torch.isfinite(torch.stack(regression(silent, a, told))).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_regression_has_no_unit_of_measurement(scale):
    u, a = known(0.7, 0.5, 100)
    slope, intercept, residual = regression(u, a)
    scaled = regression(scale * u, scale * a)
    for found, expected in zip(scaled, (slope, scale * intercept, scale**2 * residual)):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * scale)


# --- the run -----------------------------------------------------------------------------


def test_a_pilot_is_the_same_in_any_batch():
    made = sampler()
    whole = made.run_pilot(17, 17)
    for size in (1, 5, 16):
        for found, expected in zip(made.run_pilot(17, size), whole):
            torch.testing.assert_close(found.path, expected.path, msg=lambda e: f"batch {size}: {e}")  # noqa: B023
            torch.testing.assert_close(found.members, expected.members)


def test_a_units_pilot_does_not_depend_on_the_other_units():
    alone, beside = sampler([B]).run_pilot(9, 4)[0], sampler([A, B]).run_pilot(9, 4)[1]
    torch.testing.assert_close(alone.path, beside.path)
    torch.testing.assert_close(alone.members, beside.members)


def test_a_pilot_is_a_run_of_unguided_samples_with_noise_of_its_own():
    """Its path holds a(x0_hat) of each step and ends with the sample; the noise of the same seed is another."""
    made, seen = sampler(), []
    pilot = made.run_pilot(6, 4, lambda done, total: seen.append((done, total)))[0]
    noise = Noise(range(6), (2,), dtype=torch.float64, domain="pilot")
    path = torch.stack([A.read(info.x0_hat) for _, info in made.chain.run(noise)])
    torch.testing.assert_close(pilot.path[..., 0], path)
    assert torch.equal(pilot.members, pilot.path[-1])
    assert seen == [(i, 20) for i in range(1, 21)]
    for stream in ("start", "step"):
        pair = [Noise([3], (5000,), domain=d).draw(stream)[0] for d in ("pilot", "sample")]
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 4.5 / 5000**0.5, (
            f"{stream} noise is shared"
        )


def test_a_saved_pilot_comes_back(tmp_path):
    pilot = sampler([Combination([A, B])]).run_pilot(5, 5)[0]
    pilot.save(tmp_path / "unit.safetensors")
    found = UnitPilot.load(tmp_path / "unit.safetensors")
    assert torch.equal(found.members, pilot.members)
    assert torch.equal(found.path, pilot.path)
    assert [p.name for p in tmp_path.iterdir()] == ["unit.safetensors"], "a temporary file is left"


def test_slopes_of_the_analytic_prior_grow_from_nothing_to_one():
    """One Gaussian: a(x_0) = u_t + residual exactly, so that every slope that is not zero is one within its error."""
    prior, bank = GaussianMixture([1.0], [[0.4, -0.3]], [0.5]), UnitBank([A])
    made = Sampler(prior, bank, Linear(), DPS(), steps=20)
    pilots = run_pilot(made.chain, bank, prior.decode, 512, 512, dtype=torch.float64)
    naturals = [Natural.from_members(A, pilots[0].members)]
    for standardise in (True, False):
        found = tables(pilots, bank, naturals, made.chain, standardise)
        slope, residual = found.slope[0], found.residual_variance[0]
        read = slope > 0
        assert read[8:].all(), (
            f"standardise {standardise}: steps that can be read have no slope: {slope.tolist()}"
        )
        se = (residual / pilots[0].path[..., 0].var(1) / 512).sqrt() * (naturals[0].std if standardise else 1)
        off = ((slope - 1).abs() / (4 * se + 0.02))[8:].max()
        assert off < 1, f"standardise {standardise}: slopes {slope.tolist()}"
        assert (residual.diff()[8:] < 1e-3).all(), "less is left to know at every step"


def test_broken_trajectories_are_left_out():
    made = sampler([A])
    sound = made.run_pilot(40, 40)[0]
    path, members = sound.path.clone(), sound.members.clone()
    path[3:, 7] = members[7] = float("nan")
    keep = [i for i in range(40) if i != 7]
    natural = Natural.from_members(A, members)
    found, expected = (
        tables([p], made.bank, [natural], made.chain, True)
        for p in (UnitPilot(members, path), UnitPilot(sound.members[keep], sound.path[:, keep]))
    )
    torch.testing.assert_close(found.slope, expected.slope)
    torch.testing.assert_close(found.residual_variance, expected.residual_variance)


# --- what Calibrated makes of it ----------------------------------------------------------


class Identity(Denoiser):
    """x0_hat = x_t: what is pulled back is what was remembered."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.schedule = tuple(shape), SCHEDULE

    def forward(self, x_t, t):
        return x_t.clone()


def by_hand(slopes) -> PilotTables:
    """One unit; the steps are one apart in log-SNR, the residual variance is zero."""
    table = torch.as_tensor(slopes).double()[None]
    return PilotTables(table, 0 * table, 0 * table, torch.arange(table.shape[1]).double())


def steered(energy, unit, count):
    """`count` rows of a raw unit, strength 1.5."""
    units = Constraint(UnitBank([unit]), energy, [Natural.identity(unit)], lambda x: x)
    return units.rows(torch.zeros(count, dtype=torch.long), torch.full((count,), 1.5, dtype=torch.float64))


@pytest.mark.parametrize(("memory", "blend"), [(0.0, 0.5), (0.5, 1.0), (4.0, 1.0), (4.0, 0.5), (4.0, 0.0)])
def test_memory_is_a_running_average_without_bias_blended_with_the_step_alone(memory, blend):
    """h_k = sum_j (1 - b) b^(k-j) grad_j / (1 - b^k), b = exp(-1/memory), from the first slope that is not zero; blend h_k + (1 - blend) grad_k."""
    energy, slopes = Target(1.0, 0.7, False), torch.tensor([0, 0, 0.2, 0.5, 0.8, 1, 1, 1, 1, 1]).double()
    guidance, rows = Calibrated(memory, blend=blend, law="gaussian"), steered(energy, A, 3)
    guidance.prepare(by_hand(slopes), None, None)
    w, b, gradients = torch.tensor(A.direction).double(), math.exp(-1 / memory) if memory else 0.0, []
    held = guidance.start(normal(3, 2))
    for number in range(len(slopes)):
        x = normal(3, 2, seed=number)
        out = guidance(Identity((2,)), x, Step(number, 1, SCHEDULE, False, None), rows, held)
        held = out.memory
        if slopes[number] == 0:
            assert out.shift is None, f"step {number} has slope zero and was guided"
            continue
        # the force of the twist is at the regressed mean, slope * u
        u = slopes[number] * (x @ w)
        gradients.append(-1.5 * (u - 1.0)[:, None] / 0.49 * w)
        k = len(gradients)
        weights = torch.tensor(
            [(1 - b) * b ** (k - 1 - j) / (1 - b**k) for j in range(k)], dtype=torch.float64
        )
        average = (weights[:, None, None] * torch.stack(gradients)).sum(0)
        expected = slopes[number] * FACTOR * (blend * average + (1 - blend) * gradients[-1])
        torch.testing.assert_close(out.shift, expected, msg=lambda e: f"memory {memory}, step {number}: {e}")  # noqa: B023


def test_smoothing_averages_the_gradient_over_views():
    """Two views: the image and its mirror image; of a linear unit the mean of w and the mirrored w."""
    w = normal(3 * 8 * 8).reshape(3, 8, 8)
    images = normal(2, 3, 8, 8, seed=1)
    guidance, rows = (
        Calibrated(0, smoothing=2, law="gaussian"),
        steered(Linear(False), Projection(w.flatten().tolist()), 2),
    )
    guidance.prepare(by_hand(torch.ones(3)), None, None)
    out = guidance(Identity(w.shape), images, Step(0, 1, SCHEDULE, False, None), rows, guidance.start(images))
    torch.testing.assert_close(out.shift, (1.5 * FACTOR * (w + w.flip(-1)) / 2).expand(2, 3, 8, 8))


def test_redraws_keep_the_noise_level_and_leave_a_linear_unit_alone():
    """Under the denoiser x0_hat = x_t a redrawn estimate is alpha x0_hat + sigma (sqrt(1 - k^2) eps_hat + k xi); the force is
    that of x_t itself, and the gradient of a linear unit the same everywhere."""
    alpha, sigma = Step(0, 1, SCHEDULE, False, None).alpha, Step(0, 1, SCHEDULE, False, None).sigma
    x, xi = normal(3, 2), normal(3, 4000, 2, seed=5)
    step = Step(0, 1, SCHEDULE, False, lambda k: xi[:, :k])
    found = redrawn(Identity((2,)), x, x, step, 4000, 0.6).unflatten(0, (4000, 3))
    eps_hat = (x - alpha * x) / sigma
    torch.testing.assert_close(
        found.mean(0), alpha * x + sigma * 0.8 * eps_hat, atol=5 * 0.6 * sigma / 4000**0.5, rtol=0
    )
    torch.testing.assert_close(found.std(0), torch.full_like(x, 0.6 * sigma), rtol=0.05, atol=0)

    energy, rows = Target(1.0, 0.7, False), steered(Target(1.0, 0.7, False), A, 3)
    guidance = Calibrated(0, redraws=4, law="gaussian")
    guidance.prepare(by_hand(torch.ones(3)), None, None)
    out = guidance(Identity((2,)), x, step, rows, guidance.start(x))
    w = torch.tensor(A.direction).double()
    expected = FACTOR * (-1.5 * (x @ w - 1.0) / energy.width**2)[:, None] * w
    torch.testing.assert_close(out.shift, expected)


def test_where_alpha_is_zero_nothing_is_guided():
    """sigma^2/alpha has no meaning there."""
    pure = Schedule(torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.1, 0.5, 1.0]), torch.arange(3))
    out = DPS()(
        Identity((2,)), normal(1, 2), Step(0, 2, pure, False, None), steered(Linear(False), A, 1), None
    )
    assert out.shift is None
