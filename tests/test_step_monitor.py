"""Laws of what is watched in training: the norm is that of the gradient, the speed counts what is trained on while it is."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from tiltlens.errors import UserError
from tiltlens.modules import step_monitor
from tiltlens.modules.step_monitor import StepMonitor

ROWS = torch.arange(24.0).reshape(4, 3, 2)  # batches of three rows


class Linear(LightningModule):
    """loss = mean_b <w, x_b>: its gradient is the mean row, whatever w."""

    def __init__(self, rate=0.1):
        super().__init__()
        self.w, self.rate = torch.nn.Parameter(torch.ones(2)), rate

    def training_step(self, batch, batch_idx):
        return (batch["image"] @ self.w).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


def fit(module, tmp_path, *callbacks, **settings):
    batches = DataLoader([{"image": x, "seed": k} for k, x in enumerate(ROWS)], batch_size=None)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        num_sanity_val_steps=0, default_root_dir=tmp_path, callbacks=[StepMonitor(), *callbacks],
        **{"enable_checkpointing": False, "log_every_n_steps": 1, **settings},
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    return trainer.callback_metrics


@pytest.mark.filterwarnings("ignore")
def test_the_norm_is_the_gradients_before_clipping(tmp_path):
    seen = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx % 2:
                seen.append((trainer.callback_metrics["gradient_norm"], module.w.grad.norm()))

    fit(Linear(), tmp_path, Norms(), gradient_clip_val=0.5, accumulate_grad_batches=2)
    expected = [ROWS[k : k + 2].mean((0, 1)).norm() for k in (0, 2)]  # of two batches, a step
    torch.testing.assert_close([norm for norm, _ in seen], expected)
    torch.testing.assert_close([clipped for _, clipped in seen], [torch.tensor(0.5)] * 2, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_is_no_number_stops_though_the_loss_is_one(tmp_path):
    class Steep(Linear):
        def training_step(self, batch, batch_idx):
            w = self.w if batch["seed"] != 1 else self.w - self.w.detach()  # sqrt at 0: 0, of slope infinite
            return w.square().sum().sqrt()

    with pytest.raises(UserError, match=r"gradient norm = nan at batch 1 of epoch 0, seed 1 \(step 1\)"):
        fit(Steep(), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("work", [None, "paths"])
def test_the_speed_is_that_of_training_alone(work, tmp_path, monkeypatch):
    """A step takes 2 s of a clock that the test sets, a validation 100 s, a saving 1000 s: 1.5 rows a second."""
    clock = [0.0]
    monkeypatch.setattr(step_monitor, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(Linear):
        def training_step(self, *args):
            clock[0] += 2
            return super().training_step(*args)

        def validation_step(self, *_):
            clock[0] += 100

    class Saving(ModelCheckpoint):
        def _save_checkpoint(self, *args):
            super()._save_checkpoint(*args)
            clock[0] += 1000

    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            rates.append(float(trainer.callback_metrics[f"{work or 'images'}_per_second"]))

    module = Slow()
    if work:  # of a module that says itself what it works through
        module.work_of = lambda batch: (work, 6)
    saving = Saving(tmp_path, every_n_train_steps=1)
    fit(module, tmp_path, Rates(), saving, val_check_interval=2, enable_checkpointing=True)
    assert rates == [3.0 if work else 1.5] * 4


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_logged_where_no_step_is_asked_for(tmp_path):
    assert not {"gradient_norm", "images_per_second"} & fit(Linear(), tmp_path, log_every_n_steps=0).keys()
