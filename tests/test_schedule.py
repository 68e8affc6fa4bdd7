"""Laws of the schedule and its steps: a chain of any length exists, and every step keeps the marginal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlens.schedule import SPACINGS, Schedule, check_steps, step_coefficients, step_indices

FAMILIES = ("vp", "ve", "flow", "flow to pure noise")


def schedule(family: str, log_snr: torch.Tensor) -> Schedule:
    """A table of each family with these levels; the last kind ends in alpha = 0."""
    if family == "vp":
        return Schedule.from_log_snr(log_snr)
    time = torch.arange(len(log_snr))
    if family == "ve":
        return Schedule(torch.ones_like(log_snr), (-log_snr / 2).exp(), time)
    alpha, sigma = torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
    if family == "flow to pure noise":
        alpha[-1], sigma[-1] = 0.0, 1.0
    return Schedule(alpha, sigma, time)


@st.composite
def tables(draw) -> Schedule:
    """Random levels from at most 9 down to about -20, crowded and sparse ones alike."""
    gaps = draw(st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=60))
    top = draw(st.floats(-2.0, 9.0))
    levels = top - torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)
    return schedule(draw(st.sampled_from(FAMILIES)), levels)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(tables(), st.data(), st.sampled_from(SPACINGS))
def test_a_chain_has_the_asked_length_and_falls_strictly(table, data, spacing):
    steps = data.draw(st.integers(1, len(table)))
    indices = step_indices(table, steps, spacing)
    assert len(indices) == steps, f"{spacing}: asked for {steps} steps, got {indices}"
    assert all(a > b for a, b in zip(indices, indices[1:])), f"{spacing}: not falling: {indices}"
    assert 0 <= indices[-1] <= indices[0] < len(table), f"{spacing}: outside the table: {indices}"
    check_steps(table, indices)
    if spacing == "index":
        assert indices[0] == len(table) - 1, f"index: begins at {indices[0]} of {len(table)}"
    if steps > 1:
        assert indices[-1] == 0, f"{spacing}: ends at {indices[-1]}, not at the cleanest index"


def test_log_snr_steps_are_uniform_down_to_the_floor():
    """Within half a gap of a fine table; nothing is spent below the floor of -9."""
    fine = torch.linspace(8, -30, 20_001, dtype=torch.float64)
    cosine = Schedule((torch.sigmoid(fine)).sqrt(), torch.sigmoid(-fine).sqrt(), torch.arange(len(fine)))
    levels = cosine.log_snr[step_indices(cosine, 41)]
    torch.testing.assert_close(levels, torch.linspace(-9, 8, 41, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_step_keeps_the_marginal(family, eta):
    """If x_t = alpha_t x0 + sigma_t eps with x0 known, then x_r ~ N(alpha_r x0, sigma_r^2)."""
    table = schedule(family, torch.linspace(7, -12, 30, dtype=torch.float64))
    for t in range(1, 30):
        for r in {0, t // 2, t - 1}:
            c = step_coefficients(table, t, r, eta)
            mean = c.x0 + c.x * float(table.alpha[t])
            variance = (c.x * float(table.sigma[t])) ** 2 + c.v**2
            where = f"{family}, eta {eta}, step {t} -> {r}"
            assert mean == pytest.approx(float(table.alpha[r]), rel=1e-12), f"{where}: mean"
            assert variance == pytest.approx(float(table.sigma[r]) ** 2, rel=1e-12), f"{where}: variance"


@pytest.mark.parametrize("family", FAMILIES)
def test_eta_one_is_the_posterior_and_eta_zero_has_no_noise(family):
    """eta = 1: q(x_r | x_t, x0) by Bayes. The noise grows in proportion to eta."""
    table = schedule(family, torch.linspace(7, -12, 30, dtype=torch.float64))
    for t, r in [(29, 28), (29, 3), (15, 14), (1, 0)]:
        a_t, s_t, a_r, s_r = (float(x[i]) for i in (t, r) for x in (table.alpha, table.sigma))
        forward = s_t**2 - (a_t / a_r) ** 2 * s_r**2  # variance of x_t given x_r
        precision = 1 / s_r**2 + (a_t / a_r) ** 2 / forward
        c = step_coefficients(table, t, r, 1.0)
        assert c.v**2 == pytest.approx(1 / precision, rel=1e-9), f"{family} {t} -> {r}: variance"
        assert c.x == pytest.approx(a_t / a_r / forward / precision, rel=1e-9, abs=1e-15), (
            f"{family} {t} -> {r}: x_t"
        )
        assert c.x0 == pytest.approx(a_r / s_r**2 / precision, rel=1e-9), f"{family} {t} -> {r}: x0"
        assert step_coefficients(table, t, r, 0.0).v == 0.0
        assert step_coefficients(table, t, r, 0.25).v == pytest.approx(c.v / 4, rel=1e-12)


def test_short_steps_do_not_cancel():
    """1 - SNR_t/SNR_r ~ gap, also where it is 1e-9 and 1 - a/b would keep no digits but a few."""
    for level in (8.0, 0.0, -8.0):
        gap = 1e-9
        table = Schedule.from_log_snr(torch.tensor([level, level - gap], dtype=torch.float64))
        c = step_coefficients(table, 1, 0, 1.0)
        assert (c.v / float(table.sigma[0])) ** 2 == pytest.approx(gap, rel=1e-4), f"log-SNR {level}"


def test_the_last_step_is_the_clean_estimate():
    table = Schedule.from_log_snr(torch.linspace(5, -5, 4))
    for eta in (0.0, 1.0):
        c = step_coefficients(table, 0, None, eta)
        assert (c.x0, c.x, c.v) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_state_has_the_spread_of_unit_data(family):
    table = schedule(family, torch.linspace(7, -12, 30, dtype=torch.float64))
    for t in (0, 10, 29):
        expected = math.sqrt(float(table.alpha[t]) ** 2 + float(table.sigma[t]) ** 2)
        assert table.start_std(t) == pytest.approx(expected, rel=1e-12)
        if family == "vp":
            assert table.start_std(t) == pytest.approx(1.0, rel=1e-12)


def test_a_zero_snr_end_is_dropped_where_variance_preserving():
    bar = torch.tensor([0.99, 0.5, 0.1, 0.0], dtype=torch.float64)
    table = Schedule.variance_preserving(bar)
    assert len(table) == 3
    torch.testing.assert_close(table.alpha**2 + table.sigma**2, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [
        ([0.9, 0.5], [0.1, 0.5, 0.9], "one length"),
        ([0.9, float("nan")], [0.1, 0.5], "finite"),
        ([0.9, 0.5], [0.0, 0.5], "sigma > 0"),
        ([0.9, -0.5], [0.1, 0.5], "alpha >= 0"),
        ([0.5, 0.9], [0.5, 0.1], "fall"),
        ([0.5, 0.5], [0.5, 0.5], "fall"),
        ([0.5, 0.0, 0.0], [0.5, 0.9, 1.0], "fall"),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(alpha, sigma, message):
    with pytest.raises(ValueError, match=message):
        Schedule(torch.tensor(alpha), torch.tensor(sigma), torch.arange(len(alpha)))


def test_steps_that_are_no_chain_are_refused():
    table = Schedule.from_log_snr(torch.linspace(5, -5, 10))
    for steps, spacing, message in [
        (0, "log-snr", "1 to 10"),
        (11, "index", "1 to 10"),
        (5, "karras", "spacing"),
    ]:
        with pytest.raises(ValueError, match=message):
            step_indices(table, steps, spacing)
    for indices in ([], [3, 3, 1], [1, 2], [10, 4], [4, -1]):
        with pytest.raises(ValueError, match="step"):
            check_steps(table, indices)
