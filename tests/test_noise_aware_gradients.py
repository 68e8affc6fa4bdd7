"""A reader that is taught its gradient: the error's derivative, Stein's lemma, and a training that lowers it."""

import pytest
import torch
from lightning import Trainer
from prior_folders import ddpm, write_pixel
from torch import nn

from tiltlens.errors import UserError
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.noise_aware_gradients import Spectrum, gradient_error
from tiltlens.modules.noise_aware_module import NoiseAwareModule
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import load_prior
from tiltlens.units import Encoder, load_encoder, register_encoder
from tiltlens.units.noise_aware import load_twin

UNITS = ["slope-net,channel=1", "slope-net,layer=0,channel=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a prior; with it an encoder."""
    path = tmp_path_factory.mktemp("gradients")
    torch.manual_seed(0)
    write_pixel(path, ddpm())
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 3))
    register_encoder(Encoder(net, 8, name="slope-net"))
    return path


def test_the_spectrums_jacobian_is_that_of_stationary_gaussian_images():
    """Against dense matrices: x_0 of a circulant covariance over space, and any over channels."""
    generator = torch.Generator().manual_seed(0)
    c, side, n = 2, 4, 400
    mixed = torch.nn.functional.avg_pool2d(torch.randn(n, c, 3 * side, 3 * side, generator=generator), 3) * 2
    x_0 = mixed + 0.7 * mixed.flip(1).roll(1, 3)
    shifts = torch.stack([x_0.roll((i, j), (2, 3)) for i in range(side) for j in range(side)], 1).flatten(
        0, 1
    )
    flat = (shifts - shifts.mean(0)).double().flatten(1)
    s = flat.T @ flat / len(flat)  # a circulant one, to rounding
    h, spectrum = (
        torch.randn(3, c, side, side, generator=generator),
        Spectrum().add(shifts[:3000]).add(shifts[3000:]),
    )
    alpha, sigma = torch.tensor([0.9, 0.3, 0.0]), torch.tensor([0.4, 0.95, 1.0])
    found = spectrum.jacobian(h, alpha, sigma)
    for row, (a, b) in enumerate(zip(alpha.double(), sigma.double())):
        j = a * torch.linalg.solve(a**2 * s + b**2 * torch.eye(len(s)), s)
        torch.testing.assert_close(
            found[row].flatten().double(), j @ h[row].flatten().double(), atol=1e-5, rtol=1e-4
        )
    # of any images, sides of any length: symmetric, as a covariance is
    spectrum = Spectrum().add(torch.randn(40, 3, 7, 5, generator=generator))
    h, k = torch.randn(2, 2, 3, 7, 5, generator=generator)
    one, two = (spectrum.jacobian(v, alpha[:2], sigma[:2]) for v in (h, k))
    torch.testing.assert_close((one * k).sum((1, 2, 3)), (two * h).sum((1, 2, 3)), atol=1e-5, rtol=1e-4)


def test_the_error_of_a_gradient_and_its_size():
    """|J (grad r - g)|^2 with the reader's gradient in closed form, differentiable in its weights."""
    generator = torch.Generator().manual_seed(0)
    j, a, b = torch.randn(3, 5, 5, dtype=torch.float64, generator=generator)
    x0_hat, x_0 = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    w = b.clone().requires_grad_()
    error, size = gradient_error(
        x0_hat, x_0, lambda x: ((x @ a) * x).sum(1), lambda x: ((x @ w) * x).sum(1), lambda h: h @ j.T
    )
    g = x_0 @ (a + a.T)
    expected = ((x0_hat @ (w + w.T) - g) @ j.T).square().sum(1)
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(size, (g @ j.T).square().sum(1))
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), w)[0] for x in (error, expected)))
    assert not size.requires_grad


