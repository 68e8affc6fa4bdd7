"""Laws of the energies: log_tilt is log E[exp(-s E)], the force is zero where the constraint is met, levels mean what
they say, and the natural reference that they are measured by."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlens.energies import Linear, Target, Threshold, parse_level
from tiltlens.units import Combination, Projection
from tiltlens.units.calibration import Natural

ENERGIES = {
    "linear": Linear(),
    "target": Target(0.0),
    "narrow target": Target(0.0, width=0.2),
    "threshold": Threshold(0.0),
}
each = pytest.mark.parametrize("name", ENERGIES)


A, B = Projection([1.0, -0.5]), Projection([0.3, 0.8])


def standard_normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def double(x) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def integral(energy, m: float, v: float, s: float, level: float) -> float:
    """log of the integral of exp(-s E(z)) N(z; m, v), by the trapezoidal rule in logs."""
    sd = math.sqrt(v)
    ends = [m, m + s * v, level]  # where the integrand may have its mass
    z = torch.linspace(min(ends) - 14 * sd, max(ends) + 14 * sd, 80_001, dtype=torch.float64)
    log_p = -((z - m) ** 2) / (2 * v) - math.log(2 * math.pi * v) / 2
    total = torch.logsumexp(log_p - s * energy(z, level), 0) + math.log(float(z[1] - z[0]))
    return float(total)


@each
@settings(derandomize=True, deadline=None, max_examples=60)
@given(m=st.floats(-4, 4), v=st.floats(0.01, 9), s=st.floats(0, 4), level=st.floats(-3, 3))
def test_log_tilt_is_the_integral(name, m, v, s, level):
    energy = ENERGIES[name]
    found = float(energy.log_tilt(double(m), double(v), double(s), double(level)))
    assert found == pytest.approx(integral(energy, m, v, s, level), abs=1e-6, rel=1e-6), (
        f"{name}: z ~ N({m}, {v}), s {s}, level {level}"
    )


@each
def test_without_variance_log_tilt_is_minus_s_e(name):
    energy = ENERGIES[name]
    z, level = torch.linspace(-5, 5, 101, dtype=torch.float64), double(0.7)
    for s in (0.0, 0.3, 5.0):
        found = energy.log_tilt(z, 0.0, double(s), level)
        torch.testing.assert_close(found, -s * energy(z, level), atol=2e-6, rtol=1e-9)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("v", [0.0, 1e-6, 0.5, 100.0])
def test_the_force_is_finite_and_at_no_variance_that_of_the_energy(name, dtype, v):
    """What guidance pulls back is d log_tilt / d m: never NaN, also far from the level."""
    energy = ENERGIES[name]
    m = torch.tensor([-300.0, -8, -1, -0.1, 0.1, 1, 8, 300], dtype=dtype, requires_grad=True)
    s = torch.full_like(m, 2.0).detach()
    (force,) = torch.autograd.grad(energy.log_tilt(m, v, s, 0.0).sum(), m)
    assert torch.isfinite(force).all(), f"{name}, {dtype}, V {v}: {force}"
    if v == 0:
        (expected,) = torch.autograd.grad((-s * energy(m, 0.0)).sum(), m)
        torch.testing.assert_close(
            force, expected, atol=1e-5, rtol=1e-5, msg=lambda e: f"{name}, {dtype}: {e}"
        )


@each
@pytest.mark.parametrize("v", [0.0, 0.7])
def test_rows_do_not_meet_and_a_common_shift_changes_nothing(name, v):
    """E(z + c, level + c) = E(z, level) for a levelled energy; Linear gains the constant s c. Row by row in a batch."""
    energy, g = ENERGIES[name], torch.Generator().manual_seed(0)
    m, level = torch.randn(2, 6, dtype=torch.float64, generator=g)
    s, c = torch.linspace(0, 3, 6, dtype=torch.float64), 1.75
    tilt = energy.log_tilt(m, v, s, level)
    alone = torch.stack([energy.log_tilt(m[i], v, s[i], level[i]) for i in range(6)])
    torch.testing.assert_close(tilt, alone, msg=lambda e: f"{name}: rows meet: {e}")
    gained = s * c if name == "linear" else 0.0
    moved = energy.log_tilt(m + c, v, s, level + c)
    torch.testing.assert_close(moved, tilt + gained, atol=1e-9, rtol=1e-9, msg=lambda e: f"{name}: {e}")


def test_no_force_where_the_constraint_is_met():
    z = torch.tensor([1.0, 1.5, 9.0], dtype=torch.float64, requires_grad=True)
    assert Threshold(1.0)(z, 1.0).abs().max() == 0
    (force,) = torch.autograd.grad(Threshold(1.0)(z, 1.0).sum(), z)
    assert force.abs().max() == 0
    assert float(Target(1.0)(double(1.0), 1.0)) == 0
    assert float(Target(0.0, width=0.5)(double(0.5))) == pytest.approx(0.5), (
        "one width off costs half a nat at s = 1"
    )


# --- levels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "parsed"),
    [
        (2.5, ("value", 2.5)),
        (-3, ("value", -3.0)),
        ("2.5", ("value", 2.5)),
        ("value=-1e-2", ("value", -0.01)),
        ("z=3", ("z", 3.0)),
        ("z3", ("z", 3.0)),
        (" z = -1.5 ", ("z", -1.5)),
        ("q0.999", ("q", 0.999)),
        ("q=0.5", ("q", 0.5)),
    ],
)
def test_levels_are_numbers_deviations_and_quantiles(level, parsed):
    assert parse_level(level) == parsed


@pytest.mark.parametrize(
    "level",
    ["", "high", "q", "q1", "q0", "q1.5", "q-0.1", "z=", "p0.9", "z=3%", "1e", "--1", "nan", "z=inf", "1e999", None, [1.0],
     float("nan"), float("inf")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Target, Threshold])
def test_a_level_of_no_known_form_is_refused_at_construction(kind, level):
    with pytest.raises(ValueError, match="level"):
        kind(level)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_a_width_is_positive(width):
    with pytest.raises(ValueError, match="width"):
        Target(1.0, width=width)


@pytest.mark.parametrize("kind", [Target, Threshold])
def test_a_level_is_the_same_activation_however_it_is_written(kind):
    """a number is a raw activation; z counts natural deviations; q is a natural quantile. Energy reads z or a."""
    g = torch.Generator().manual_seed(1)
    natural = Natural.from_members(
        Projection([1.0]), 4 + 3 * torch.randn(2001, 1, dtype=torch.float64, generator=g)
    )
    median = float(natural.activations[1000])
    for level, a in [(10.0, 10.0), ("10", 10.0), ("z=2", natural.mean + 2 * natural.std), ("q0.5", median)]:
        z = (a - natural.mean) / natural.std
        assert kind(level).resolve_level(natural) == pytest.approx(z, abs=1e-12), (
            f"{kind.__name__}({level!r})"
        )
        assert kind(level, standardise=False).resolve_level(natural) == pytest.approx(a, abs=1e-12), (
            f"{level!r} raw"
        )


def test_linear_has_no_level():
    assert Linear().level is None
    assert Linear().resolve_level(Natural.identity(Projection([1.0]))) == 0.0


def test_a_quantile_needs_a_reference():
    with pytest.raises(ValueError, match="natural"):
        Threshold("q0.9").resolve_level(Natural.identity(Projection([1.0])))


# --- what is natural ---------------------------------------------------------------------


def test_a_simple_unit_keeps_its_raw_activation():
    members = 5 + 3 * standard_normal(500, 1)
    natural = Natural.from_members(A, members)
    assert (natural.member_mean.tolist(), natural.member_std.tolist()) == ([0.0], [1.0])
    assert natural.mean == pytest.approx(float(members.mean()))
    assert natural.std == pytest.approx(float(members.std()))
    assert torch.equal(natural.activations, members[:, 0].sort().values)


@pytest.mark.parametrize("rule", ["sum", "versus", "and-not"])
def test_a_combination_has_standardised_members(rule):
    """Scale and offset of a member say nothing."""
    unit, members = Combination([A, B], rule=rule), standard_normal(500, 2)
    plain = Natural.from_members(unit, members)
    moved = Natural.from_members(unit, members * torch.tensor([40.0, 0.01]) + torch.tensor([-7.0, 3.0]))
    torch.testing.assert_close(moved.activations, plain.activations, msg=lambda e: f"{rule}: {e}")
    torch.testing.assert_close(plain.member_std, members.std(0))


def test_quantiles_rise_and_reach_beyond_the_reference():
    """Inside the reference its own; beyond 1 - 1/P a Gaussian tail where that lies further out."""
    natural = Natural.from_members(A, standard_normal(200, 1))
    a = natural.activations
    assert natural.quantile(0.5) == pytest.approx(float(a.median() + a[100]) / 2, abs=1e-9)
    q = [1e-6, 1e-4, 0.004, 0.006, 0.1, 0.5, 0.9, 0.994, 0.996, 0.9999, 1 - 1e-6]
    values = [natural.quantile(x) for x in q]
    assert values == sorted(values), f"quantiles fall: {values}"
    assert values[-1] == pytest.approx(natural.mean + natural.std * 4.7534, rel=1e-4)
    assert values[-1] > float(a[-1]) > 0 > float(a[0]) > values[0]
    heavy = Natural.from_members(A, torch.cat([standard_normal(199, 1), torch.tensor([[1e3]]).double()]))
    assert heavy.quantile(0.9999) >= float(torch.quantile(heavy.activations, 0.9999)), (
        "a tail inside the reference"
    )


def test_a_dead_unit_is_refused():
    half_dead = torch.cat([standard_normal(50, 1), torch.ones(50, 1)], 1)
    for unit, members in [(A, torch.full((50, 1), 2.0)), (Combination([A, B]), half_dead)]:
        with pytest.raises(ValueError, match="dead"):
            Natural.from_members(unit, members)
    with pytest.raises(ValueError, match="finite"):
        Natural.from_members(A, torch.full((50, 1), float("nan")))


@pytest.mark.parametrize(
    ("level", "said"), [("q0.999", True), ("q0.99", False), ("z=9", False), (3.0, False)]
)
def test_a_quantile_that_the_reference_cannot_tell_is_said(level, said):
    natural = Natural(torch.zeros(1), torch.ones(1), 0.0, 1.0, torch.linspace(-2, 2, 200))
    note = Target(level).note(natural)
    assert (note is not None) == said
    assert not said or "takes 1000 natural activations, and there are 200" in note
    assert Linear().note(natural) is None
