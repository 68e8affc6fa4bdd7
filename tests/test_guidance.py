"""Laws of guidance: where twists are known in closed form they are met, a step costs one forward, rows never meet."""

import math

import pytest
import torch

from tiltlens.constraint import Constraint
from tiltlens.denoiser import Denoiser
from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import DPS, LGD, MPGD, Calibrated, Exact, MomentMatched
from tiltlens.guidance.guidance import PilotTables, Step, clean_spread
from tiltlens.priors import GaussianMixture
from tiltlens.schedule import Schedule
from tiltlens.units import Projection, UnitBank
from tiltlens.units.calibration import Natural

W = [[1.0, -0.5], [0.3, 0.8]]  # two units of a plane
PLANE = GaussianMixture([0.6, 0.4], [[-1.0, 0.2], [0.8, 0.5]], [0.3, 0.1], points=200)
GAUSSIAN = GaussianMixture([1.0], [[0.4, -0.3]], [0.5], points=200)
STEPS = 10
GUIDANCES = {
    "dps": DPS, "lgd": LGD, "mpgd": MPGD, "moment matched": MomentMatched, "exact": Exact, "calibrated": Calibrated,
    "calibrated, no memory": lambda profile=None: Calibrated(memory=0, profile=profile),
}  # fmt: skip
each = pytest.mark.parametrize("name", GUIDANCES)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pilot_tables(slope=1.0, residual=0.0, units=2):
    """Slopes by hand; the log-SNR levels are one apart."""
    table = torch.as_tensor(slope, dtype=torch.float64).expand(units, STEPS).clone()
    log_snr = torch.arange(STEPS, dtype=torch.float64) - 5
    return PilotTables(table, torch.zeros_like(table), torch.full_like(table, residual), log_snr)


def constraint(prior, energy, directions=W):
    bank = UnitBank([Projection(w) for w in directions])
    return Constraint(bank, energy, [Natural.identity(u) for u in bank.units], prior.decode)


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
        return torch.stack([torch.randn(count, *prior.denoiser.shape, dtype=torch.float64, generator=k) for k in g])

    return Step(number, t, prior.denoiser.schedule, False, twist_noise)


def shift(guidance, rows, prior, x, t=100, number=0, denoiser=None, memory=None):
    memory = guidance.start(x) if memory is None else memory
    denoiser = denoiser or prior.denoiser.for_steps({})
    return guidance(denoiser, x, step(prior, t, number, len(x)), rows, memory)


