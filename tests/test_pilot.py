"""Laws of the pilot and of what is natural: slopes are regressions, a pilot is named by nothing but itself."""

import pytest
import torch

from tiltlens.energies import Linear
from tiltlens.guidance import DPS
from tiltlens.priors import GaussianMixture
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.pilot import UnitPilot, regression, run_pilot, tables
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Combination, Projection, UnitBank
from tiltlens.units.calibration import Natural

PLANE = ([0.6, 0.4], [[-0.6, 0.2], [0.8, 0.5]], [0.5, 0.3])
A, B = Projection([1.0, -0.5]), Projection([0.3, 0.8])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sampler(units=(A, B), steps=10) -> Sampler:
    return Sampler(GaussianMixture(*PLANE), UnitBank(list(units)), Linear(), DPS(), steps)


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
            assert residual[0] == pytest.approx(float((a - a.mean()).square().sum() / 62)), "unread: all of a's variance"
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
        assert found == pytest.approx(float(plain * (1 - (error / plain) ** 2)), rel=1e-9), f"{count} trajectories"
        ratios.append(float(found / plain))
    assert ratios[0] < ratios[1] < ratios[2] < 1


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
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 4.5 / 5000**0.5, f"{stream} noise is shared"


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
        assert read[8:].all(), f"standardise {standardise}: steps that can be read have no slope: {slope.tolist()}"
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


# --- what is natural ---------------------------------------------------------------------


def test_a_simple_unit_keeps_its_raw_activation():
    members = 5 + 3 * normal(500, 1)
    natural = Natural.from_members(A, members)
    assert (natural.member_mean.tolist(), natural.member_std.tolist()) == ([0.0], [1.0])
    assert natural.mean == pytest.approx(float(members.mean()))
    assert natural.std == pytest.approx(float(members.std()))
    assert torch.equal(natural.activations, members[:, 0].sort().values)


@pytest.mark.parametrize("rule", ["sum", "versus", "and-not"])
def test_a_combination_has_standardised_members(rule):
    """Scale and offset of a member say nothing."""
    unit, members = Combination([A, B], rule=rule), normal(500, 2)
    plain = Natural.from_members(unit, members)
    moved = Natural.from_members(unit, members * torch.tensor([40.0, 0.01]) + torch.tensor([-7.0, 3.0]))
    torch.testing.assert_close(moved.activations, plain.activations, msg=lambda e: f"{rule}: {e}")
    torch.testing.assert_close(plain.member_std, members.std(0))


def test_quantiles_rise_and_reach_beyond_the_reference():
    """Inside the reference its own; beyond 1 - 1/P a Gaussian tail where that lies further out."""
    natural = Natural.from_members(A, normal(200, 1))
    a = natural.activations
    assert natural.quantile(0.5) == pytest.approx(float(a.median() + a[100]) / 2, abs=1e-9)
    q = [1e-6, 1e-4, 0.004, 0.006, 0.1, 0.5, 0.9, 0.994, 0.996, 0.9999, 1 - 1e-6]
    values = [natural.quantile(x) for x in q]
    assert values == sorted(values), f"quantiles fall: {values}"
    assert values[-1] == pytest.approx(natural.mean + natural.std * 4.7534, rel=1e-4)
    assert values[-1] > float(a[-1]) > 0 > float(a[0]) > values[0]
    heavy = Natural.from_members(A, torch.cat([normal(199, 1), torch.tensor([[1e3]]).double()]))
    assert heavy.quantile(0.9999) >= float(torch.quantile(heavy.activations, 0.9999)), "a tail inside the reference"


def test_a_dead_unit_is_refused():
    for unit, members in [(A, torch.full((50, 1), 2.0)), (Combination([A, B]), torch.cat([normal(50, 1), torch.ones(50, 1)], 1))]:
        with pytest.raises(ValueError, match="dead"):
            Natural.from_members(unit, members)
    with pytest.raises(ValueError, match="finite"):
        Natural.from_members(A, torch.full((50, 1), float("nan")))
