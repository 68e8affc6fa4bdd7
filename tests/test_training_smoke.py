"""Each smoke config runs as it stands, with no network and no data, and what it exports is read by diffusers, timm and sample.py."""

from pathlib import Path

import pytest
import timm
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, LDMPipeline
from test_wandb_curve import Offline

from tiltlens.modules import sampling_cli
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import load_prior
from tiltlens.run_folder import RunFolder

CONFIGS = Path(__file__).parents[1] / "configs" / "train"
SHORT = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def train(name, out, monkeypatch, *more):
    """Two of its eight steps: the rest would only take time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(out / "cache"))
    return TrainingCLI(["fit", f"--config={CONFIGS / name}-smoke.yaml", f"--out={out}", *SHORT, *more])


def assert_sampled_by_diffusers(folder, kind):
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert isinstance(pipeline, kind)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("name", ["prior", "prior-finetune", "prior-lora", "prior-autoguided"])
def test_priors(name, tmp_path, monkeypatch):
    cli = train(name, tmp_path, monkeypatch, "--trainer.logger=false")
    assert (tmp_path / "grids" / "step-000002.png").is_file()
    assert_sampled_by_diffusers(tmp_path / "prior", DDPMPipeline)
    before, after = load_prior("bundled"), load_prior(str(tmp_path / "prior"))
    if name != "prior":
        assert before.describe() | {"name": ""} == after.describe() | {"name": ""}
        assert before.fingerprint != after.fingerprint
    if name == "prior-lora":
        learned = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
        assert learned < 0.05 * sum(p.numel() for p in before.denoiser.parameters())


def test_latents_and_what_was_trained_is_sampled(tmp_path, monkeypatch):
    """... the same minute, by sample.py; and W&B, offline, has what was watched."""
    train("prior-latent", tmp_path, monkeypatch, "--trainer.log_every_n_steps=1")
    assert_sampled_by_diffusers(tmp_path / "prior", LDMPipeline)
    run = Offline(tmp_path)
    watched = ("train_loss", "learning_rate", "gradient_norm", "images_per_second", "val_loss")
    for name in (*watched, "val_x0_error/0..2", "quality/kid_n8", "quality/kid_floor_n8"):
        assert any(name in h for h in run.history), name
    assert f"{tmp_path.name}-prior" in run.text  # the export, as an artifact
    args = [
        f"--model.prior={tmp_path / 'prior'}", "--model.steps=3", "--model.pilot=8", "--data.n=2",
        "--data.strengths=[0,1]", "--trainer.accelerator=cpu", "--trainer.logger=false", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    sampling_cli.main(args)
    assert len(RunFolder(tmp_path / "out").read_summary()["rows"]) == 2


def test_encoder(tmp_path, monkeypatch):
    train("encoder", tmp_path, monkeypatch, "--trainer.logger=false")
    encoder = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", ["encoder", "sae", "noise-aware-units"])
def test_a_validation_alone_has_the_figures_that_the_training_ended_with(name, tmp_path, monkeypatch):
    """`train.py validate --ckpt_path last`: by the average of the weights, where there is one."""
    more = ("--trainer.logger=false", "--trainer.limit_val_batches=2")
    expected = train(name, tmp_path, monkeypatch, *more).trainer.callback_metrics
    asked = (tmp_path / "config.yaml").read_bytes()
    command = [
        "validate",
        f"--config={CONFIGS / name}-smoke.yaml",
        f"--out={tmp_path}",
        "--ckpt_path=last",
        *SHORT,
        *more,
    ]
    found = TrainingCLI(command).trainer.callback_metrics
    told = [k for k in found if k.startswith("val_")]
    assert told
    for key in told:
        torch.testing.assert_close(found[key], expected[key], msg=key)
    assert (tmp_path / "config.yaml").read_bytes() == asked


@pytest.mark.parametrize("name", ["noise-aware", "noise-aware-units"])
def test_noise_aware_twin(name, tmp_path, monkeypatch):
    """... and sample.py reads clean estimates with it."""
    train(name, tmp_path, monkeypatch, "--trainer.logger=false")
    sampling_cli.main([
        f"--model.noise_aware={tmp_path / 'noise-aware'}", "--model.steps=3", "--model.pilot=8", "--data.n=2",
        "--data.strengths=[0,1]", "--trainer.accelerator=cpu", "--trainer.logger=false", f"--out={tmp_path / 'out'}",
    ])  # fmt: skip
    told = RunFolder(tmp_path / "out").read_manifest()
    assert "noise_aware" in str(told)


def test_sparse_autoencoder(tmp_path, monkeypatch):
    """... and a latent of it is a unit."""
    train("sae", tmp_path, monkeypatch, "--trainer.logger=false")
    sampling_cli.main([
        f"--model.unit=bundled,sae={tmp_path / 'sae'}#3", "--model.steps=3", "--model.pilot=8", "--data.n=2",
        "--data.strengths=[0,1]", "--model.energy.class_path=Linear", "--model.energy.init_args.standardise=false",
        "--trainer.accelerator=cpu", "--trainer.logger=false", f"--out={tmp_path / 'out'}",
    ])  # fmt: skip
    assert len(RunFolder(tmp_path / "out").read_summary()["rows"]) == 2
