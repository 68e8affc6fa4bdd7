"""A reader that is taught how to respond to a step's noise: against the Jacobian and the exact reader, and a training that raises what it earns."""

import pytest
import torch
from lightning import Trainer
from prior_folders import ddpm, write_pixel
from small_nets import register_small_net
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltlens.errors import UserError
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.noise_aware_module import NoiseAwareModule
from tiltlens.modules.noise_aware_responses import earned, later, respond, responded, response_loss
from tiltlens.modules.noise_aware_task import UnitTask
from tiltlens.modules.own_samples import Paths, own_paths, own_samples
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.sampling import responses as module
from tiltlens.sampling.chain import ORDERS, Chain
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.responses import responses
from tiltlens.sampling.sample_pool import unguided
from tiltlens.schedule import step_indices
from tiltlens.units import load_encoder
from tiltlens.units.noise_aware import load_twin

UNITS = ["slope-net,channel=1", "slope-net,layer=0,channel=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a prior; with it an encoder."""
    path = tmp_path_factory.mktemp("responses")
    torch.manual_seed(0)
    write_pixel(path, ddpm())
    register_small_net("slope-net")
    return path


def one(log_snr):
    return torch.ones(len(log_snr), 1)


class Reader(nn.Module):
    """A reader that is a formula."""

    def __init__(self, formula):
        super().__init__()
        self.members, self.formula = [None], formula
        self.mean, self.std = (nn.Parameter(v * torch.ones(1), requires_grad=False) for v in (0.0, 1.0))

    def forward(self, x, log_snr):
        return self.formula(x)[:, None]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_the_chains_own_and_moved_by_its_jacobian(folder, monkeypatch, order):
    """Against `Chain.run` on the same noise, and the forward derivative of the network."""
    monkeypatch.setattr(module, "NUDGE", 3e-3)
    prior = load_prior(str(folder))
    chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, 6), eta=0.7, order=order)
    schedule, seeds, levels = prior.denoiser.schedule, range(3, 6), (-3.0, 5.0)
    found = responses(chain, seeds, "here", levels, "cpu")
    noise, ahead = (Noise(seeds, chain.denoiser.shape, "cpu", torch.float32, domain="here") for _ in range(2))
    x, kept = ahead.draw("start") * schedule.start_std(chain.indices[0]), []
    for (state, info), c in zip(chain.run(noise), chain.coefficients):
        if info.number < len(chain) - 1:
            z = ahead.draw("step")
            if levels[0] <= info.log_snr <= levels[1]:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward derivative
                    _, jz = torch.func.jvp(lambda y, t=info.t: chain.denoiser(y, t), (x,), (z,))
                gain = c.x0 * schedule.sigma[info.t] ** 2 / (schedule.alpha[info.t] * c.v)
                kept.append((info.t, info.x0_hat, gain * jz))
        x = state.x
    assert 2 <= len(kept) < len(chain) - 1
    torch.testing.assert_close(found["x_0"], x)
    assert found["sample"].tolist() == [s for s in seeds for _ in kept]
    assert found["t"].tolist() == [t for t, _, _ in kept] * 3
    torch.testing.assert_close(found["x0_hat"], torch.stack([h for _, h, _ in kept], 1).flatten(0, 1))
    torch.testing.assert_close(
        found["moved"], torch.stack([m for _, _, m in kept], 1).flatten(0, 1).float(), rtol=2e-2, atol=2e-3
    )


def test_the_exact_reader_earns_all_there_is_and_one_that_trembles_does_not():
    """Gaussian prior, a = w.x_0, whose exact reader is w.x0_hat: KL efficiency 1 in linear response. One that is off by no more than
    0.1 standard deviations, but to and fro, tells the value almost as well, and earns far less."""
    prior = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [1.0])
    chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, 80))
    found = responses(chain, range(1500), "here", (-30.0, 30.0), "cpu", torch.float64)
    # the image of a row: (R, 1, 1, d)
    image = lambda x: x[:, None, None]  # noqa: E731
    paths = Paths(found["x_0"], found["sample"], found["t"], image(found["x0_hat"]), image(found["moved"]))
    w = torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)
    exact = lambda x: (x[:, 0, 0].double() * w).sum(1)  # noqa: E731
    shares, errors = [], []
    for formula in (exact, lambda x: exact(x) + 0.1 * torch.sin(60 * exact(x))):
        task = UnitTask(None, Reader(formula), lambda x: x)
        a = exact(image(paths.x_0)).float()
        task._known = torch.stack([a, a], 1)[..., None]
        shares.append(float(earned(task, paths, 0, prior.denoiser.schedule.log_snr, one)))
        residual, d = respond(
            task, paths.x0_hat, paths.moved, torch.zeros(len(paths.t)), a[paths.sample][:, None]
        )
        errors.append(float(residual.square().mean()))
        assert d.shape == residual.shape == (len(paths.t), 1)
    assert 0.95 < shares[0] < 1.05  # 80 steps are short
    assert errors[1] < errors[0] + 0.02
    assert shares[1] < 0.8 * shares[0]


