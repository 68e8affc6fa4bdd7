"""Laws of guidance: where twists are known in closed form they are met, a step costs one forward, rows never meet."""

import math

import pytest
import torch

from tiltlens.constraint import Constraint
from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import DPS, LGD, MPGD, Calibrated, Exact, Learned, MomentMatched
from tiltlens.guidance.guidance import PilotTables, Step, clean_spread
from tiltlens.priors import GaussianMixture
from tiltlens.units import Projection, UnitBank
from tiltlens.units.calibration import Natural

W = [[1.0, -0.5], [0.3, 0.8]]  # two units of a plane
PLANE = GaussianMixture([0.6, 0.4], [[-1.0, 0.2], [0.8, 0.5]], [0.3, 0.1], points=200)
GAUSSIAN = GaussianMixture([1.0], [[0.4, -0.3]], [0.5], points=200)
STEPS = 10
GUIDANCES = {
    "dps": DPS, "lgd": LGD, "mpgd": MPGD, "moment matched": MomentMatched, "exact": Exact, "calibrated": Calibrated,
    "calibrated, no memory": lambda profile=None: Calibrated(memory=0, profile=profile), "learned": Learned,
    "calibrated, gaussian": lambda profile=None: Calibrated(law="gaussian", finite=False, profile=profile),
}  # fmt: skip
each = pytest.mark.parametrize("name", GUIDANCES)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ACTIVATIONS = torch.cat([0.3 * normal(50), 1.5 + 0.2 * normal(10)]).sort().values


def pilot_tables(slope=1.0, residual=0.0, units=2):
    """Slopes by hand; the log-SNR levels are one apart."""
    table = torch.as_tensor(slope, dtype=torch.float64).expand(units, STEPS).clone()
    log_snr = torch.arange(STEPS, dtype=torch.float64) - 5
    return PilotTables(table, torch.zeros_like(table), torch.full_like(table, residual), log_snr)


def constraint(prior, energy, directions=W):
    bank = UnitBank([Projection(w) for w in directions])
    naturals = [Natural(torch.zeros(1), torch.ones(1), 0.0, 1.0, ACTIVATIONS.clone()) for _ in bank.units]
    return Constraint(bank, energy, naturals, prior.decode)


def bind(guidance, prior, energy, strengths, which=None, tables=None, directions=W):
    """The prepared guidance and its rows."""
    all_units = constraint(prior, energy, directions)
    guidance.prepare(tables or pilot_tables(units=len(directions)), prior, all_units)
    which = torch.zeros(len(strengths), dtype=torch.long) if which is None else torch.tensor(which)
    return guidance, all_units.rows(which, torch.tensor(strengths, dtype=torch.float64))


def step(prior, t=100, number=0, rows=1):
    """Row i has the same twist noise in every batch."""

    def twist_noise(count):
        g = [torch.Generator().manual_seed(i) for i in range(rows)]
        return torch.stack(
            [torch.randn(count, *prior.denoiser.shape, dtype=torch.float64, generator=k) for k in g]
        )

    return Step(number, t, prior.denoiser.schedule, False, twist_noise)


def shift(guidance, rows, prior, x, t=100, number=0, denoiser=None, memory=None):
    memory = guidance.start(x) if memory is None else memory
    denoiser = denoiser or prior.denoiser.for_steps({})
    return guidance(denoiser, x, step(prior, t, number, len(x)), rows, memory)


def watched():
    """The denoiser of the plane, and a list that says of each of its forwards whether a graph was kept."""
    denoiser, graphs = PLANE.denoiser.for_steps({}), []
    posterior = denoiser.posterior  # what every forward, and that of Exact, begins with

    def watch(x_t, t):
        graphs.append(torch.is_grad_enabled() and x_t.requires_grad)
        return posterior(x_t, t)

    denoiser.posterior = watch
    return denoiser, graphs


# --- closed forms ------------------------------------------------------------------------


