"""Laws of prior training: every family learns and comes back as the prior that was trained; latents are encoded once."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from lightning import LightningDataModule, Trainer
from prior_folders import ddpm, edm, flow, write_dit, write_ldm, write_pixel, write_text
from torch.testing import assert_close
from torch.utils.data import DataLoader

from tiltlens.errors import UserError
from tiltlens.modules.denoising import by_noise
from tiltlens.modules.ema import WarmEMA
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.latents import LatentCache
from tiltlens.modules.prior_module import LoRA, PriorModule
from tiltlens.modules.prior_pipeline import begin
from tiltlens.priors import load_prior
from tiltlens.priors.folder import find_folder
from tiltlens.priors.latent import Codec

TRAINER = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "max_steps": 2,
}
BATCHES = [
    {"image": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) * 2 - 1, "seed": k}
    for k in (0, 1)
]
BLOCKS = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
TINY = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 4, **BLOCKS}
KINDS = {
    "epsilon": lambda folder: write_pixel(folder, ddpm()),
    "sample": lambda folder: write_pixel(folder, ddpm("sample")),
    "v": lambda folder: write_pixel(folder, ddpm("v_prediction")),
    "flow": lambda folder: write_pixel(folder, flow()),
    "edm": lambda folder: write_pixel(folder, edm()),
    "quantised latent": write_ldm,
    "transformer": lambda folder: write_dit(folder, kind="kl"),
    "text": lambda folder: write_text(folder, flow(), kind="tiny"),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*val_dataloader.*"
)


def train(module, **trainer):
    Trainer(**{**TRAINER, **trainer}).fit(module, DataLoader(BATCHES, batch_size=None))
    return module


@pytest.mark.parametrize(
    ("kind", "lora"),
    [*((k, None) for k in KINDS), *((k, LoRA(rank=2)) for k in ("v", "transformer", "text"))],
)
def test_export_is_the_prior_that_was_trained(kind, lora, tmp_path):
    torch.manual_seed(0)
    KINDS[kind](tmp_path / "start")
    prompt = "a" if kind == "text" else ""
    module = PriorModule(
        str(tmp_path / "start"), lora=lora, prompt=prompt, learning_rate=1e-2, latent_cache=tmp_path / "cache"
    )
    train(module, callbacks=[WarmEMA(0.5)], accumulate_grad_batches=1)
    exported = load_prior(str(module.export(tmp_path)), prompt=prompt)
    before = load_prior(str(tmp_path / "start"), prompt=prompt)
    assert exported.family == module.family.name == before.family
    module.eval()
    with torch.no_grad():
        for t in (1, len(exported.denoiser.schedule) - 2):
            x_t = exported.denoiser.schedule.start_std(t) * torch.randn(3, *exported.denoiser.shape)
            found = exported.denoiser(x_t, t)
            torch.testing.assert_close(found, module.denoiser(x_t, t), atol=2e-4, rtol=2e-4)
        assert (found - before.denoiser(x_t, t)).abs().max() > 1e-3  # it has learned
        torch.testing.assert_close(exported.decode(x_t), module.decode(x_t))
    assert str(tmp_path) not in (tmp_path / "prior" / "model_index.json").read_text()


def test_diffusers_samples_from_exports(tmp_path):
    write_pixel(tmp_path / "start", ddpm())
    write_dit(tmp_path / "vae", kind="kl")
    latent = {"network": {**TINY, "in_channels": 4, "out_channels": 4}, "autoencoder": str(tmp_path / "vae")}
    for name, start in (("pixel", {"init_from": str(tmp_path / "start")}), ("latent", latent)):
        module = PriorModule(**start, latent_cache=tmp_path)
        pipeline = DiffusionPipeline.from_pretrained(module.export(tmp_path / name), use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
        assert images.shape == (2, 8, 8, 3)


def test_latents_are_encoded_once(tmp_path):
    write_dit(tmp_path / "start", kind="kl")
    vae = DiffusionPipeline.from_pretrained(tmp_path / "start", use_safetensors=True).vae
    images = torch.cat([b["image"] for b in BATCHES])
    first = LatentCache(Codec(vae), tmp_path)
    latents = first(images)
    torch.testing.assert_close(latents, Codec(vae).encode(images), atol=1e-5, rtol=1e-4)
    assert first.encoded == len(images)
    torch.testing.assert_close(first(images), latents, rtol=0, atol=0)
    first.flush()
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
    second = LatentCache(Codec(vae), tmp_path)  # another run
    torch.testing.assert_close(second(images.flip(0)), latents.flip(0), rtol=0, atol=0)
    assert second.encoded == 0
    second(images.flip(3))
    assert second.encoded == len(images)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    other = LatentCache(Codec(vae), tmp_path)
    assert not torch.allclose(other(images), latents)
    assert other.folder != first.folder


def test_a_cache_that_cannot_be_written_costs_no_checkpoint(tmp_path):
    """The latents stay in memory and are written when there is room again."""
    write_dit(tmp_path / "start", kind="kl")
    module = PriorModule(str(tmp_path / "start"), latent_cache=tmp_path / "cache")
    module.latents(BATCHES[0]["image"])
    (tmp_path / "cache").write_text("in the way")
    checkpoint = {"state_dict": module.state_dict()}
    with pytest.warns(UserWarning, match="latents could not be kept in"):
        module.on_save_checkpoint(checkpoint)
    (tmp_path / "cache").unlink()
    module.on_save_checkpoint(checkpoint)
    again = LatentCache(module.latents.codec, tmp_path / "cache")
    again(BATCHES[0]["image"])
    assert again.encoded == 0


def test_dropout_is_named_by_the_batch(tmp_path):
    write_pixel(tmp_path, ddpm(), dropout=0.5)
    losses = []
    for _ in range(2):
        module = PriorModule(str(tmp_path))
        train(module, max_steps=1)
        losses.append(module.trainer.callback_metrics["train_loss"])
        torch.rand(3)
    assert losses[0] == losses[1]


def test_a_grey_prior_to_begin_with_is_named(tmp_path):
    write_pixel(tmp_path, ddpm(), in_channels=1, out_channels=1)
    with pytest.raises(UserError, match=r"model.init_from .*found 1: begin with another prior"):
        PriorModule(str(tmp_path))


class ExactDenoiser(torch.nn.Module):
    """F of x0_hat = E[x_0 | x_t] = s^2 alpha x_t / (s^2 alpha^2 + sigma^2), for x_0 ~ N(0, s^2): a closed form."""

    dtype = torch.float32

    def __init__(self, family, s):
        super().__init__()
        self.family, self.s = family, s

    def forward(self, x, time, return_dict):
        schedule, tables = self.family.schedule, self.family.tables
        t = (schedule.time[:, None] - time.double()).abs().argmin(0)
        alpha, sigma, *of = (
            v[t].view(-1, 1, 1, 1)
            for v in (schedule.alpha, schedule.sigma, *(tables[k] for k in ("scale_in", "skip", "out")))
        )
        scale_in, skip, out = of
        x_t = x.double() / scale_in
        x0_hat = self.s**2 * alpha * x_t / (self.s**2 * alpha**2 + sigma**2)
        return (((x0_hat - skip * x_t) / out).float(),)


@pytest.mark.parametrize("scheduler", [ddpm("v_prediction"), flow(), edm()], ids=["v", "flow", "edm"])
def test_the_held_out_error_by_log_snr_is_the_posterior_variance_of_a_gaussian(scheduler, tmp_path):
    """val_x0_error/BIN = mean over the bin's t of s^2 / (1 + s^2 SNR), val_loss = mean of min(SNR, gamma) times it."""
    s, generator = 0.5, torch.Generator().manual_seed(0)
    write_pixel(tmp_path, scheduler)
    module = PriorModule(str(tmp_path), gamma=5.0)
    module.network = ExactDenoiser(module.family, s)
    images = s * torch.randn(8, 200, 3, 8, 8, generator=generator)
    batches = DataLoader([{"image": x, "seed": k} for k, x in enumerate(images)], batch_size=None)
    (found,) = Trainer(**TRAINER).validate(module, batches, verbose=False)
    log_snr = module.family.schedule.log_snr
    variance = s**2 / (1 + s**2 * log_snr.exp())
    means = by_noise(variance, log_snr)
    assert {k for k in found if k != "val_loss"} == {f"val_x0_error/{name}" for name in means}
    for name, (mean, _) in means.items():
        assert found[f"val_x0_error/{name}"] == pytest.approx(float(mean), rel=0.02), name
    assert found["val_loss"] == pytest.approx(float((log_snr.exp().clamp(max=5) * variance).mean()), rel=0.02)