def test_what_later_steps_tell_is_no_news_of_this_one():
    """Taken off the residual it changes no mean, whatever the reader, and with a good one most of the noise goes."""
    prior = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, 80))
    found = responses(chain, range(1500), "here", (-30.0, 30.0), "cpu", torch.float64)
    image = lambda x: x[:, None, None]  # noqa: E731
    paths = Paths(found["x_0"], found["sample"], found["t"], image(found["x0_hat"]), image(found["moved"]))
    a = paths.x_0[:, 0].float()
    for formula, share in ((lambda x: x[:, 0, 0, 0], 0.3), (lambda x: x[:, 0, 0, 0] - x[:, 0, 0, 1], 1.5)):
        task = UnitTask(None, Reader(formula), lambda x: x)
        task._known = torch.stack([a, a], 1)[..., None]
        residual, d, _ = responded(task, paths, range(len(paths.t)), prior.denoiser.schedule.log_snr)
        news = later(paths, 0, d)
        for row in (0, 78, 79, len(d) - 2, len(d) - 1):
            mine = paths.sample == paths.sample[row]
            mine[: row + 1] = False
            torch.testing.assert_close(news[row], d[mine].double().sum(0).float(), atol=1e-4, rtol=0)
        before, after = (x.reshape(1500, -1).sum(1) for x in (residual * d, (residual - news) * d))
        assert abs(float((after - before).mean())) < 4 * float((after - before).std()) / 1500**0.5
        assert float((residual - news).square().mean()) < share * float(residual.square().mean())
    # a part of the rows: those of the last samples alone
    first = paths.below(1499)
    torch.testing.assert_close(later(paths, first, d[first:]), news[first:], atol=1e-4, rtol=0)


