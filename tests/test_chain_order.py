"""Laws of the chain of order 2: diffusers' multistep solver on the same noise, its order of convergence, and weights as exact as those of order 1."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from prior_folders import flow, write_pixel

from tiltlens.energies import Linear
from tiltlens.guidance import DPS, Calibrated, Exact, Learned
from tiltlens.metrics import sample_images
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.sampling import Independent, NoiseSpace, Particles
from tiltlens.sampling.adjoint import controlled_steps
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.chain_sampler import Parts
from tiltlens.sampling.cloud import Cloud
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.noise_walk import NoiseMap
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.schedule import step_indices
from tiltlens.units import Projection, UnitBank

GAUSSIAN = ([1.0], [[0.4]], [0.7])


def made(prior=None, steps=8, method=None, guidance=None, order=2, directions=((1.0,),)) -> Sampler:
    """Calibrated and ready."""
    bank = UnitBank([Projection(list(w)) for w in directions])
    sampler = Sampler(
        prior or GaussianMixture(*GAUSSIAN), bank, Linear(False), guidance or Calibrated(), steps, method=method, order=order
    )  # fmt: skip
    sampler.calibrate(sampler.run_pilot(64, 64))
    return sampler


def log_z(sampler: Sampler, s: float) -> float:
    """Of a Gaussian prior in one dimension: the chain is affine in its noise, x_0 = m + sum c_k z_k."""
    parts = Parts(sampler.prior, sampler.chain, sampler.constraint, sampler.guidance, "cpu", sampler.dtype)
    move = NoiseMap(parts.chain, parts.bound([Row(0, s, 0)] * (len(parts.chain) + 1)))
    xi = torch.cat([torch.zeros(1, move.draws), torch.eye(move.draws)])[..., None].to(sampler.dtype)
    assert len(xi) == len(parts.chain) + 1
    x_0 = move(xi).x_0.flatten()
    return float(s * x_0[0] + s**2 / 2 * (x_0[1:] - x_0[0]).square().sum())


@pytest.mark.parametrize(("eta", "kind"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("steps", [5, 20])
def test_a_whole_trajectory_equals_the_multistep_solver_of_diffusers(eta, kind, steps, tmp_path):
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=False)
    pipeline = write_pixel(tmp_path, scheduler)
    theirs = DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type=kind, lower_order_final=False
    )
    theirs.set_timesteps(steps)
    # to no noise at all the solver takes order 1 of itself
    assert theirs.config.final_sigmas_type == "zero"
    denoiser = load_prior(str(tmp_path)).denoiser
    chain = Chain(denoiser, theirs.timesteps.tolist(), eta, order=2)
    ours, noise = Noise(range(3), denoiser.shape), Noise(range(3), denoiser.shape)
    found = [state.x for state, _ in chain.run(ours)]
    x = noise.draw("start")
    with torch.no_grad():
        for number, t in enumerate(theirs.timesteps):
            z = noise.draw("step") if eta and number < steps - 1 else torch.zeros_like(x)
            x = theirs.step(pipeline.unet(x, t).sample, t, x, variance_noise=z).prev_sample
            torch.testing.assert_close(found[number], x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


def test_the_error_of_the_deterministic_chain_falls_with_the_square_of_the_step():
    """Against the flow of a Gaussian prior, x_t / sqrt(alpha^2 v + sigma^2) unchanged, from the first step on, which is of order 1."""
    prior = GaussianMixture([1.0], [[0.0]], [0.3])
    schedule = prior.denoiser.schedule
    marginal = lambda t: float((0.3 * schedule.alpha[t] ** 2 + schedule.sigma[t] ** 2).sqrt())  # noqa: E731
    errors = {1: [], 2: []}
    for order, found in errors.items():
        for steps in (16, 32, 64):
            indices = step_indices(schedule, steps)
            chain = Chain(prior.denoiser, indices, eta=0.0, order=order)
            chain.denoiser = prior.denoiser  # the conditional mean alone, as a network knows it
            states = [s.x for s, _ in chain.run(Noise([1], (1,), dtype=torch.float64))]
            last = float(states[-2]) / marginal(indices[-1])
            start = float(states[0]) / marginal(indices[1])
            found.append(abs(last / start - 1))
    falls = {k: [a / b for a, b in zip(e, e[1:])] for k, e in errors.items()}
    assert all(1.6 < f < 2.6 for f in falls[1]), falls
    assert all(f > 3.2 for f in falls[2]), falls
    assert errors[2][1] < 0.2 * errors[1][1]


def test_the_error_of_the_law_with_noise_falls_with_the_square_of_the_step():
    """log Z of a Gaussian prior, s mean + s^2 variance / 2. Order 2 takes no correction of the mixture's own, and needs none."""
    truth = 0.4 + 0.7 / 2
    errors = [abs(log_z(made(steps=steps), 1.0) - truth) for steps in (25, 50, 100)]
    assert errors[0] < 0.02
    assert all(a / b > 3.2 for a, b in zip(errors, errors[1:])), errors