def test_the_noise_levels_of_a_batch_are_uniform_and_one_in_each_part_of_the_table(tmp_path):
    write_pixel(tmp_path, ddpm())
    module, drawn = PriorModule(str(tmp_path)), []
    module.loss.register_forward_pre_hook(lambda _, args: drawn.append(args[2]))
    batches = DataLoader(
        [{"image": torch.zeros(10, 3, 8, 8), "seed": k} for k in range(200)], batch_size=None
    )
    Trainer(**TRAINER | {"max_steps": 200}).fit(module, batches)
    place = torch.stack(drawn).double() / (len(module.loss) / 10)
    assert (place.floor() == torch.arange(10)).all()
    assert abs((place % 1).mean() - 0.5) < 4 * (1 / 12 / place.numel()) ** 0.5 + 0.5 / len(module.loss) * 10


def test_the_shipped_latent_config_asks_no_hub():
    """Where its folder is not, it says so: a name owner/name would be a stranger's repository."""
    config = Path(__file__).parents[1] / "configs" / "train" / "prior-latent.yaml"
    name = yaml.safe_load(config.read_text())["model"]["init_args"]["init_from"]
    with pytest.raises(UserError, match="found no such folder"):
        find_folder(name)


def test_half_of_the_images_are_mirrored_by_the_batch_s_seed_unless_it_is_off(tmp_path):
    """What reaches the network of a prior without noise: the images, or their mirror images, the same at every call."""
    write_pixel(tmp_path, ddpm())
    image = torch.linspace(-1, 1, 8).expand(64, 3, 8, 8)

    def seen(flip, seed=0):
        module, kept = PriorModule(str(tmp_path), flip=flip), []
        module.encode = lambda images: kept.append(images) or images
        batches = DataLoader([{"image": image, "seed": seed}], batch_size=None)
        Trainer(**TRAINER | {"max_steps": 1}).fit(module, batches)
        return kept[0]

    mirrored = (seen(True) == image.flip(3)).flatten(1).all(1)
    assert 16 < mirrored.sum() < 48
    assert_close(seen(True)[~mirrored], image[~mirrored], rtol=0, atol=0)
    assert_close(seen(True), seen(True), rtol=0, atol=0)
    assert not torch.equal(seen(True, 1), seen(True))
    assert_close(seen(False), image, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": LoRA(targets=("to_qq",))}, "did you mean to_q"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 2.0}, "shares of the run"),
        ({"gamma": -1.0}, "gamma"),
        ({"prompt": "a horse"}, "reads no text"),
        ({"init_from": None, "network": {"block_out_channels": [8]}}, "cannot build UNet2DModel"),
        (
            {"init_from": None, "scheduler": {"_class_name": "UNet2DModel"}, "network": TINY},
            "SchedulerMixin of diffusers",
        ),
        ({"init_from": None, "network": {**TINY, "in_channels": 1, "out_channels": 1}}, "in_channels = 3"),
        (
            {"init_from": None, "network": {k: v for k, v in TINY.items() if k != "sample_size"}},
            "square sample_size",
        ),
        ({"init_from": None, "network": {**TINY, "sample_size": 7}}, "no state of sample_size = 7"),
        ({"init_from": None, "network": {**TINY, "norm_num_groups": 0}}, "cannot build .* ZeroDivisionError"),
        ({"init_from": None, "network": {**TINY, "block_out_channels": []}}, "cannot build UNet2DModel"),
        (
            {
                "init_from": None,
                "network": {
                    **TINY,
                    "attention_head_dim": 64,
                    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                },
            },
            "model.network: .*ZeroDivisionError",
        ),
        (
            {
                "init_from": None,
                "network": {**TINY, "time_embedding_type": "learned", "num_train_timesteps": 10},
            },
            "a time embedding of floating-point numbers",
        ),
        ({"init_from": None, "network": TINY, "scheduler": {"num_train_timesteps": 0}}, "found 0"),
        ({"init_from": "bundeld"}, "Did you mean 'bundled'"),
    ],
)
def test_settings_that_cannot_be_met(settings, words, tmp_path):
    write_pixel(tmp_path, ddpm())
    with pytest.raises(ValueError, match=words):
        PriorModule(**{"init_from": str(tmp_path), **settings})


