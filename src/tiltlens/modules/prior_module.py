"""Training of a diffusion prior p(x).

x_t = alpha_t x_0 + sigma_t eps, t uniform on the training table. A network F(x_t, t) predicts the target that
its scheduler names: eps, v = alpha_t eps - sigma_t x_0, or x_0. With SNR = alpha_t^2 / sigma_t^2 the loss is

    L = E[ w_t |F - target|^2 ],   w_t |F - target|^2 = min(SNR, gamma) |x0_hat - x_0|^2

(min-SNR-gamma: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023), hence
w = min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v, min(SNR, gamma) for x_0.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr
from lightning import LightningModule
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_data import Batch
from tiltlens.modules.learning_rate import warm_hold_decay

LOG_SNR_EDGES = (-4.0, -2.0, 0.0, 2.0, 4.0)


def min_snr_weight(snr: Tensor, prediction: str, gamma: float) -> Tensor:
    """w_t of the module's docstring, shape of snr. Raises UserError for an unknown prediction type."""
    bounded = snr.clamp(max=gamma)
    weights = {"epsilon": bounded / snr, "v_prediction": bounded / (snr + 1), "sample": bounded}
    if prediction not in weights:
        raise UserError(f"unknown prediction type {prediction!r}: expected one of {', '.join(weights)}")
    return weights[prediction]


class PriorModule(LightningModule):
    """A diffusers UNet2DModel and its DDPM scheduler, trained on {image (B, C, H, W) in [-1, 1]}.

    init_from: a diffusers pipeline folder to go on from; None to start anew with `network` (arguments of
    UNet2DModel) and `scheduler` (arguments of DDPMScheduler). gamma: of min-SNR. flip: mirror half of the
    images. learning_rate: the peak, reached after the share `warmup` of all steps and held; falls to 0 over
    the last share `decay`. Raises UserError where init_from is no such folder or both ways of starting are
    given.
    """

    def __init__(
        self,
        init_from: Path | None = None,
        network: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        gamma: float = 5.0,
        flip: bool = True,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.02,
        decay: float = 0.4,
    ):
        super().__init__()
        self.network, self.scheduler = _start(init_from, network, scheduler)
        self.network.to(memory_format=torch.channels_last)
        self.gamma, self.flip = gamma, flip
        self.learning_rate, self.weight_decay, self.warmup, self.decay = (
            learning_rate,
            weight_decay,
            warmup,
            decay,
        )
        min_snr_weight(torch.ones(1), self.scheduler.config.prediction_type, gamma)

    def errors(self, x_0: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(mean squared error of the prediction, SNR), each (B,), for images x_0 noised to t (B,)."""
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        x_t = self.scheduler.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        prediction = self.network(x_t, t).sample
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            target = self.scheduler.get_velocity(x_0, eps, t)
        else:
            target = eps if kind == "epsilon" else x_0
        return (prediction.float() - target).square().flatten(1).mean(1), compute_snr(self.scheduler, t).to(
            x_0
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch["seed"])
        x_0 = batch["image"]
        if self.flip:
            mirrored = torch.rand(len(x_0), generator=generator).to(x_0) < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        t = torch.randint(len(self.scheduler.alphas_cumprod), (len(x_0),), generator=generator).to(x_0.device)
        error, snr = self.errors(x_0, t, generator)
        loss = (min_snr_weight(snr, self.scheduler.config.prediction_type, self.gamma) * error).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(x_0))
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"], batch_size=len(x_0))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs val_loss (weighted as in training) and the error of x0_hat by bins of log-SNR.

        x0_hat's mean squared error is that of the prediction times 1/SNR, 1/(SNR + 1) or 1 for eps, v, x_0.
        """
        generator = torch.Generator().manual_seed(batch["seed"])
        x_0, length = batch["image"], len(self.scheduler.alphas_cumprod)
        # A stratified t: each batch covers the table evenly, so that few images make a steady number.
        t = ((torch.arange(len(x_0)) + torch.rand(len(x_0), generator=generator)) * length / len(x_0)).long()
        error, snr = self.errors(x_0, t.to(x_0.device), generator)
        kind = self.scheduler.config.prediction_type
        self.log(
            "val_loss",
            (min_snr_weight(snr, kind, self.gamma) * error).mean(),
            prog_bar=True,
            batch_size=len(x_0),
        )
        clean = error * min_snr_weight(snr, kind, float("inf")) / snr
        which = torch.bucketize(snr.log(), torch.tensor(LOG_SNR_EDGES, device=snr.device))
        for k, name in enumerate(bin_names()):
            inside = clean[which == k]
            if inside.numel():
                self.log(f"val_x0_error/{name}", inside.mean(), batch_size=inside.numel())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = warm_hold_decay(optimizer, self.trainer, self.warmup, self.decay, shape="linear")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def export(self, folder: Path) -> Path:
        """Writes folder/prior, a diffusers pipeline with the present weights (after `fit`: the average)."""
        out = Path(folder) / "prior"
        DDPMPipeline(self.network.to(memory_format=torch.contiguous_format), self.scheduler).save_pretrained(
            out
        )
        return out


def bin_names() -> list[str]:
    """Names of the bins of log-SNR, noisiest first: below -4, -4..-2, ..., above 4."""
    inner = [f"{a:g}..{b:g}" for a, b in pairwise(LOG_SNR_EDGES)]
    return [f"below{LOG_SNR_EDGES[0]:g}", *inner, f"above{LOG_SNR_EDGES[-1]:g}"]


def _start(
    init_from: Path | None, network: dict[str, Any] | None, scheduler: dict[str, Any] | None
) -> tuple[UNet2DModel, DDPMScheduler]:
    if init_from is None:
        return UNet2DModel(**(network or {})), DDPMScheduler(**(scheduler or {}))
    if network or scheduler:
        raise UserError(
            "model.init_from brings its own network and scheduler: take them out of the config, or add "
            "--model.network null --model.scheduler null"
        )
    folder = Path(init_from)
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            raise UserError(f"model.init_from {folder}: expected a diffusers folder, found no {part}")
    unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    unet.register_to_config(_name_or_path=None)  # an export should not tell where on this machine it began
    return unet.float().train(), DDPMScheduler.from_pretrained(folder / "scheduler")
