"""Every guidance against the grid oracle of the discrete chain: marginal law, path KL and log Z, in one dimension."""

import math

import pytest
import torch
from chain_oracle import law_of

from tiltlens.energies import Linear, Target, Threshold
from tiltlens.guidance import DPS, LGD, MPGD, Amortised, Calibrated, Exact, Guidance, Learned, MomentMatched
from tiltlens.guidance.amortised import AdapterConfig, save_control
from tiltlens.guidance.control import new_control
from tiltlens.priors import GaussianMixture
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank

LINE = ([0.6, 0.4], [[-1.0], [1.2]], [0.3, 0.15])
GUIDANCES = {
    "dps": DPS, "lgd": lambda: LGD(samples=2), "mpgd": MPGD, "moment matched": MomentMatched, "exact": Exact,
    "calibrated": lambda: Calibrated(law="gaussian", finite=False), "calibrated, no memory": lambda: Calibrated(memory=0, law="gaussian", finite=False),
    "calibrated, natural": Calibrated,
    "learned": lambda: Learned(shadows=32),
}  # fmt: skip
ENERGIES = {"linear": Linear(False), "target": Target(1.0, 0.8, False), "threshold": Threshold(1.5, False)}
LEVELS = {"linear": 0.0, "target": 1.0, "threshold": 1.5}
# with memory the shift depends on the whole past, but where what it remembers is constant: the gradient of a projection, and
# of its linear energy (and LGD is DPS)
MARKOV = [
    (g, e)
    for g in GUIDANCES
    for e in ENERGIES
    if (g, e) not in (("calibrated", "target"), ("calibrated", "threshold"), ("lgd", "linear"))
]
N = 2000


class Bent(Projection):
    """A unit that is no projection: x + x^2 / 2, so that a redrawn estimate has another gradient."""

    def read(self, x):
        x = super().read(x)
        return x + x**2 / 2


def made(name, energy, steps=8, eta=1.0) -> Sampler:
    return ready(GUIDANCES[name](), energy, steps, eta)


def ready(guidance, energy, steps=8, eta=1.0, unit=None) -> Sampler:
    unit = unit or Projection([1.0])
    sampler = Sampler(GaussianMixture(*LINE), UnitBank([unit]), energy, guidance, steps, eta)
    sampler.calibrate(sampler.run_pilot(64, 64))
    return sampler


def within(values: torch.Tensor, truth: float, what: str) -> None:
    se = float(values.double().std()) / len(values) ** 0.5
    off = (float(values.double().mean()) - truth) / max(se, 1e-8)
    assert abs(off) < 4, f"{what}: {float(values.double().mean()):.4f} +- {se:.4f}, oracle {truth:.4f}"


@pytest.mark.parametrize(("name", "energy"), MARKOV)
def test_a_guided_chain_has_the_oracles_law_and_path_kl(name, energy):
    e, level, s = ENERGIES[energy], LEVELS[energy], 0.4
    sampler = made(name, e)
    law = law_of(
        sampler.chain, 5.5, sampler.guidance, sampler.constraint, s, samples=2 if name == "lgd" else 0
    )
    has_the_law(sampler, law, s, lambda x: e(x, level), f"{name}, {energy}")


def has_the_law(sampler, law, s, energy, name) -> None:
    """Five moments of the marginal law, and the path KL, within 4 standard errors."""
    found = sampler.sample([Row(0, s, seed) for seed in range(N)])
    x = found.images[:, 0]
    for what, f in (("mean", lambda x: x), ("square", lambda x: x**2), ("P(x > 1)", lambda x: (x > 1).double()),
                    ("energy", energy), ("cos 3x", lambda x: (3 * x).cos())):  # fmt: skip
        within(f(x), law.mean(f), f"{name}: {what}")
    within(found.path_kl, law.path_kl, f"{name}: path KL")
    assert law.path_kl > 1e-3, "nothing was guided"


@pytest.mark.parametrize("law", ["gaussian", "natural"])
def test_redrawn_estimates_are_integrated_over(law):
    """A redraw is noise of the twist's own: the law is the mixture over it."""
    guidance, s = Calibrated(memory=0, smoothing=1, redraws=1, law=law), 0.4
    sampler = ready(guidance, Linear(False), unit=Bent([1.0]))
    told = law_of(sampler.chain, 5.5, guidance, sampler.constraint, s, samples=1, nodes=9)
    has_the_law(sampler, told, s, lambda x: -(x + x**2 / 2), f"redraws, {law}")


@pytest.mark.parametrize("s", [0.4, 0.8])
def test_an_amortised_chain_has_the_oracles_law_and_path_kl(s, tmp_path):
    """Any control, trained or not, at the strength of its training and at twice that."""
    plain = ready(Guidance(), Linear(False))
    control, generator = new_control(plain.prior.denoiser, 2, []), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in control.trained():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    chain = {"steps": 8, "eta": 1.0, "spacing": "log-snr", "clip": False}
    config = AdapterConfig.of(control, plain.prior, plain.constraint, 0.4, chain, None, {})
    guidance = Amortised(str(save_control(control, config, tmp_path / "adapter")))
    sampler = ready(guidance, Linear(False))
    law = law_of(sampler.chain, 5.5, sampler.guidance, sampler.constraint, s)
    has_the_law(sampler, law, s, lambda x: -x, f"amortised, {s:g}")


@pytest.mark.parametrize("energy", ENERGIES)
def test_the_mean_weight_is_z_of_the_chain_itself(energy):
    """A chain of few steps has a Z of its own: the weights know that one, not the mixture's."""
    e, level, s, guided = ENERGIES[energy], LEVELS[energy], 0.5, 0.15
    sampler = made("exact", e, steps=6)
    log_z = law_of(sampler.chain, 5.5).log_z(lambda x: e(x, level), s)
    found = sampler.sample([Row(0, guided, seed) for seed in range(N)])
    w = (found.log_w + (guided - s) * found.energy - log_z).exp()
    assert w.sum() ** 2 / w.square().sum() > 0.1 * N, f"{energy}: too few weights count for a z-test"
    within(w, 1.0, f"{energy}: w / Z")


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_oracle_meets_the_mixture_as_steps_shrink(eta):
    """The law of the chain is not that of the mixture, and comes to it."""
    prior, off = GaussianMixture(*LINE), []
    for steps in (8, 16, 24):
        law = law_of(made("dps", Linear(False), steps, eta).chain, 5.5)
        off.append(abs(law.log_z(lambda x: -x, 1.0) - float(prior.log_z([1.0], 1.0))))
    assert off[-1] < 0.012 < off[0], off
    assert off[0] > off[1] > off[2], off


def test_the_bounds_hold_on_the_oracle():
    """-u m - log Z(u) <= KL(q'||p) <= path KL, with nothing sampled."""
    sampler = made("dps", Linear(False))
    base, s = law_of(sampler.chain, 5.5), 0.8
    guided = law_of(sampler.chain, 5.5, sampler.guidance, sampler.constraint, s)
    lower = max(
        u * guided.mean(lambda x: x) - base.log_z(lambda x: -x, u) for u in torch.linspace(0, 4, 41).tolist()
    )
    assert torch.equal(base.x_0, guided.x_0)
    keep = guided.weight > 1e-14
    kl = float((guided.weight * (guided.weight.log() - base.weight.log()))[keep].sum())
    assert lower - 1e-6 < kl < guided.path_kl + 1e-6, (lower, kl, guided.path_kl)
    assert math.isfinite(kl)