def posterior_variance(t):
    """Of x_0 given x_t, for the one Gaussian, along any direction."""
    alpha, sigma = float(GAUSSIAN.denoiser.schedule.alpha[t]), float(GAUSSIAN.denoiser.schedule.sigma[t])
    return 0.5 * sigma**2 / (alpha**2 * 0.5 + sigma**2)


@pytest.mark.parametrize("energy", [Linear(False), Target(1.0, 0.6, False)], ids=["linear", "target"])
@pytest.mark.parametrize("t", [20, 100, 180])
def test_on_a_gaussian_moment_matched_and_calibrated_are_exact(energy, t):
    """There a(x_0) | x_t is Gaussian and x0_hat affine: w is the posterior variance, the slope 1, and the residual
    variance of a perfect pilot again w."""
    x, strengths = normal(4, 2), [0.2, 1.0, 3.0, 10.0]
    tables = pilot_tables(1.0, 1.25 * posterior_variance(t))
    exact = shift(*bind(Exact(), GAUSSIAN, energy, strengths), GAUSSIAN, x, t).shift
    for guidance in (MomentMatched(), Calibrated(memory=0, law="gaussian")):
        found = shift(*bind(guidance, GAUSSIAN, energy, strengths, tables=tables), GAUSSIAN, x, t).shift
        name = type(guidance).__name__
        torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-6, msg=lambda e: f"{name}: {e}")  # noqa: B023


def test_exact_reads_the_standardised_activation_too():
    """Against MomentMatched, on a Gaussian, where z = (a - 0.4)/1.7."""
    bank, x, found = UnitBank([Projection(W[0])]), normal(3, 2), []
    one = torch.ones(1, dtype=torch.float64)
    natural = Natural(0 * one, one, 0.4, 1.7, torch.empty(0))
    for guidance in (Exact(), MomentMatched()):
        units = Constraint(bank, Target("z=1.5", 0.6), [natural], GAUSSIAN.decode)
        guidance.prepare(None, GAUSSIAN, units)
        rows = units.rows(torch.zeros(3, dtype=torch.long), torch.tensor([0.2, 1.0, 5.0]).double())
        found.append(shift(guidance, rows, GAUSSIAN, x).shift)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t", [20, 100, 180])
def test_every_twist_of_a_linear_energy_agrees_on_a_gaussian(t):
    """log psi = s a(x0_hat) + const; the shift is s (sigma^2/alpha) (d x0_hat/d x_t) w = s Cov(x_0 | x_t) w."""
    x, s = normal(3, 2), 1.7
    expected = (s * posterior_variance(t) * torch.tensor(W[0], dtype=torch.float64)).expand(3, 2)
    for guidance in (
        Exact(),
        MomentMatched(),
        DPS(),
        LGD(),
        Calibrated(memory=0, law="gaussian"),
        Calibrated(memory=3.0, law="gaussian"),
    ):
        found = shift(*bind(guidance, GAUSSIAN, Linear(False), [s] * 3), GAUSSIAN, x, t).shift
        name = type(guidance).__name__
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=lambda e: f"{name}: {e}")  # noqa: B023


def test_calibrated_without_memory_has_the_direction_of_dps_and_the_length_of_its_slope():
    x, linear = normal(5, 2), Linear(False)
    dps = shift(*bind(DPS(), PLANE, linear, [1.0] * 5), PLANE, x).shift
    calibrated = bind(Calibrated(memory=0), PLANE, linear, [1.0] * 5, tables=pilot_tables(0.3))
    torch.testing.assert_close(shift(*calibrated, PLANE, x).shift, 0.3 * dps)


