"""What is watched in training: the figures are those of the averaged weights, on every logger, with n in their names."""

import csv
import json

import pytest
import torch
import yaml
from PIL import Image
from prior_folders import write_ldm
from test_wandb_curve import Offline

from tiltlens.errors import UserError
from tiltlens.metrics import EncoderFeatures, quality, sample_images
from tiltlens.modules.image_data import to_unit_range
from tiltlens.modules.prior_quality import PriorQuality
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import load_prior

SIZE = 16
UNET = {
    "sample_size": SIZE,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def arguments(out, size, *more):
    return [
        "fit", f"--out={out}", "--model=tiltlens.modules.prior_module.PriorModule",
        "--data.train=FakeData?size=40&num_classes=4", "--data.val=FakeData?size=12&num_classes=4",
        f"--data.size={size}", "--data.batch_size=4", f"--data.cache={out / 'cache'}",
        "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null",
        "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=2",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=tiltlens.modules.ema.WarmEMA", "--trainer.callbacks.decay=0.9",
        "--trainer.callbacks+=tiltlens.modules.image_grid.ImageGrid",
        "--trainer.callbacks.n=4", "--trainer.callbacks.steps=2",
        *more,
    ]  # fmt: skip


def history(out):
    with next(iter(sorted(out.glob("logs/*/metrics.csv")))).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_quality_is_that_of_the_export(tmp_path):
    """Logged before the first step and at the validation that is due; the last of them is what the exported folder gives."""
    args = arguments(
        tmp_path, SIZE,
        f"--model.network={json.dumps(UNET)}", "--model.learning_rate=1e-2",
        "--trainer.callbacks+=tiltlens.modules.prior_quality.PriorQuality", "--trainer.callbacks.n=10",
        "--trainer.callbacks.neighbours=20", "--trainer.callbacks.steps=2", "--trainer.callbacks.every_n_steps=4",
    )  # fmt: skip
    cli = TrainingCLI(args)
    found = [row for row in history(tmp_path) if "quality/kid_n10" in row]
    assert [row["step"] for row in found] == [0, 3]  # Lightning counts the steps of a validation from 0
    assert found[0]["quality/kid_floor_n10"] == pytest.approx(found[1]["quality/kid_floor_n10"])
    assert found[0]["quality/kid_n10"] != found[1]["quality/kid_n10"]
    prior, features = load_prior(str(tmp_path / "prior")), EncoderFeatures()
    images = sample_images(prior.denoiser, prior.decode, range(10), steps=2, eta=0.0)

    def some(images, n):
        return to_unit_range(
            images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]]
        )

    data = cli.datamodule
    train = some(data.train_set[0], 20)
    sets = (images, some(data.val_set[0], 10), train, train.flip(-1))
    expected = quality(*map(features, sets))
    for name, value in expected.items():
        assert found[1][f"quality/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    # the grid's picture is the samples of its seeds, on disk and on W&B
    grid = Image.open(tmp_path / "grids" / "step-000004.png")
    first = ((images[0] + 1) * 127.5).round().permute(1, 2, 0)
    shown = torch.tensor(list(grid.crop((2, 2, 2 + SIZE, 2 + SIZE)).getdata())).view(SIZE, SIZE, 3)
    assert (shown - first).abs().max() <= 1
    pictures = sorted(tmp_path.glob("wandb/*run-*/files/media/images/grid_*.png"))
    assert len(pictures) == 2
    assert list(Image.open(pictures[-1]).getdata()) == list(grid.getdata())
    # W&B, read back, has the same figures, what was asked, and both beside the exported weights
    run = Offline(tmp_path)
    last = {k: v for h in run.history for k, v in h.items()}
    logged = {k: v for k, v in found[1].items() if k.startswith(("quality/", "val_x0_error/"))}
    assert {"quality/kid_floor_n10", "val_x0_error/0..2"} <= logged.keys()
    assert {k: last[k] for k in logged} == pytest.approx(logged, rel=1e-4, abs=1e-6)
    asked = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert asked["model"]["init_args"]["learning_rate"] == 1e-2
    assert {k: run.config[k] for k in ("model", "data")} == {k: asked[k] for k in ("model", "data")}
    told = run.artifacts[f"{tmp_path.name}-prior"]
    assert told["config"]["model"] == asked["model"]
    assert {k: told["metrics"][k] for k in logged} == pytest.approx(logged, rel=1e-4, abs=1e-6)
    # gone on with under another rate, the run says the new one; it ends between two validations, and yet with figures
    TrainingCLI([*args, "--trainer.max_steps=5", "--model.learning_rate=1e-3", "--ckpt_path=last"])
    run = Offline(tmp_path, -1)
    assert run.config["model"]["init_args"]["learning_rate"] == 1e-3
    assert len([h for h in run.history if "quality/kid_n10" in h and "val_loss" in h]) == 1
    assert (tmp_path / "grids" / "step-000005.png").is_file()


def test_a_latent_prior_is_drawn_through_its_decoder(tmp_path):
    write_ldm(tmp_path / "start")
    factor = load_prior(str(tmp_path / "start")).image_size
    TrainingCLI(
        arguments(tmp_path, factor, f"--model.init_from={tmp_path / 'start'}",
            f"--model.latent_cache={tmp_path / 'latents'}", "--trainer.logger=false")
    )  # fmt: skip
    grid = Image.open(tmp_path / "grids" / "step-000004.png")
    assert grid.size == (2 * factor + 6, 2 * factor + 6)
    assert len(set(grid.getdata())) > 10


def test_what_cannot_be_measured_is_said(tmp_path):
    with pytest.raises(UserError, match="neighbours = 5: expected n >= 3"):
        PriorQuality(n=10, neighbours=5)
    network = ("--trainer.logger=false", f"--model.network={json.dumps(UNET)}")
    callback = "--trainer.callbacks+=tiltlens.modules.prior_quality.PriorQuality"
    with pytest.raises(UserError, match="unknown encoder 'bundeld'"):
        TrainingCLI(arguments(tmp_path, SIZE, *network, callback, "--trainer.callbacks.encoder=bundeld"))
    with pytest.raises(UserError, match=r"PriorQuality.steps = 2000: expected 1 to 1000"):
        TrainingCLI(arguments(tmp_path, SIZE, *network, callback, "--trainer.callbacks.steps=2000"))
