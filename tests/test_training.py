"""Laws of training: exports return the network, the average its recursion, a resumed run is the same run."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from diffusers import DDPMPipeline
from lightning.pytorch.callbacks import Timer, model_checkpoint
from PIL import Image
from prior_folders import ddpm, edm, flow, write_pixel

from tiltlens.errors import UserError
from tiltlens.modules import sampling_cli
from tiltlens.modules.amortise_module import AmortiseModule
from tiltlens.modules.command_line import run
from tiltlens.modules.denoising import DenoisingLoss
from tiltlens.modules.ema import WarmEMA, warm_decay
from tiltlens.modules.encoder_module import EncoderModule, augment, degrade, low_pass
from tiltlens.modules.image_data import BatchStream, ImageFolderData
from tiltlens.modules.learning_rate import rate, warm_hold_decay
from tiltlens.modules.prior_module import PriorModule
from tiltlens.modules.sae_module import SparseAutoencoderModule
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import load_prior
from tiltlens.priors.families import read_family
from tiltlens.run_folder import RunFolder

SIZE = 16
UNET = {
    "sample_size": SIZE,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
VIT = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 20 images for training and 6 held out, colour by class."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 6)):
        for c, name in enumerate(("blue", "red")):
            (root / split / name / "deep").mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 100, (SIZE, SIZE, 3), dtype=np.uint8)
                pixels[..., 2 * (1 - c)] += 120
                Image.fromarray(pixels).save(root / split / name / ("deep" if k % 2 else ".") / f"{k}.png")
    return root


def arguments(folder, out, module, settings, *more):
    model = {"prior": "prior_module.PriorModule", "encoder": "encoder_module.EncoderModule"}[module]
    return [
        "fit",
        f"--out={out}",
        f"--model=tiltlens.modules.{model}",
        *(f"--model.{key}={value}" for key, value in settings.items()),
        f"--data.train={folder / 'train'}",
        f"--data.val={folder / 'test'}",
        f"--data.cache={folder / 'cache'}",
        f"--data.size={SIZE}",
        "--data.batch_size=8",
        "--trainer.callbacks+=tiltlens.modules.ema.WarmEMA",
        "--trainer.callbacks.decay=0.9",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *more,
    ]


PRIOR = {"network": UNET, "scheduler": {"prediction_type": "v_prediction"}, "learning_rate": 1e-2}
ENCODER = {"model_args": VIT, "num_classes": 2, "optimizer": "muon", "learning_rate": 1e-2}


def test_prior_export_gives_back_the_network(folder, tmp_path):
    grid = ("--trainer.callbacks+=tiltlens.modules.image_grid.ImageGrid", "--trainer.callbacks.n=4")
    cli = TrainingCLI(arguments(folder, tmp_path, "prior", PRIOR, *grid, "--trainer.max_epochs=2"))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "prior", use_safetensors=True)
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 900])
    with torch.no_grad():
        expected = cli.model.network.eval()(x, t).sample
        torch.testing.assert_close(pipeline.unet(x, t).sample, expected)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert sorted(p.name for p in (tmp_path / "grids").iterdir()) == ["step-000005.png", "step-000010.png"]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in pipeline.unet.state_dict().items():  # the average is exported, not the last weights
        torch.testing.assert_close(value, saved[f"network.{name}"])


def test_encoder_export_gives_back_the_network(folder, tmp_path):
    """... under timm, and a unit of it, by the name of its class, under sample.py."""
    args = arguments(folder, tmp_path, "encoder", ENCODER, "--trainer.max_epochs=1")
    cli = TrainingCLI(args)
    again = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    torch.testing.assert_close(again(x), cli.model.network.eval()(x))
    assert again.pretrained_cfg["label_names"] == ["blue", "red"]
    assert tuple(again.pretrained_cfg["mean"]) == tuple(again.pretrained_cfg["std"]) == (0.5, 0.5, 0.5)
    assert tuple(again.pretrained_cfg["input_size"]) == (3, SIZE, SIZE)
    pooled, cls = cli.model.readouts(x)  # the last cls token is trained, though timm's average leaves it out
    torch.testing.assert_close(pooled, again(x))
    torch.testing.assert_close(cls, again.head(again.fc_norm(again.forward_features(x)[:, 0])))
    TrainingCLI(args)  # a second run into the same folder is no error
    write_pixel(tmp_path / "prior")
    sampling_cli.main([
        f"--model.prior={tmp_path / 'prior'}", f"--model.unit=local-dir:{tmp_path / 'encoder'},class=red",
        "--model.steps=3", "--model.pilot=8", "--data.n=2", "--data.strengths=[0,1]",
        "--trainer.accelerator=cpu", "--trainer.logger=false", f"--out={tmp_path / 'out'}",
    ])  # fmt: skip
    assert len(RunFolder(tmp_path / "out").read_summary()["rows"]) == 2


def test_resumed_is_uninterrupted(folder, tmp_path):
    """Stopped after step 3 of 5 in the first epoch, resumed, ended in the second: all weights agree."""
    constant = {**PRIOR, "warmup": 0, "decay": 0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    TrainingCLI(arguments(folder, whole, "prior", constant, "--trainer.max_steps=7"))
    TrainingCLI(arguments(folder, parts, "prior", constant, "--trainer.max_steps=3"))
    TrainingCLI(arguments(folder, parts, "prior", constant, "--trainer.max_steps=7", "--ckpt_path=last"))
    one, two = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (whole, parts))
    assert one["global_step"] == two["global_step"] == 7
    for key in ("state_dict", "current_model_state"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, msg=lambda m, n=name, k=key: f"{k} {n}: {m}")
    # Resumed at its end it trains no step, and exports the average again.
    before = load_prior(str(parts / "prior")).fingerprint
    TrainingCLI(arguments(folder, parts, "prior", constant, "--trainer.max_steps=7", "--ckpt_path=last"))
    assert load_prior(str(parts / "prior")).fingerprint == before


@pytest.mark.parametrize("kind", ["prior", "encoder"])
def test_a_checkpoint_by_the_clock_is_gone_on_with(kind, folder, tmp_path, monkeypatch):
    """Due inside accumulated gradients it waits for their step; with validation by batches, and averages of weights that Muon or
    AdamW moves. The run is broken off a batch later, inside its epoch."""
    settings, module = {"prior": (PRIOR, PriorModule), "encoder": (ENCODER, EncoderModule)}[kind]
    seen, step = [], module.training_step  # a batch is a second
    monkeypatch.setattr(model_checkpoint, "time", SimpleNamespace(monotonic=lambda: float(len(seen))))

    def broken_off(self, batch, number):
        seen.append(number)
        if len(seen) == 5:
            raise RuntimeError("broken off")
        return step(self, batch, number)

    def fit(out, *more):
        seen.clear()
        TrainingCLI(arguments(
            folder, out, kind, settings | {"warmup": 0.1}, "--save_minutes=0.05", "--trainer.max_steps=5",
            "--trainer.limit_val_batches=1",            "--trainer.accumulate_grad_batches=2", "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=2", *more,
        ))  # fmt: skip
        return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit(tmp_path / "whole")
    monkeypatch.setattr(module, "training_step", broken_off)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path / "parts")
    kept = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (kept["epoch"], kept["global_step"]) == (0, 2)
    monkeypatch.setattr(module, "training_step", step)
    parts = fit(tmp_path / "parts", "--ckpt_path=last")
    assert parts["global_step"] == whole["global_step"] == 5
    for key in ("state_dict", "current_model_state"):
        for name, value in whole[key].items():
            assert torch.equal(parts[key][name], value), f"{key} {name}"
    one, two = (o["optimizer_states"][0]["state"] for o in (whole, parts))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_average_obeys_its_closed_form():
    """w_bar_n = sum_k w_k (1 - d_k) prod_{j > k} d_j with d_1 = 0, d_n = min(decay, n / (9 + n))."""
    from torch.optim.swa_utils import AveragedModel

    weights = torch.randn(30, 4, dtype=torch.float64)
    model = torch.nn.Linear(4, 1, bias=False).double()
    averaged = AveragedModel(model, **WarmEMA(decay=0.6)._kwargs, use_buffers=False)
    for w in weights:
        model.weight.data.copy_(w)
        averaged.update_parameters(model)
    d = torch.tensor([0.0] + [min(0.6, n / (9 + n)) for n in range(2, 31)], dtype=torch.float64)
    tail = torch.cat([d.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    closed = (weights * ((1 - d) * tail)[:, None]).sum(0, keepdim=True)
    torch.testing.assert_close(averaged.module.weight.data, closed)
    assert warm_decay(0.999, 1) == pytest.approx(2 / 11)
    with pytest.raises(ValueError, match="expected 0 <= decay < 1"):
        WarmEMA(decay=1.0)


def test_min_snr_weights_are_one_loss():
    """Whatever is predicted, the loss of F is min(SNR, gamma) |x0_hat - x_0|^2, and F* gives x_0 back."""
    gamma = 5.0
    for scheduler in (
        ddpm("epsilon"),
        ddpm("v_prediction"),
        ddpm("sample"),
        flow(),
        edm(),
        edm("v_prediction"),
    ):
        family = read_family(scheduler)
        schedule, tables = family.schedule, family.tables
        loss, t = DenoisingLoss(family, gamma), torch.arange(len(schedule))
        x_0, guess = torch.randn(2, len(t), 3, dtype=torch.float32)
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
        column = {k: v.float()[:, None] for k, v in tables.items()}
        x_t = schedule.alpha.float()[:, None] * x_0 + schedule.sigma.float()[:, None] * eps
        for x0_hat in (x_0, guess):

            def network(x, time, x0_hat=x0_hat, x_t=x_t, column=column, schedule=schedule):
                torch.testing.assert_close(x, column["scale_in"] * x_t)
                torch.testing.assert_close(time, schedule.time.float())
                return (x0_hat - column["skip"] * x_t) / column["out"]

            found = loss(network, x_0, t, torch.Generator().manual_seed(1))
            error = (x0_hat - x_0).square().mean(1)
            snr = (schedule.alpha / schedule.sigma).square().float()
            close = {"msg": lambda m, f=family: f"{f.name} {f.prediction}: {m}", "atol": 1e-5, "rtol": 1e-3}
            torch.testing.assert_close(found.clean, error, **close)
            torch.testing.assert_close(found.loss, snr.clamp(max=gamma) * error, **close)
    with pytest.raises(ValueError, match="gamma"):
        DenoisingLoss(family, 0.0)


def test_learning_rate_rises_holds_and_ends():
    linear = [rate(k / 100, 0.1, 0.4, "linear") for k in range(101)]
    assert linear[5] == pytest.approx(0.5)
    assert linear[10:61] == pytest.approx([1.0] * 51)
    assert linear[80] == pytest.approx(0.5)
    assert linear[100] == 0
    cosine = [rate(k / 100, 0.0, 1.0, "cosine") for k in range(101)]
    assert cosine[0] == 1
    assert cosine[50] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(cosine))


def test_learning_rate_follows_the_clock_where_time_is_the_limit():
    """Half the time gone after 10 of 100 steps: the run is half done."""
    timer = Timer(duration={"seconds": 100})
    timer.time_elapsed, timer.time_remaining = lambda stage=None: 50.0, lambda stage=None: 50.0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for callbacks, expected in (([], 0.9), ([timer], 0.5)):
        trainer = SimpleNamespace(estimated_stepping_batches=100, callbacks=callbacks, world_size=1)
        schedule = warm_hold_decay(optimizer, trainer, 0.0, 1.0, "linear")["lr_scheduler"]["scheduler"]
        assert schedule.lr_lambdas[0](10) == pytest.approx(expected)
    endless = SimpleNamespace(estimated_stepping_batches=float("inf"), callbacks=[])
    with pytest.raises(ValueError, match="max_time"):
        warm_hold_decay(optimizer, endless, 0.0, 1.0, "linear")


def test_batches_are_named_by_seed_and_position():
    images, labels = (
        torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 4, 4),
        torch.arange(20),
    )

    def stream(**kwargs):
        return BatchStream(images, labels, 4, 0, shuffle=True, **kwargs)

    straight, again = stream(), stream()
    epochs = [[b["label"] for b in straight] for _ in range(2)]
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert sorted(torch.cat(epochs[1]).tolist()) == list(range(20))
    again.load_state_dict({"position": 7})
    assert torch.equal(torch.cat(epochs[1][2:]), torch.cat([b["label"] for b in again]))
    shares = [torch.cat([b["label"] for b in stream(rank=r, ranks=2)]).tolist() for r in (0, 1)]
    assert not set(shares[0]) & set(shares[1])


def test_decoded_images_are_cached_until_a_file_changes(folder, tmp_path):
    def read():
        data = ImageFolderData(folder / "train", folder / "test", size=SIZE, batch_size=4, cache=tmp_path)
        data.setup()
        return data.train_set

    first, second = read(), read()
    assert len(list(tmp_path.iterdir())) == 2
    torch.testing.assert_close(first[0], second[0])
    assert first[1].tolist() == [0] * 20 + [1] * 20
    assert first[0][:20, 2].float().mean() > first[0][:20, 0].float().mean() + 100


def test_augmentation_is_a_function_of_its_seed():
    x = torch.rand(16, 3, SIZE, SIZE) * 2 - 1

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return degrade(augment(x, generator), 0.5, generator)

    torch.testing.assert_close(draw(1), draw(1))
    assert not torch.allclose(draw(1), draw(2))
    constant = torch.full((1, 3, SIZE, SIZE), 0.3)
    torch.testing.assert_close(low_pass(constant, 5), constant)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data.train=nowhere"], "no image folder at nowhere"),
        (["--data.batchsize=4"], "Did you mean data.batch_size"),
        (["--model.learning_rat=1"], "Did you mean model.learning_rate"),
        (["--model.num_classes=3"], "the data has 2 classes"),
        (["--model.architecture=vit_smal"], "timm cannot build 'vit_smal'"),
        (["--data.batch_size=500"], "lower data.batch_size"),
        (["--config=missing.yaml"], "missing.yaml"),
    ],
)
def test_user_errors_end_with_status_2(folder, tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        run(
            lambda: TrainingCLI(
                [*arguments(folder, tmp_path, "encoder", ENCODER, "--trainer.max_steps=1"), *change]
            )
        )
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


def test_prior_refuses_two_beginnings(tmp_path):
    with pytest.raises(ValueError, match="brings its own network"):
        PriorModule(init_from=tmp_path, network=UNET)
    with pytest.raises(ValueError, match="expected model_index"):
        PriorModule(init_from=tmp_path)
    with pytest.raises(ValueError, match="cannot build"):
        EncoderModule("vit_small_patch16_dinov3", {"no_such_argument": 1})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_another_optimizer_is_refused(folder, tmp_path):
    steps = ("--trainer.limit_val_batches=0", "--trainer.max_steps=1")
    TrainingCLI(arguments(folder, tmp_path, "encoder", ENCODER | {"optimizer": "adamw"}, *steps))
    args = arguments(folder, tmp_path, "encoder", ENCODER | {"optimizer": "sgd"}, *steps, "--ckpt_path=last")
    with pytest.raises(UserError, match=r"model\.optimizer: expected adamw, found sgd"):
        TrainingCLI(args)


def test_every_module_checks_its_rates():
    for module in (SparseAutoencoderModule, AmortiseModule):
        with pytest.raises(UserError, match=r"model\.learning_rate = -1: expected a finite number above 0"):
            module(learning_rate=-1)