def test_lgd_approaches_its_definition():
    """psi = E[exp(-s E(x0_hat + r xi))] = exp(log_tilt(a(x0_hat), r^2 |w|^2)), in closed form for a projection."""
    x, energy, guidance, t = normal(3, 2), Target(1.0, 0.8, False), LGD(samples=20_000, sigma_data=0.5), 100
    guidance, rows = bind(guidance, GAUSSIAN, energy, [1.0] * 3)
    clean = GAUSSIAN.denoiser(x, t).requires_grad_()
    w = torch.tensor(W[0], dtype=torch.float64)
    h, _, _ = guidance.cotangent(clean, step(GAUSSIAN, t, rows=3), rows, None)
    variance = clean_spread(step(GAUSSIAN, t), 0.5) ** 2 * float(w @ w)
    (expected,) = torch.autograd.grad(rows.log_tilt(clean @ w, variance).sum(), clean)
    torch.testing.assert_close(h, expected, atol=0.03, rtol=0.03)


def test_mpgd_shifts_by_the_assumed_covariance_times_the_gradient():
    x, t, energy = normal(4, 2), 100, Target(1.0, 0.6, False)
    guidance, rows = bind(MPGD(sigma_data=0.7), PLANE, energy, [2.0] * 4)
    clean = PLANE.denoiser(x, t).requires_grad_()
    (h,) = torch.autograd.grad((-2.0 * energy(clean @ torch.tensor(W[0]).double(), 1.0)).sum(), clean)
    schedule = PLANE.denoiser.schedule
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    r2 = sigma**2 * 0.49 / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(shift(guidance, rows, PLANE, x, t).shift, r2 * h)


# --- laws of all -------------------------------------------------------------------------


@each
def test_a_guided_step_costs_one_forward_and_an_unguided_one_no_graph(name):
    guidance, rows = bind(GUIDANCES[name](profile=[0.4, 0.6]), PLANE, Linear(False), [1.0, 0.0])
    _, silent = bind(guidance, PLANE, Linear(False), [0.0, 0.0])
    for t, bound, guided in [(100, rows, True), (20, rows, False), (190, rows, False), (100, silent, False)]:
        denoiser, graphs = watched()
        out = shift(guidance, bound, PLANE, normal(2, 2), t, denoiser=denoiser)
        assert graphs == [guided and name != "mpgd"], f"{name}, t {t}: a graph for each forward: {graphs}"
        assert (out.shift is not None) == guided, f"{name}, t {t}"
        assert not out.x0_hat.requires_grad
        assert not guided or not out.shift.requires_grad


@each
@pytest.mark.parametrize("energy", [Linear(False), Target(1.0, 0.6, False)], ids=["linear", "target"])
def test_log_psi_is_the_twist_whose_gradient_is_followed(name, energy):
    """Central differences of log_psi along a direction give <g, direction>; on a Gaussian moment matching too. MPGD, which
    takes no gradient through the denoiser, only hands over the value of DPS. Rows of strength 0 are not read."""
    made, rows = bind(GUIDANCES[name](), GAUSSIAN, energy, [1.5, 0.0, 0.4], tables=pilot_tables(0.7, 0.2))
    x, along, h = normal(3, 2), normal(3, 2, seed=1), 1e-4
    out = shift(made, rows, GAUSSIAN, x)
    assert out.reads.tolist() == [True, False, True], name
    assert out.log_psi.dtype == torch.float64, name
    if name == "mpgd":
        dps, _ = bind(DPS(), GAUSSIAN, energy, [1.5, 0.0, 0.4])
        torch.testing.assert_close(out.log_psi, shift(dps, rows, GAUSSIAN, x).log_psi)
        return
    up, down = (shift(made, rows, GAUSSIAN, x + k * h * along).log_psi for k in (1, -1))
    here = step(GAUSSIAN)
    g = out.shift * here.alpha / here.sigma**2
    found, expected = ((up - down) / (2 * h))[out.reads], (g * along).sum(1)[out.reads]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=lambda e: f"{name}: {e}")


@each
def test_the_profile_scales_the_shift(name):
    x, full = normal(3, 2), None
    for profile, weight in [
        (None, 1),
        ([0, 1], 1),
        ([0.4, 0.6], 1),
        (lambda u: 0.25, 0.25),
        (lambda u: 4 * u, 4 * 100 / 199),
    ]:
        found = shift(
            *bind(GUIDANCES[name](profile=profile), PLANE, Linear(False), [1.0] * 3), PLANE, x
        ).shift
        full = found if full is None else full
        torch.testing.assert_close(found, weight * full, msg=lambda e: f"{name}, {profile}: {e}")  # noqa: B023


