"""Laws of the natural twist: the Gaussian one for a Gaussian unit, the exact one where x_t is a Gaussian channel."""

from dataclasses import replace

import pytest
import torch

from tiltlens.constraint import Constraint
from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import Calibrated, Learned
from tiltlens.guidance.channel import NaturalLaws
from tiltlens.guidance.guidance import PilotTables, Step
from tiltlens.priors import GaussianMixture
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank
from tiltlens.units.calibration import Natural

ENERGIES = {"linear": Linear(False), "target": Target(1.0, 0.8, False), "threshold": Threshold(1.5, False)}
LINE = ([0.9, 0.1], [[-0.3], [2.7]], [0.1, 0.2])  # a class: a rare mode far from the rest
N = 1000


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rare(count=256, seed=0):
    """Activations of a unit with a rare mode, mean 0 and standard deviation 1."""
    a = 0.3 * normal(count, seed=seed)
    a[: count // 10] += 3
    return (a - a.mean()) / a.std()


def one_gaussian(mean, variance, kappa):
    """A natural law that is Gaussian: one atom."""
    return NaturalLaws(torch.tensor([[mean]]).double(), torch.tensor([variance]).double(), torch.tensor([[kappa]]).double())  # fmt: skip


def rows_of(energy, strengths, prior):
    bank = UnitBank([Projection([1.0])])
    all_units = Constraint(bank, energy, [Natural.identity(u) for u in bank.units], prior.decode)
    return all_units.rows(torch.zeros(len(strengths), dtype=torch.long), torch.as_tensor(strengths).double())


def at(number):
    return Step(number, 0, None, False, None)


@pytest.mark.parametrize("energy", ENERGIES)
def test_of_a_gaussian_unit_it_is_the_gaussian_twist(energy):
    variance, kappa, strengths = 0.7, 2.3, torch.linspace(0.2, 3, 6)
    residual = 1 / (1 / variance + kappa)
    prior, mean = GaussianMixture(*LINE), normal(6).requires_grad_()
    rows = rows_of(ENERGIES[energy], strengths, prior)
    guidance = Calibrated(law="natural")
    guidance._natural = one_gaussian(0.4, variance, kappa)
    found = guidance.log_psi(mean, torch.zeros(6), at(0), rows)
    expected = rows.log_tilt(mean, residual)
    torch.testing.assert_close(found, expected)
    forces = [torch.autograd.grad(x.sum(), mean)[0] for x in (found, expected)]
    torch.testing.assert_close(*forces)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("t", [100, 400, 800])
def test_where_x_t_is_the_channel_it_is_the_exact_twist(energy, t):
    """In one dimension x_t tells of x_0 what a channel of precision alpha^2/sigma^2 tells: psi is exact, gradient and all."""
    weights, means, variances = LINE
    counts = [9, 1]  # equal atoms in the mixture's shares; the narrower variance for both
    variances = [variances[0]] * 2
    prior = GaussianMixture(weights, means, variances)
    schedule = prior.denoiser.schedule
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    atoms = torch.tensor([means[0][0]] * counts[0] + [means[1][0]] * counts[1]).double()
    law = NaturalLaws(atoms[None], torch.tensor([variances[0]]).double(), torch.tensor([[alpha**2 / sigma**2]]).double())  # fmt: skip
    x_t = torch.linspace(-1.5, 3, 8).double()[:, None].requires_grad_()
    rows = rows_of(ENERGIES[energy], torch.linspace(0.3, 4, 8), prior)
    guidance = Calibrated(law="natural")
    guidance._natural = law
    mean = prior.denoiser(x_t, t)[:, 0]
    found = guidance.log_psi(mean, torch.zeros(8), at(0), rows)
    posterior = prior.denoiser.posterior(x_t, t)
    exact = prior.log_psi(posterior, torch.ones(8, 1).double(), rows.energy, rows.strength, rows.level)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(x.sum(), x_t, retain_graph=True)[0] for x in (found, exact)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


def test_the_channel_leaves_the_residual_variance():
    """Of a Gaussian unit kappa is known; of any other the mean posterior variance, over what the channel says, is the residual's."""
    residual = torch.tensor([[0.95, 0.6, 0.3, 0.05]])
    a = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)
    law = NaturalLaws.of([a], residual)
    torch.testing.assert_close(law.kappa[0], 1 / residual[0].double() - 1, rtol=0.03, atol=0.01)
    law = NaturalLaws.of([rare()], residual)
    count = 40_000
    for k, expected in enumerate(residual[0].tolist()):
        pick = torch.randint(law.atoms.shape[1], (count,), generator=torch.Generator().manual_seed(k))
        drawn = law.atoms[0][pick] + law.width2[0].sqrt() * normal(count, seed=k)
        kappa = law.kappa[0, k]
        lam = kappa * drawn + kappa.sqrt() * normal(count, seed=k + 10)
        left = law.rows(torch.zeros(count, dtype=torch.long), k, lam).moments(lam)[1]
        se = float(left.std()) / count**0.5
        assert abs(float(left.mean()) - expected) < 4 * se + 0.02 * expected