def test_the_loss_is_what_is_paid_less_what_is_earned():
    """Its gradient in d: 2 kappa (kappa d - (a - r)); none in the residual, for E[d | x_t] = 0."""
    residual, d = (torch.randn(6, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    kappa = torch.rand(6, 2, dtype=torch.float64)
    loss = response_loss(residual, d, kappa)
    torch.testing.assert_close(loss, (residual - kappa * d).square() - residual.square())
    loss.sum().backward()
    torch.testing.assert_close(d.grad, 2 * kappa * (kappa * d - residual).detach())
    assert residual.grad is None


def test_the_loss_alone_teaches_a_gradient_from_values_of_samples():
    """A mixture of two modes in 8 dimensions, a = tanh(2 x_1) + 0.3 x_2, a small network: from nothing to most of what can be earned, on
    trajectories that it was not taught on."""
    d, count, held_out = 8, 1500, 500
    means = torch.zeros(2, d)
    means[:, 0] = torch.tensor([1.0, -1.0])
    prior = GaussianMixture([0.5, 0.5], means.tolist(), [0.5, 0.5])
    chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, 20))
    found = responses(chain, range(count), "here", (-5.0, 5.0), "cpu")
    image = lambda x: x[:, None, None]  # noqa: E731
    paths = Paths(found["x_0"], found["sample"], found["t"], image(found["x0_hat"]), image(found["moved"]))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d, 64), nn.Tanh(), nn.Linear(64, 1))
    task = UnitTask(None, Reader(lambda x: net(x[:, 0, 0].float())[:, 0]), lambda x: x)
    a = torch.tanh(2 * paths.x_0[:, :1]) + 0.3 * paths.x_0[:, 1:2]
    a = a - a.mean()
    task._known = torch.stack([a, a], 1)
    log_snr, taught = prior.denoiser.schedule.log_snr.float(), paths.below(count - held_out)
    before = float(earned(task, paths, count - held_out, log_snr, one))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(300):
        which = torch.randint(taught, (256,))
        rows = paths.x0_hat[which], paths.moved[which], log_snr[paths.t[which]], a[paths.sample[which]]
        optimizer.zero_grad()
        response_loss(*respond(task, *rows), torch.tensor(1.0)).mean().backward()
        optimizer.step()
    after = float(earned(task, paths, count - held_out, log_snr, one))
    assert before < 0.3
    assert after > 0.7


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_reader_earns_is_logged_and_kept(folder, tmp_path):
    """And it is the reader that was asked for that a training begins with."""
    prior, encoder = load_prior(str(folder)), load_encoder("slope-net")
    data = ImageFolderData("FakeData", "FakeData", size=8, batch_size=32, cache=tmp_path, val_n=32)
    one = None
    for rate in (1e-2, 1e-12):
        module = NoiseAwareModule(
            "slope-net", units=UNITS, prior=str(folder), log_snr=(-3.0, 3.0), own=64, steps=5, responses=1.0, learning_rate=rate,
            weight_decay=0.0, init_from=str(tmp_path / "noise-aware") if one else None,
        )  # fmt: skip
        trainer = Trainer(
            max_steps=2, val_check_interval=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data)
        assert float(trainer.callback_metrics["val_response"]) >= 0
        if one:
            for new, old in zip(module.twin.parameters(), one.twin.parameters()):
                torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)  # half precision
        one = module
        twin = load_twin(module.export(tmp_path), [encoder], prior.fingerprint)
        assert twin.config.trained["responses"] == 1.0
        assert twin.config.trained["val_response"] == float(trainer.callback_metrics["val_response"])
    assert twin.config.trained["init_from"]["responses"] == 1.0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_of_responses_goes_on_as_if_nothing_had_been(folder, tmp_path, monkeypatch):
    """Broken off in its second epoch: reader, optimizer and running sums."""
    step = NoiseAwareModule.training_step

    def fit(out, *more):
        TrainingCLI([
            "fit", f"--out={out}", "--model=tiltlens.modules.noise_aware_module.NoiseAwareModule", "--model.encoder=slope-net",
            f"--model.units={UNITS}", f"--model.prior={folder}", "--model.responses=1", "--model.own=8", "--model.steps=3",
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
    assert bool((whole["state_dict"]["responses.gain.mean"] != 0).any())
    for name, value in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], value), name
    one, two = (x["optimizer_states"][0]["state"] for x in (whole, parts))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_own_trajectories_are_of_the_order_that_is_asked_for(folder, tmp_path):
    """And those of one order are not taken for the other's."""
    prior, trainer = (
        load_prior(str(folder)),
        Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False),
    )
    grid = step_indices(prior.denoiser.schedule, 5)
    for _ in range(2):  # drawn, and from the folder
        for order in ORDERS:
            chain = Chain(prior.denoiser, grid, order=order)
            (plain,) = unguided(chain, 8, "noise-aware", "cpu", torch.float32)
            paths = own_paths(trainer, prior, 8, 5, order, (-3.0, 3.0), torch.device("cpu"))
            torch.testing.assert_close(paths.x_0, plain)
            torch.testing.assert_close(own_samples(trainer, prior, 8, 5, order, torch.device("cpu")), plain)
    assert len(list(tmp_path.glob("own-*"))) == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_heads_that_are_zero_yet_and_batches_of_one_image(folder, tmp_path):
    """A reader of another network begins with d = 0: no kappa is to be had of it yet, and it learns. Of a batch of one there is an image."""
    data = ImageFolderData("FakeData?size=8", "FakeData?size=9", size=8, batch_size=8, cache=tmp_path)
    module = NoiseAwareModule(
        "slope-net", units=UNITS, prior=str(folder), log_snr=(-3.0, 3.0), own=8, steps=5, responses=1.0, network="slope-net", layers=["0"],
        own_share=0.9,
    )  # fmt: skip
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    assert all(bool(torch.isfinite(w).all()) for w in module.trained)
    assert bool((module.responses.cost.mean > 0).any())
    (found,) = trainer.validate(module, data, verbose=False)
    assert 0 <= found["val_response"] < 10  # one trajectory is held out
    short = NoiseAwareModule("slope-net", units=UNITS, prior=str(folder), own=8, steps=1, responses=1.0)
    with pytest.raises(UserError, match=r"model.steps = 1: expected a step, but the last"):
        trainer.fit(short, data)


def test_what_cannot_be_is_refused(folder, tmp_path):
    prior = str(folder)
    NoiseAwareModule("slope-net", units=UNITS, prior=prior, own=0, own_share=0)
    for wrong, why in (
        ({"responses": 1.0}, "of readers of single units; expected model.units"),
        ({"units": UNITS, "responses": -1.0}, "expected a weight of at least 0"),
        ({"units": UNITS, "order": 3}, "model.order = 3: expected 1 or 2"),
        ({"units": UNITS, "responses": 1.0, "own": 0, "own_share": 0}, "expected own samples"),
        ({"units": UNITS, "responses": 1.0, "own_share": 1.0}, "and images, found model.own_share = 1.0"),
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
    chain = Chain(load_prior(prior).denoiser, [10, 3], eta=0.0)
    with pytest.raises(ValueError, match="eta = 0 draws no noise"):
        responses(chain, range(2), "here", (-3.0, 3.0), "cpu")