@pytest.mark.parametrize("profile", [[0.5], [0.6, 0.4], [-0.1, 1], [0, 1.5], "late", 3])
def test_a_profile_of_no_known_form_is_refused(profile):
    with pytest.raises(ValueError, match="profile"):
        DPS(profile)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, None, "1"])
def test_a_callable_profile_is_a_weight_everywhere(value):
    with pytest.raises(
        ValueError, match=r"DPS: profile gives .* at t = 0.5 .* expected a finite weight >= 0"
    ):
        DPS(lambda t: value if t == 0.5 else 1.0)
    assert DPS(lambda t: torch.tensor(t)).weight(step(PLANE)) > 0


@each
@pytest.mark.parametrize(
    "energy", [Linear(False), Target(1.0, 0.5, False), Threshold(1.0, False)], ids=lambda e: type(e).__name__
)
def test_rows_of_a_batch_are_rows_alone(name, energy):
    """Different units and strengths; strength 0 is exactly no shift; a row's gradient scaled leaves the others."""
    x, strengths, which = normal(4, 2), [1.0, 0.0, 5.0, 0.3], [0, 1, 1, 0]
    slope = torch.tensor([[0.5], [1.0]])
    together = shift(
        *bind(GUIDANCES[name](), PLANE, energy, strengths, which, pilot_tables(slope)), PLANE, x
    ).shift
    assert together[1].abs().max() == 0, f"{name}: strength 0 is shifted"
    changed = shift(
        *bind(GUIDANCES[name](), PLANE, energy, [1.0, 0.0, 500.0, 0.3], which, pilot_tables(slope)), PLANE, x
    ).shift
    torch.testing.assert_close(
        changed[[0, 1, 3]], together[[0, 1, 3]], msg=lambda e: f"{name}: rows meet: {e}"
    )
    if name == "lgd":  # its twist noise is by place here; tests/test_chain.py has rows by name
        return
    for i in (0, 2, 3):
        one = bind(
            GUIDANCES[name](), PLANE, energy, strengths[i : i + 1], which[i : i + 1], pilot_tables(slope)
        )
        torch.testing.assert_close(
            together[i], shift(*one, PLANE, x[i : i + 1]).shift[0], msg=lambda e: f"{name}: {e}"
        )


class Raised(Target):
    """E + 7."""

    def __call__(self, z, level=0.0):
        return super().__call__(z, level) + 7

    def log_tilt(self, mean, variance, strength, level=0.0):
        return super().log_tilt(mean, variance, strength, level) - 7 * strength


@each
def test_a_constant_in_the_energy_shifts_nothing(name):
    x = normal(3, 2)
    plain, raised = (
        shift(*bind(GUIDANCES[name](), PLANE, kind(1.0, 0.5, False), [0.7] * 3), PLANE, x).shift
        for kind in (Target, Raised)
    )
    torch.testing.assert_close(raised, plain, atol=1e-9, rtol=1e-9, msg=lambda e: f"{name}: {e}")


def test_what_a_method_needs_is_asked_for():
    units = constraint(PLANE, Linear(False))
    with pytest.raises(ValueError, match="pilot"):
        Calibrated().prepare(None, PLANE, units)
    with pytest.raises(ValueError, match="analytic"):
        Exact().prepare(None, object(), units)
    for bad in (
        lambda: Calibrated(memory=-1),
        lambda: Calibrated(smoothing=0),
        lambda: Calibrated(blend=1.5),
        lambda: Calibrated(blend=float("nan")),
        lambda: LGD(samples=0),
        lambda: MPGD(0.0),
    ):
        with pytest.raises(ValueError, match="found"):
            bad()
