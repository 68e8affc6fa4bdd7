"""Laws of priors read from diffusers folders: the x0 contract, equality with diffusers on the same noise."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMDPMSolverMultistepScheduler
from prior_folders import ddim, ddpm, edm, flow, write_dit, write_ldm, write_pixel, write_text
from safetensors.torch import load_file, save_file

from tiltlens.batches import ROWS_ON_CPU
from tiltlens.denoiser import NetworkDenoiser
from tiltlens.priors import load_prior
from tiltlens.priors.families import read_family
from tiltlens.sampling.chain import Chain
from tiltlens.schedule import step_coefficients

WEIGHTS = "diffusion_pytorch_model.safetensors"


def chain(denoiser, indices, eta, x, noises):
    """The base law, written out: mu(x0_hat) + v z."""
    for k, (t, r) in enumerate(zip(indices, [*indices[1:], None])):
        c = step_coefficients(denoiser.schedule, t, r, eta)
        x = c.x0 * denoiser(x, t) + c.x * x
        if c.v > 0:
            x = x + c.v * noises[k]
    return x


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a kind, written once."""
    root = tmp_path_factory.mktemp("priors")
    return {
        "pixel": (root / "pixel", write_pixel(root / "pixel")),
        "ldm": (root / "ldm", write_ldm(root / "ldm")),
        "dit": (root / "dit", write_dit(root / "dit")),
        "text": (root / "text", write_text(root / "text")),
    }


# --- the x0 contract ---------------------------------------------------------------------


def exact_target(scheduler, x_0, eps, t, family):
    """(x_t, what an ideal network answers there), from the definitions of the papers."""
    s = family.schedule
    alpha, sigma = s.alpha[t], s.sigma[t]
    x_t = alpha * x_0 + sigma * eps
    if family.name == "edm":
        d = scheduler.config.sigma_data
        skip, out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
        return x_t, (x_0 - skip * x_t) / (out if family.prediction == "epsilon" else -out)
    targets = {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0, "flow": eps - x_0}
    return x_t, targets[family.prediction]