def test_steins_lemma_makes_the_mean_of_the_targets_the_gradient_that_guidance_wants():
    """x_0 ~ N(0, S), a = x.A.x: grad E[a | x_t] = 2 J^T A x0_hat; J^T grad a(x_0) has this mean at one x_t, to 4 standard errors."""
    generator = torch.Generator().manual_seed(1)
    n, d, alpha, sigma = 40_000, 3, 0.8, 0.6
    half, a = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    s, a = half @ half.T + 0.1 * torch.eye(d), a + a.T
    j = alpha * s @ torch.linalg.inv(alpha**2 * s + sigma**2 * torch.eye(d).double())
    c = s - alpha * j @ s  # of x_0 | x_t
    torch.testing.assert_close(j, alpha / sigma**2 * c)
    x_t = torch.randn(1, d, generator=generator, dtype=torch.float64).expand(n, d)
    x_0 = x_t @ j.T + torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(c).T
    quadratic = lambda x: ((x @ a) * x).sum(1)  # noqa: E731
    targets = (2 * x_0 @ a) @ j
    wanted = 2 * (x_t[:1] @ j.T) @ a @ j
    assert bool(((targets.mean(0) - wanted[0]).abs() < 4 * targets.std(0) / n**0.5).all())
    # So the conditional mean, whose gradient is wanted, has the least error: that of a reader 30 % too steep or too flat is larger
    errors = [
        gradient_error(x_t @ j.T, x_0, quadratic, lambda x, k=k: k * quadratic(x), lambda h: h @ j)[0]
        for k in (0.7, 1.0, 1.3)
    ]
    for other in (errors[0], errors[2]):
        apart = other - errors[1]
        assert float(apart.detach().mean()) > 4 * float(apart.detach().std()) / n**0.5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_brings_a_readers_gradient_nearer(folder, tmp_path):
    """From a reader with strange weights, on what is held out; and it is the reader that was asked for that it begins with."""
    prior, encoder = load_prior(str(folder)), load_encoder("slope-net")
    options = {"units": UNITS, "prior": str(folder), "log_snr": (-3.0, 3.0), "own": 64, "steps": 3}
    data = ImageFolderData("FakeData", "FakeData", size=8, batch_size=32, cache=tmp_path, val_n=64)

    def fit(module, steps):
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, data)
        return Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
        ).validate(module, data, verbose=False)[0]  # fmt: skip

    torch.manual_seed(3)
    strange = NoiseAwareModule("slope-net", **options, gradients=1.0, learning_rate=1e-12, weight_decay=0.0)
    for p in strange.twin.network.model.parameters():
        p.data.normal_(0, 0.2)
    before = fit(strange, 1)["val_error_gradient"]
    strange.export(tmp_path / "strange")
    module = NoiseAwareModule(
        "slope-net",
        **options,
        gradients=1.0,
        learning_rate=3e-3,
        init_from=str(tmp_path / "strange" / "noise-aware"),
    )
    for new, old in zip(module.twin.parameters(), strange.twin.parameters()):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)  # half precision
    assert fit(module, 20)["val_error_gradient"] < 0.8 * before
    twin = load_twin(module.export(tmp_path / "out"), [encoder], prior.fingerprint)
    assert twin.config.trained["gradients"] == 1.0
    assert twin.config.trained["init_from"]["gradients"] == 1.0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_are_taught_above_a_level_alone(folder):
    """Rows below it have no error, and change that of no other; nor does a batch that has no other fail."""
    module = NoiseAwareModule(
        "slope-net", units=UNITS, prior=str(folder), own=0, own_share=0, gradients=1.0, gradients_from=1.0
    )
    draw = torch.Generator().manual_seed(0)
    x_0, x0_hat = torch.rand(2, 6, 3, 8, 8, generator=draw) * 2 - 1
    module.spectrum = Spectrum().add(x_0)
    t = torch.tensor([18, 14, 10, 6, 3, 0])
    log_snr = module._parts[1].denoiser.schedule.log_snr[t].float()
    above = log_snr > 1.0
    assert 0 < int(above.sum()) < 6

    def find(rows):
        return module.gradient_errors_of(
            log_snr[rows], (x0_hat[rows], x_0[rows], t[rows]), torch.Generator().manual_seed(1)
        )

    error, size, told = find(torch.ones(6, dtype=torch.bool))
    assert torch.equal(told, log_snr[above])
    assert error.shape == size.shape == told.shape
    torch.testing.assert_close(find(above)[0], error)
    assert [len(x) for x in find(~above)] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_of_gradients_goes_on_as_if_nothing_had_been(folder, tmp_path, monkeypatch):
    """Broken off in its second epoch: reader, optimizer and running errors, those of gradients too."""
    step = NoiseAwareModule.training_step

    def fit(out, *more):
        TrainingCLI([
            "fit", f"--out={out}", "--model=tiltlens.modules.noise_aware_module.NoiseAwareModule", "--model.encoder=slope-net",
            f"--model.units={UNITS}", f"--model.prior={folder}", "--model.gradients=1", "--model.own=8", "--model.steps=3",
            "--data.train=FakeData?size=16", "--data.val=FakeData?size=8", f"--data.cache={tmp_path}", "--data.size=8", "--data.batch_size=8",
            "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.limit_val_batches=0", "--trainer.limit_train_batches=2",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=4", *more,
        ])  # fmt: skip
        return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)

    def break_off(self, batch, number):
        if self.global_step == 3:
            raise RuntimeError("broken off")
        return step(self, batch, number)

    whole = fit(tmp_path / "whole")
    monkeypatch.setattr(NoiseAwareModule, "training_step", break_off)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path / "parts")
    monkeypatch.setattr(NoiseAwareModule, "training_step", step)
    parts = fit(tmp_path / "parts", "--ckpt_path=last")
    assert whole["global_step"] == parts["global_step"] == 4
    assert bool((whole["state_dict"]["gradient_errors"] != 1).any())
    for name, value in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], value), name
    one, two = (x["optimizer_states"][0]["state"] for x in (whole, parts))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_what_cannot_be_is_refused(folder, tmp_path):
    prior = str(folder)
    NoiseAwareModule("slope-net", units=UNITS, prior=prior, own=0, own_share=0)
    for wrong, why in (
        ({"gradients": 1.0}, "of readers of single units; expected model.units"),
        ({"units": UNITS, "gradients": -1.0}, "expected a weight of at least 0"),
        (
            {"units": UNITS, "gradients": 1.0, "gradients_from": 6.0},
            r"gradients_from = 6.0: expected a level below 6",
        ),
        (
            {"units": UNITS, "init_from": str(tmp_path)},
            r"model.init_from.*expected a folder with config.json",
        ),
        (
            {"units": UNITS, "init_from": "bundled"},
            r"model.init_from.*expected the encoder it was trained for",
        ),
    ):
        with pytest.raises(UserError, match=why):
            NoiseAwareModule("slope-net", prior=prior, **wrong)