def test_data_of_another_size_is_refused(tmp_path):
    class Small(LightningDataModule):
        size = 16

        def train_dataloader(self):
            return DataLoader(BATCHES, batch_size=None)

    write_pixel(Path(tmp_path), ddpm())
    with pytest.raises(ValueError, match=r"data\.size = 16: the prior's images have 8 pixels"):
        Trainer(**TRAINER).fit(PriorModule(str(tmp_path)), Small())


def test_random_crops_would_fill_the_cache_of_latents(tmp_path):
    write_dit(tmp_path / "start", kind="kl")
    module = PriorModule(str(tmp_path / "start"), latent_cache=tmp_path)
    module.check_data(ImageFolderData("FakeData", size=8))
    with pytest.raises(UserError, match=r"crop = random .* set data.crop to centre"):
        module.check_data(ImageFolderData("FakeData", size=8, crop="random"))


ATTENTIVE = {
    **TINY,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}


def loss_and_gradients(**how) -> tuple[list[str], list[torch.Tensor]]:
    torch.manual_seed(0)
    module = PriorModule(network=ATTENTIVE | {"sample_size": 8}, scheduler={"num_train_timesteps": 50}, **how)
    t = torch.tensor([3, 20, 33, 49])
    loss = module.loss(module, BATCHES[0]["image"], t, torch.Generator().manual_seed(0)).loss.mean()
    loss.backward()
    return list(module.state_dict()), [loss, *(p.grad for p in module.network.parameters())]