SCHEDULERS = {
    "epsilon": ddpm(),
    "sample": ddpm("sample"),
    "v": ddim("v_prediction"),
    "v, zero snr": ddim("v_prediction", rescale_betas_zero_snr=True),
    "cosine v": DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "trained betas": DDPMScheduler(trained_betas=[0.01, 0.2, 0.05, 0.4]),
    "edm": edm(sigma_data=0.7),
    "edm v": edm("v_prediction"),
    "edm exponential": edm(sigma_schedule="exponential"),
    "edm dpm-solver": EDMDPMSolverMultistepScheduler(sigma_max=40.0),
    "flow": flow(),
    "flow shifted": flow(shift=3.0),
    "flow dynamic": flow(use_dynamic_shifting=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_exact_target_gives_back_x_0(name):
    scheduler = SCHEDULERS[name]
    family = read_family(scheduler)
    x_0, eps = (
        normal(ROWS_ON_CPU, 3, 4, 4, seed=1, dtype=torch.float64),
        normal(ROWS_ON_CPU, 3, 4, 4, seed=2, dtype=torch.float64),
    )
    seen = {}
    denoiser = NetworkDenoiser(
        lambda x, time: seen.update(x=x, time=time) or seen["answer"],
        family.schedule,
        (3, 4, 4),
        **family.tables,
    )
    last = len(family.schedule) - 1
    for t in {0, 1, last // 2, last}:
        x_t, seen["answer"] = exact_target(scheduler, x_0, eps, t, family)
        torch.testing.assert_close(denoiser(x_t, t), x_0, rtol=0, atol=1e-5)
        sigma = family.schedule.sigma[t]
        d = scheduler.config.get("sigma_data", 0)
        times = {
            "variance-preserving": torch.tensor(float(t)),
            "edm": sigma.log() / 4,
            "flow": sigma * scheduler.config.num_train_timesteps,
        }
        torch.testing.assert_close(
            seen["time"], times[family.name].float().expand(ROWS_ON_CPU), rtol=1e-5, atol=1e-5
        )
        scale_in = 1 / (sigma**2 + d**2).sqrt() if family.name == "edm" else 1.0
        torch.testing.assert_close(seen["x"], x_t * scale_in)


def test_tables_are_the_schedulers_own():
    vp, zero, dropped = (
        read_family(s).schedule
        for s in (ddpm(), SCHEDULERS["v, zero snr"], ddim(rescale_betas_zero_snr=True))
    )
    torch.testing.assert_close(vp.alpha**2, ddpm().alphas_cumprod.double())
    torch.testing.assert_close(vp.alpha**2 + vp.sigma**2, torch.ones(20, dtype=torch.float64))
    assert zero.alpha[-1] == 0
    assert zero.log_snr[-1] == -torch.inf
    assert len(zero) == 20
    assert len(dropped) == 19, "epsilon says nothing of x_0 at alpha = 0"
    assert dropped.alpha[-1] > 0
    table = read_family(edm(sigma_max=50.0)).schedule
    assert len(table) == 21
    assert table.start_std(20) == pytest.approx(edm(sigma_max=50.0).init_noise_sigma) == table.init_std
    torch.testing.assert_close(table.sigma[[0, -1]].float(), torch.tensor([0.002, 50.0]))
    line, shifted = read_family(flow()).schedule, read_family(flow(shift=3.0)).schedule
    torch.testing.assert_close(line.sigma, torch.arange(1, 21).double() / 20, atol=1e-7, rtol=0)
    torch.testing.assert_close(shifted.sigma, 3 * line.sigma / (1 + 2 * line.sigma), atol=1e-7, rtol=0)
    assert line.log_snr[-1] == -torch.inf
    assert line.start_std(19) == 1


# --- equality with diffusers, on the same noise ------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [20, 5])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_trajectory(tmp_path, prediction, steps, eta):
    scheduler = ddim(prediction)
    network = write_pixel(tmp_path, scheduler).unet
    scheduler.set_timesteps(steps)
    x = start = normal(2, 3, 8, 8)
    noises = [normal(2, 3, 8, 8, seed=k + 1) for k in range(steps)]
    with torch.no_grad():
        for t, z in zip(scheduler.timesteps, noises):
            x = scheduler.step(
                network(x, t).sample, t, x, eta=eta, variance_noise=z if eta else None
            ).prev_sample
        ours = chain(load_prior(tmp_path).denoiser, scheduler.timesteps.tolist(), eta, start, noises)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


class Given:
    """Noise that was drawn before, in the order of the chain."""

    def __init__(self, start, steps):
        self.streams = {"start": iter([start]), "step": iter(steps)}

    def draw(self, stream):
        return next(self.streams[stream])


def test_the_houses_chain_is_ddim(folders):
    prior = load_prior(folders["pixel"][0])
    scheduler = ddim()
    scheduler.set_timesteps(5)
    x = start = normal(2, 3, 8, 8)
    noises = [normal(2, 3, 8, 8, seed=k + 1) for k in range(5)]
    with torch.no_grad():
        for t, z in zip(scheduler.timesteps, noises):
            network = folders["pixel"][1].unet
            x = scheduler.step(network(x, t).sample, t, x, eta=0.5, variance_noise=z).prev_sample
    *_, (state, _) = Chain(prior.denoiser, scheduler.timesteps.tolist(), eta=0.5).run(Given(start, noises))
    torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("steps", "spacing"), [(20, "leading"), (5, "leading"), (5, "trailing")])
def test_ddpm_trajectory(tmp_path, prediction, steps, spacing):
    scheduler = ddpm(prediction, timestep_spacing=spacing)
    network = write_pixel(tmp_path, scheduler).unet
    scheduler.set_timesteps(steps)
    x = start = normal(2, 3, 8, 8)
    theirs, ours = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, generator=theirs).prev_sample
        noises = [torch.randn(2, 3, 8, 8, generator=ours) for _ in range(steps)]
        y = chain(load_prior(tmp_path).denoiser, scheduler.timesteps.tolist(), 1.0, start, noises)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_euler_is_the_chain_without_noise(tmp_path, prediction, spacing):
    """Euler in sigma on the probability-flow ODE is DDIM with alpha = 1, last step to sigma = 0 included."""
    scheduler = edm(prediction, sigma_schedule=spacing)
    network = write_pixel(tmp_path, scheduler).unet
    scheduler.set_timesteps(21)
    prior = load_prior(tmp_path)
    x = start = normal(2, 3, 8, 8) * prior.denoiser.schedule.init_std
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(network(scaled, t).sample, t, x).prev_sample
        ours = chain(prior.denoiser, list(range(20, -1, -1)), 0.0, start, None)
    assert prior.family == "edm"
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_the_chain_without_noise(tmp_path, shift):
    scheduler = flow(shift)
    network = write_pixel(tmp_path, scheduler).unet
    scheduler.set_timesteps(sigmas=[k / 20 for k in range(20, 0, -1)])
    x = start = normal(2, 3, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
        ours = chain(load_prior(tmp_path).denoiser, list(range(19, -1, -1)), 0.0, start, None)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


# --- networks and latents, against the whole pipeline of diffusers -----------------------


def as_pictures(x):
    return (x / 2 + 0.5).clamp(0, 1)


def test_text_prior_is_the_pipeline_without_guidance(folders):
    path, pipeline = folders["text"]
    prior = load_prior(path, prompt="a b")
    latents = normal(2, 4, 4, 4)
    theirs = {}
    for kind in ("latent", "pt"):
        theirs[kind] = pipeline(
            ["a b"] * 2,
            8,
            8,
            num_inference_steps=5,
            guidance_scale=1.0,
            latents=latents.clone(),
            output_type=kind,
        ).images
    with torch.no_grad():
        ours = chain(prior.denoiser, pipeline.scheduler.timesteps.tolist(), 0.0, latents, None)
        torch.testing.assert_close(ours, theirs["latent"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(as_pictures(prior.decode(ours)), theirs["pt"], rtol=1e-5, atol=1e-5)
        other = load_prior(path).denoiser(latents, 10)
    assert (other - prior.denoiser(latents, 10)).abs().max() > 1e-6, "the prompt must be read"
    assert not [n for n, _ in prior.named_parameters() if "text" in n], "the text encoder is dropped"


def test_dit_prior_is_the_pipeline_with_the_null_class(folders):
    path, pipeline = folders["dit"]
    prior = load_prior(path)
    theirs = pipeline(
        [10, 10],
        guidance_scale=1.0,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    with torch.no_grad():
        start = normal(2, 4, 4, 4, seed=3)
        ours = prior.decode(chain(prior.denoiser, pipeline.scheduler.timesteps.tolist(), 0.0, start, None))
    torch.testing.assert_close(as_pictures(ours), theirs, rtol=1e-5, atol=1e-5)


def test_ldm_prior_decodes_as_its_pipeline(folders):
    path, pipeline = folders["ldm"]
    prior = load_prior(path)
    theirs = pipeline(
        2, num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="np"
    ).images
    with torch.no_grad():
        start = normal(2, 3, 4, 4, seed=3)
        ours = prior.decode(chain(prior.denoiser, pipeline.scheduler.timesteps.tolist(), 0.0, start, None))
    torch.testing.assert_close(
        as_pictures(ours).permute(0, 2, 3, 1), torch.as_tensor(theirs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_round_trip(tmp_path, kind):
    """decode and encode are the autoencoder's own, in units of the chain; gradients reach the latent."""
    config = {"scaling_factor": 0.6, "shift_factor": 0.2}
    vae = write_dit(tmp_path, kind=kind).vae
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    prior = load_prior(tmp_path)
    assert prior.image_size == 8
    assert prior.denoiser.shape == (4, 4, 4)
    images = normal(2, 3, 8, 8).clamp(-1, 1)
    with torch.no_grad():
        coded = vae.encode(images)
        z = coded.latent_dist.mode() if kind == "kl" else coded.latents
        torch.testing.assert_close(prior.encode(images), (z - 0.2) * 0.6)
        torch.testing.assert_close(
            prior.decode(prior.encode(images)), vae.decode(z).sample, rtol=1e-5, atol=1e-5
        )
    x_0 = normal(2, 4, 4, 4).requires_grad_()
    image = prior.decode(x_0)
    assert image.shape == (2, 3, 8, 8)
    (slope,) = torch.autograd.grad(image[0].sum(), x_0)
    assert slope[0].abs().max() > 0
    assert not slope[1].any(), "row 1 does not depend on row 0"


@pytest.mark.parametrize("kind", ["pixel", "ldm", "dit", "text"])
def test_every_prior_keeps_the_contract(folders, kind):
    prior = load_prior(folders[kind][0])
    assert not any(p.requires_grad for p in prior.parameters())
    assert not any(m.training for m in prior.train().modules())
    assert prior.image_size == 8
    assert len(prior.fingerprint) == 64
    told = prior.describe()
    assert told["space"] == ("pixel" if kind == "pixel" else "latent")
    assert told["table"] == 20
    assert told["parameters"] > 1000
    assert json.loads(json.dumps(told)) == told
    x = normal(3, *prior.denoiser.shape).requires_grad_()
    x0_hat = prior.denoiser(x, 10)
    assert x0_hat.shape == x.shape
    assert x0_hat.dtype == torch.float32
    (slope,) = torch.autograd.grad(x0_hat[1].sum(), x)
    assert slope[1].abs().max() > 0
    assert not slope[[0, 2]].any(), "a row depends on itself alone"
    with torch.no_grad():
        wide = prior.denoiser(x.double(), 10)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), x0_hat.detach(), rtol=1e-4, atol=1e-4)


def test_priors_of_three_families_load_by_one_call(tmp_path):
    wanted = {"variance-preserving": ddpm("v_prediction"), "edm": edm(), "flow": flow()}
    for name, scheduler in wanted.items():
        write_pixel(tmp_path / name, scheduler)
        prior = load_prior(str(tmp_path / name))
        assert prior.family == name
        with torch.no_grad():
            start = normal(1, 3, 8, 8) * prior.denoiser.schedule.start_std(len(prior.denoiser.schedule) - 1)
            assert chain(prior.denoiser, [19, 10, 0], 1.0, start, [normal(1, 3, 8, 8)] * 2).isfinite().all()


def test_half_precision_folders_compute_in_float32(folders, tmp_path):
    pixel = shutil.copytree(folders["pixel"][0], tmp_path / "half")
    save_file({k: v.half() for k, v in load_file(pixel / "unet" / WEIGHTS).items()}, pixel / "unet" / WEIGHTS)
    half, full = load_prior(pixel), load_prior(folders["pixel"][0])
    x = normal(2, 3, 8, 8)
    with torch.no_grad():
        assert {p.dtype for p in half.parameters()} == {torch.float32}
        difference = (half.denoiser(x, 10) - full.denoiser(x, 10)).abs().max()
        assert 0 < difference < 5e-3
        rough = load_prior(pixel, precision="bfloat16").denoiser(x, 10)
    assert half.fingerprint != full.fingerprint
    assert rough.dtype == torch.float32
    assert 0 < (rough - half.denoiser(x, 10)).abs().max() < 0.1


def test_clip_sample_is_ignored(tmp_path):
    write_pixel(tmp_path, DDIMScheduler(num_train_timesteps=20, clip_sample=True, clip_sample_range=0.1))
    with torch.no_grad():
        assert load_prior(tmp_path).denoiser(normal(1, 3, 8, 8), 10).abs().max() > 0.1