def test_the_natural_law_has_the_activations_moments():
    """Atoms and their widths: mean and variance of what they came from, whatever the shape; few activations will do."""
    for a in (rare(), normal(400) * 3 + 5, normal(8), rare(1000).exp()):
        law = NaturalLaws.of([a], torch.ones(1, 3))
        variance = law.atoms[0].var(unbiased=False) + law.width2[0]
        torch.testing.assert_close(law.atoms[0].mean(), a.mean())
        torch.testing.assert_close(variance, a.var(), rtol=1e-6, atol=1e-9)


def test_the_mean_is_met_and_force_is_greater_where_a_mode_can_be_reached():
    residual = torch.tensor([[1.0, 0.5, 0.1, 1e-4, 0.0]])
    law, mu = NaturalLaws.of([rare()], residual), torch.linspace(-3, 8, 23).double()
    which = torch.zeros(23, dtype=torch.long)
    for number in range(5):
        channel = law.rows(which, number, mu)
        torch.testing.assert_close(channel.moments(channel.at(mu))[0], mu, rtol=1e-6, atol=1e-6)
    channel = law.rows(which[:2], 1, mu)
    lam = channel.at(torch.tensor([0.0, 2.7]).double())
    m, v = channel.moments(lam)
    outside, inside = (channel.moments(lam + 1.0)[0] - m) / v
    assert outside > 1.3
    assert inside < 0.8


def test_beyond_the_highest_activation_it_is_the_gaussian_twist():
    """The force of a linear energy: the law's own at small strengths, the strength at great ones, where the law alone would stop pushing."""
    a, residual, strengths = rare(64), torch.tensor([[0.5]]), [0.3, 1.0, 20.0]
    law, prior = NaturalLaws.of([a], residual), GaussianMixture(*LINE)
    assert law.beyond.tolist() == [1 / 65]
    rows, forces = rows_of(Linear(False), strengths, prior), []
    for natural in (law, replace(law, beyond=None)):
        mean = torch.zeros(3).double().requires_grad_()
        tilt = natural.log_tilt(rows, 0, mean, residual[0].double().expand(3))
        forces.append(torch.autograd.grad(tilt.sum(), mean)[0] / torch.tensor(strengths).double())
    whole, alone = forces
    torch.testing.assert_close(whole[:2], alone[:2], rtol=0.03, atol=0)
    assert whole[2] == pytest.approx(1, rel=0.05)
    assert alone[2] < 0.6


def test_a_row_is_the_same_in_any_company():
    laws = NaturalLaws.of([rare(), normal(100), normal(40)], torch.tensor([[0.9, 0.3]] * 3))
    which, mu = torch.tensor([0, 1, 2, 1]), normal(4)
    together = laws.rows(which, 1, mu).at(mu)
    alone = torch.cat([laws.rows(which[i : i + 1], 1, mu).at(mu[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_a_unit_without_natural_activations_has_the_gaussian_twist():
    guidance, prior = Calibrated(law="natural"), GaussianMixture(*LINE)
    table = torch.full((1, 3), 0.5)
    rows = rows_of(Linear(False), [1.0], prior)
    tables = PilotTables(table, torch.zeros_like(table), table, torch.arange(3).double())
    bank = UnitBank([Projection([1.0])])
    guidance.prepare(
        tables, prior, Constraint(bank, Linear(False), [Natural.identity(bank.units[0])], prior.decode)
    )
    found = guidance.log_psi(torch.tensor([0.7]), torch.tensor([0.4]), at(1), rows)
    torch.testing.assert_close(found, rows.log_tilt(torch.tensor([0.7]), torch.tensor([0.4])))


def test_a_law_of_no_known_name_is_refused():
    for kind in (Calibrated, Learned):
        with pytest.raises(ValueError, match="law must be one of gaussian, natural, found 'cauchy'"):
            kind(law="cauchy")


@pytest.mark.parametrize(("energy", "share"), [("linear", 1.0), ("target", 0.5)])
@pytest.mark.parametrize("memory", [0.0, 2.0])
def test_weights_stay_exact_and_the_gap_falls_on_a_rare_mode(energy, share, memory):
    """log Z is that of the mixture; the gap, path KL + s E + log Z, is below a share of the Gaussian law's, on the same noise."""
    prior, e = GaussianMixture(*LINE, points=200), ENERGIES[energy]
    log_z, gaps = float(prior.log_z([1.0], 1.0, e, e.level or 0.0)), []
    for law in ("gaussian", "natural"):
        bank, guidance = UnitBank([Projection([1.0])]), Calibrated(memory=memory, law=law)
        sampler = Sampler(prior, bank, e, guidance, 40)
        sampler.calibrate(sampler.run_pilot(256, 256))
        found = sampler.sample([Row(0, 1.0, seed) for seed in range(N)])
        w = (found.log_w - log_z).exp()
        assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / N**0.5 + 0.02  # 40 steps are not the mixture
        gaps.append(found.path_kl + found.energy + log_z)
    spared = share * gaps[0] - gaps[1]
    assert float(spared.mean()) > 3 * float(spared.std()) / N**0.5, [float(g.mean()) for g in gaps]