METHODS = {
    "independent": lambda: Independent(), "particles": lambda: Particles(4, threshold=1.0), "noise space": lambda: NoiseSpace(6, 1, 2),
}  # fmt: skip


GUIDED = [
    (m, g) for m in METHODS for g in (Calibrated, Exact, Learned) if m != "noise space" or g is Calibrated
]  # it takes none


@pytest.mark.parametrize(("method", "guidance"), GUIDED)
def test_weights_are_exact(method, guidance):
    """E[w] = Z of the discrete chain, in closed form: by rows, by groups of four, and by walks."""
    sampler, s = made(method=METHODS[method](), guidance=guidance()), 0.7
    truth, found = log_z(sampler, s), sampler.sample([Row(0, s, k) for k in range(2000)])
    w = (found.log_w - truth).exp()
    w = w.reshape(-1, 4).mean(1) if method == "particles" else w
    se = float(w.std()) / len(w) ** 0.5
    assert abs(float(w.mean()) - 1) < 4 * se, f"{float(w.mean()):.4f} +- {se:.4f}"
    assert se < 0.05


def test_guidance_pays_less_for_the_same_shift():
    """The exact twist of a Gaussian prior: shift^2 / (2 Var) of the nats paid, at 25 steps."""
    efficiency = {}
    for order in (1, 2):
        sampler = made(steps=25, guidance=Exact(), order=order)
        sampler.chain.denoiser = sampler.prior.denoiser.for_steps({})  # the conditional mean alone
        rows = [Row(0, s, k) for s in (0.0, 1.0) for k in range(8)]
        found = sampler.sample(rows)
        shift = float((found.activation[8:] - found.activation[:8]).mean())
        variance = log_z(sampler, 1.0) + log_z(sampler, -1.0)  # log Z = s mean + s^2 Var / 2
        efficiency[order] = shift**2 / (2 * variance) / float(found.path_kl[8:].mean())
    assert efficiency[1] < 0.955 < 0.97 < efficiency[2] <= 1 + 1e-6, efficiency


def test_a_row_is_the_same_in_any_company_and_strength_zero_is_the_base_chain(tmp_path):
    write_pixel(tmp_path)
    directions = torch.randn(1, 192, generator=torch.Generator().manual_seed(0)).div(14).tolist()
    sampler = made(load_prior(str(tmp_path)), 6, directions=directions)
    rows = [Row(0, (0.0, 1.0, 3.0)[k % 3], k) for k in range(8)]
    whole, alone = sampler.sample(rows), [sampler.sample([r]) for r in rows]
    torch.testing.assert_close(whole.images, torch.cat([a.images for a in alone]), rtol=0, atol=1e-4)
    prior = sampler.prior
    free = sample_images(prior.denoiser, prior.decode, [0, 3, 6], 6, 1.0, order=2)
    torch.testing.assert_close(whole.images[::3].clamp(-1, 1), free, rtol=0, atol=1 / 255)
    plain = sample_images(prior.denoiser, prior.decode, [0, 3, 6], 6, 1.0)
    assert float((plain - free).abs().max()) > 0.05


def test_what_it_looks_back_at_moves_with_its_particle():
    sampler = made()
    noise = Noise(range(4), (1,), dtype=sampler.dtype)
    state = sampler.chain.start(noise)
    state, _ = sampler.chain.step(state, 0, noise)
    zero, order = torch.zeros(4), torch.tensor([2, 2, 0, 3])
    found = Cloud(state, None, zero, zero, torch.arange(4)).index(order).state
    assert torch.equal(found.before, state.before[order])
    assert len(set(state.before.flatten().tolist())) == 4


def test_a_schedule_that_begins_in_noise_alone_has_finite_steps(tmp_path):
    """log-SNR of minus infinity at the start: the step from it is infinitely long, and nothing is read off it."""
    write_pixel(tmp_path, flow())
    denoiser = load_prior(str(tmp_path)).denoiser
    chain = Chain(denoiser, range(len(denoiser.schedule) - 1, -1, -1), order=2)
    assert float(chain.log_snr[0]) == -math.inf
    assert chain.ahead[:2] == [0.0, 0.0]
    assert all(0 < a < 5 for a in chain.ahead[2:-1])
    assert all(bool(torch.isfinite(s.x).all()) for s, _ in chain.run(Noise(range(2), denoiser.shape)))


def test_it_is_part_of_what_a_run_is_and_other_orders_are_refused():
    prior = GaussianMixture(*GAUSSIAN)
    module = SamplingModule(prior, Projection([1.0]), guidance=DPS(), order=2)
    assert module.chain_settings["order"] == 2
    assert "order" not in SamplingModule(prior, Projection([1.0])).chain_settings
    with pytest.raises(ValueError, match=r"model.order = 3: expected 1 or 2"):
        SamplingModule(prior, Projection([1.0]), order=3)
    with pytest.raises(ValueError, match="order = 0: expected 1 or 2"):
        Chain(prior.denoiser, [5, 1], order=0)
    with pytest.raises(ValueError, match="expected a chain of order 1"):
        controlled_steps(Chain(prior.denoiser, [5, 3, 1], order=2), None)