class Watch(Denoiser):
    """Counts forwards and says whether a graph was kept; `posterior` is the forward of `Exact`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.schedule, self.shape, self.graphs = inner, inner.schedule, inner.shape, []

    def forward(self, x_t, t):
        self.graphs.append(torch.is_grad_enabled() and x_t.requires_grad)
        return self.inner(x_t, t)

    def posterior(self, x_t, t):
        self.graphs.append(torch.is_grad_enabled() and x_t.requires_grad)
        return self.inner.posterior(x_t, t)

    def corrected(self, *arguments):
        return self.inner.corrected(*arguments)


# --- closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [Linear(False), Target(1.0, 0.6, False)], ids=["linear", "target"])
@pytest.mark.parametrize("t", [20, 100, 180])
def test_moment_matched_is_exact_on_a_gaussian(energy, t):
    """There a(x_0) | x_t is Gaussian and x0_hat affine, so that w is the posterior variance."""
    x, strengths = normal(4, 2), [0.2, 1.0, 3.0, 10.0]
    exact = shift(*bind(Exact(), GAUSSIAN, energy, strengths), GAUSSIAN, x, t).shift
    matched = shift(*bind(MomentMatched(), GAUSSIAN, energy, strengths), GAUSSIAN, x, t).shift
    torch.testing.assert_close(matched, exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t", [20, 100, 180])
def test_every_twist_of_a_linear_energy_agrees_on_a_gaussian(t):
    """log psi = s a(x0_hat) + const, slope exactly 1; the shift is s (sigma^2/alpha) (d x0_hat/d x_t) w = s Cov w."""
    x, s = normal(3, 2), 1.7
    schedule = GAUSSIAN.denoiser.schedule
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    covariance = 0.5 * sigma**2 / (alpha**2 * 0.5 + sigma**2)
    expected = (s * covariance * torch.tensor(W[0], dtype=torch.float64)).expand(3, 2)
    for guidance in (Exact(), MomentMatched(), DPS(), LGD(), Calibrated(memory=0), Calibrated(memory=3.0)):
        found = shift(*bind(guidance, GAUSSIAN, Linear(False), [s] * 3), GAUSSIAN, x, t).shift
        name = type(guidance).__name__
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=lambda e: f"{name}: {e}")  # noqa: B023


def test_calibrated_without_memory_has_the_direction_of_dps_and_the_length_of_its_slope():
    x = normal(5, 2)
    dps = shift(*bind(DPS(), PLANE, Linear(False), [1.0] * 5), PLANE, x).shift
    found = shift(*bind(Calibrated(memory=0), PLANE, Linear(False), [1.0] * 5, tables=pilot_tables(0.3)), PLANE, x).shift
    torch.testing.assert_close(found, 0.3 * dps)


def test_calibrated_uses_the_residual_variance():
    """Target on a Gaussian, with the true residual variance: the exact twist."""
    x, t = normal(4, 2), 100
    schedule, w = GAUSSIAN.denoiser.schedule, torch.tensor(W[0], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    tables = pilot_tables(1.0, float(w @ w) * 0.5 * sigma**2 / (alpha**2 * 0.5 + sigma**2))
    energy = Target(1.0, 0.6, False)
    exact = shift(*bind(Exact(), GAUSSIAN, energy, [2.0] * 4), GAUSSIAN, x, t).shift
    found = shift(*bind(Calibrated(memory=0), GAUSSIAN, energy, [2.0] * 4, tables=tables), GAUSSIAN, x, t).shift
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=1e-9)


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


# --- memory ------------------------------------------------------------------------------


class Identity(Denoiser):
    """x0_hat = x_t: what is pulled back is what was remembered."""

    def __init__(self, shape, schedule):
        super().__init__()
        self.shape, self.schedule = shape, schedule

    def forward(self, x_t, t):
        return x_t.clone()


@pytest.mark.parametrize("memory", [0.0, 0.5, 4.0])
def test_memory_is_a_running_average_without_bias(memory):
    """h_k = sum_j (1 - b) b^(k-j) grad_j / (1 - b^k), b = exp(-1/memory), from the first slope that is not zero."""
    energy, slopes = Target(1.0, 0.7, False), torch.tensor([0, 0, 0.2, 0.5, 0.8, 1, 1, 1, 1, 1]).double()
    guidance, rows = bind(Calibrated(memory), PLANE, energy, [1.5] * 3, tables=pilot_tables(slopes))
    denoiser, t = Identity((2,), PLANE.denoiser.schedule), 100
    factor = float(denoiser.schedule.sigma[t] ** 2 / denoiser.schedule.alpha[t])
    w, b, held, gradients = torch.tensor(W[0]).double(), math.exp(-1 / memory) if memory else 0.0, None, []
    for number in range(STEPS):
        x = normal(3, 2, seed=number)
        out = shift(guidance, rows, PLANE, x, t, number, denoiser, held)
        held = out.memory
        if slopes[number] == 0:
            assert out.shift is None, f"step {number} has slope zero and was guided"
            continue
        # the force of the twist is at the regressed mean, slope * u
        u = slopes[number] * (x @ w)
        gradients.append(-1.5 * (u - 1.0)[:, None] / 0.49 * w)
        k = len(gradients)
        weights = torch.tensor([(1 - b) * b ** (k - 1 - j) / (1 - b**k) for j in range(k)], dtype=torch.float64)
        expected = slopes[number] * factor * (weights[:, None, None] * torch.stack(gradients)).sum(0)
        torch.testing.assert_close(out.shift, expected, msg=lambda e: f"memory {memory}, step {number}: {e}")  # noqa: B023


def test_smoothing_averages_the_gradient_over_views():
    """Two views: the image and its mirror image; of a linear unit the mean of w and the mirrored w."""
    w = normal(3 * 8 * 8).reshape(3, 8, 8)
    images = normal(2, 3, 8, 8, seed=1)
    guidance, rows = bind(Calibrated(0, smoothing=2), PLANE, Linear(False), [1.0] * 2, directions=[w.flatten().tolist()])
    denoiser = Identity((3, 8, 8), PLANE.denoiser.schedule)
    found = guidance(denoiser, images, step(PLANE), rows, guidance.start(images)).shift
    factor = float(denoiser.schedule.sigma[100] ** 2 / denoiser.schedule.alpha[100])
    torch.testing.assert_close(found, (factor * (w + w.flip(-1)) / 2).expand(2, 3, 8, 8))


# --- laws of all -------------------------------------------------------------------------


@each
def test_a_guided_step_costs_one_forward_and_an_unguided_one_no_graph(name):
    guidance, rows = bind(GUIDANCES[name](profile=[0.4, 0.6]), PLANE, Linear(False), [1.0, 0.0])
    _, silent = bind(guidance, PLANE, Linear(False), [0.0, 0.0])
    for t, bound, guided in [(100, rows, True), (20, rows, False), (190, rows, False), (100, silent, False)]:
        watch = Watch(PLANE.denoiser.for_steps({}))
        out = shift(guidance, bound, PLANE, normal(2, 2), t, denoiser=watch)
        assert watch.graphs == [guided and name != "mpgd"], f"{name}, t {t}: a graph for each forward: {watch.graphs}"
        assert (out.shift is not None) == guided, f"{name}, t {t}"
        assert not out.x0_hat.requires_grad
        assert not guided or not out.shift.requires_grad


@each
def test_the_profile_scales_the_shift(name):
    x, full = normal(3, 2), None
    for profile, weight in [(None, 1), ([0, 1], 1), ([0.4, 0.6], 1), (lambda u: 0.25, 0.25), (lambda u: 4 * u, 4 * 100 / 199)]:
        found = shift(*bind(GUIDANCES[name](profile=profile), PLANE, Linear(False), [1.0] * 3), PLANE, x).shift
        full = found if full is None else full
        torch.testing.assert_close(found, weight * full, msg=lambda e: f"{name}, {profile}: {e}")  # noqa: B023


@pytest.mark.parametrize("profile", [[0.5], [0.6, 0.4], [-0.1, 1], [0, 1.5], "late", 3])
def test_a_profile_of_no_known_form_is_refused(profile):
    with pytest.raises(ValueError, match="profile"):
        DPS(profile)


@each
@pytest.mark.parametrize("energy", [Linear(False), Target(1.0, 0.5, False), Threshold(1.0, False)], ids=lambda e: type(e).__name__)
def test_rows_of_a_batch_are_rows_alone(name, energy):
    """Different units and strengths; strength 0 is exactly no shift; a row's gradient scaled leaves the others."""
    x, strengths, which = normal(4, 2), [1.0, 0.0, 5.0, 0.3], [0, 1, 1, 0]
    slope = torch.tensor([[0.5], [1.0]])
    together = shift(*bind(GUIDANCES[name](), PLANE, energy, strengths, which, pilot_tables(slope)), PLANE, x).shift
    assert together[1].abs().max() == 0, f"{name}: strength 0 is shifted"
    changed = shift(*bind(GUIDANCES[name](), PLANE, energy, [1.0, 0.0, 500.0, 0.3], which, pilot_tables(slope)), PLANE, x).shift
    torch.testing.assert_close(changed[[0, 1, 3]], together[[0, 1, 3]], msg=lambda e: f"{name}: rows meet: {e}")
    if name == "lgd":  # its twist noise is by place here; tests/test_chain.py has rows by name
        return
    for i in (0, 2, 3):
        one = bind(GUIDANCES[name](), PLANE, energy, strengths[i : i + 1], which[i : i + 1], pilot_tables(slope))
        torch.testing.assert_close(together[i], shift(*one, PLANE, x[i : i + 1]).shift[0], msg=lambda e: f"{name}: {e}")


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
        shift(*bind(GUIDANCES[name](), PLANE, kind(1.0, 0.5, False), [0.7] * 3), PLANE, x).shift for kind in (Target, Raised)
    )
    torch.testing.assert_close(raised, plain, atol=1e-9, rtol=1e-9, msg=lambda e: f"{name}: {e}")


def test_what_a_method_needs_is_asked_for():
    units = constraint(PLANE, Linear(False))
    with pytest.raises(ValueError, match="pilot"):
        Calibrated().prepare(None, PLANE, units)
    with pytest.raises(ValueError, match="analytic"):
        Exact().prepare(None, object(), units)
    for bad in (lambda: Calibrated(memory=-1), lambda: Calibrated(smoothing=0), lambda: LGD(samples=0), lambda: MPGD(0.0)):
        with pytest.raises(ValueError, match="found"):
            bad()


def test_a_table_that_ends_in_pure_noise_is_not_guided_there():
    """sigma^2/alpha has no meaning at alpha = 0."""
    schedule = Schedule(torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.1, 0.5, 1.0]), torch.arange(3))
    guidance, rows = bind(DPS(), PLANE, Linear(False), [1.0])
    out = guidance(Identity((2,), schedule), normal(1, 2), Step(0, 2, schedule, False, None), rows, None)
    assert out.shift is None