@pytest.mark.parametrize(
    "how",
    [
        {"fused_attention": False},
        pytest.param({"compile": True, "fused_attention": False}, marks=pytest.mark.slow),  # half a minute
    ],
    ids=["plain attention", "compiled"],
)
def test_a_faster_step_is_the_same_step_under_the_same_names(how):
    names, plain = loss_and_gradients()
    found, fast = loss_and_gradients(**how)
    assert found == names
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # half a minute of compiling
def test_a_compiled_module_trains_averages_and_exports_as_the_plain_one(tmp_path):
    folders = []
    for name, compiled in (("plain", False), ("compiled", True)):
        torch.manual_seed(0)
        module = PriorModule(
            network=ATTENTIVE | {"sample_size": 8}, scheduler={"num_train_timesteps": 50}, compile=compiled
        )
        train(module, callbacks=[WarmEMA()])
        folders.append(module.export(tmp_path / name))
    plain, fast = (DiffusionPipeline.from_pretrained(f).unet.state_dict() for f in folders)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_a_new_latent_prior_is_exported_without_clipping():
    """diffusers' pipeline would clamp latents to [-1, 1] where neither training nor sample.py does; what is asked for is kept."""
    codec = {"_class_name": "AutoencoderTiny", "latent_channels": 3, "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
             "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}  # fmt: skip
    assert begin(None, TINY, None, None).scheduler.config.clip_sample
    assert not begin(None, TINY, None, codec).scheduler.config.clip_sample
    assert begin(None, TINY, {"clip_sample": True}, codec).scheduler.config.clip_sample


def test_a_prior_that_diffusers_would_sample_wrongly_is_said():
    with pytest.warns(UserWarning, match=r"DDPMPipeline.*EDMEulerScheduler"):
        begin(None, TINY, {"_class_name": "EDMEulerScheduler"}, None)


@pytest.mark.parametrize(
    "name", ["PNDM", "LMSDiscrete", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete"]
)
def test_a_scheduler_that_the_pipeline_of_pixels_cannot_call_is_said(name, recwarn):
    """... in pixels, where its step takes no generator or its input is scaled; in latents the pipeline knows how."""
    for ok in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"):
        begin(None, TINY, {"_class_name": ok}, None)
    assert not [w for w in recwarn if "does not sample" in str(w.message)]
    with pytest.warns(UserWarning, match=rf"DDPMPipeline.*{name}.*Both sample a DDPMScheduler"):
        begin(None, TINY, {"_class_name": f"{name}Scheduler"}, None)


def test_weights_in_half_precision_are_refused(tmp_path):
    write_pixel(tmp_path, ddpm())
    with pytest.raises(UserError, match="bf16-true"):
        train(PriorModule(init_from=str(tmp_path)), precision="bf16-true")
