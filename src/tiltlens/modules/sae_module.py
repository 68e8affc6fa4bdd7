"""Training of a sparse autoencoder (`units.sparse_autoencoder`) on an encoder's cached activations.

    L = |x - x_hat|^2 / C  +  revival |e - e_hat|^2 / C  (+ (L0/k - 1)^2 for jumprelu),   e = x - x_hat (a constant)

x is normalised to a mean square of 1 an entry over the training set, so that the first term is the normalised MSE.

Revival (AuxK, Gao et al. 2024): a latent that has been off for `dead_after` steps is dead; e_hat is the combination of
the C/2 dead latents with the largest pre-activations of each row, weighted by these. No ReLU there, unlike Gao: a
latent whose pre-activation is below zero everywhere gets a gradient too.

Gates in training: topk as at use. batchtopk the B k largest positive pre of a batch; the smallest of them, in a
running mean, is the threshold at use. jumprelu H(pre - theta), whose derivative in theta is taken from a rectangle of
width BANDWIDTH (Rajamanoharan et al. 2024); theta starts where batchtopk's would.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from tiltlens.errors import UserError
from tiltlens.modules.activation_cache import cached_activations, read_tokens
from tiltlens.modules.activation_data import ActivationData
from tiltlens.modules.image_data import Batch, ImageFolderData
from tiltlens.modules.learning_rate import check_rate, warm_hold_decay
from tiltlens.units.near import near
from tiltlens.units.sources import load_encoder
from tiltlens.units.sparse_autoencoder import SparseAutoencoder
from tiltlens.writing import whole_folder

BANDWIDTH = 0.1  # x has a standard deviation of 1 an entry, so pre of about 1
TRAINABLE_TOKENS = ("patch", "cls", "register", "all")


class SparseAutoencoderModule(LightningModule):
    """A `SparseAutoencoder` and its training; give it image data (`TrainingCLI` does, by `read_data`).

    encoder, weights, layer, tokens: as in a unit's address; tokens null for a layer of one vector an image. images: so
    many training images, drawn by data.seed, in whole batches of 256 (null: all). per_image: positions kept of each
    (null: all). kind, latents, k: of the autoencoder. rows: activations a batch. learning_rate: Adam's peak; warm-up over
    the share `warmup` of all steps, linear to 0 over the last share `decay`. revival, dead_after: see the module.
    Raises UserError or ValueError, with near names, for what the encoder or the autoencoder has not.
    """

    def __init__(
        self,
        encoder: str = "bundled",
        weights: str | None = None,
        layer: str | None = "blocks.3",
        tokens: str | None = "patch",
        images: int | None = None,
        per_image: int | None = 16,
        kind: str = "batchtopk",
        latents: int = 1024,
        k: int = 16,
        rows: int = 2048,
        learning_rate: float = 1e-3,
        warmup: float = 0.02,
        decay: float = 0.3,
        revival: float = 1 / 32,
        dead_after: int = 100,
    ):
        super().__init__()
        check_rate(learning_rate, 0.0, warmup, decay)
        if tokens is not None and tokens not in TRAINABLE_TOKENS:
            raise UserError(f"model.tokens = {tokens!r}; {near(tokens, TRAINABLE_TOKENS)}")
        for name, value in (
            ("images", images),
            ("per_image", per_image),
            ("rows", rows),
            ("dead_after", dead_after),
        ):
            if value is not None and value < 1:
                raise UserError(f"model.{name} = {value}: expected 1 or above")
        source = load_encoder(encoder, weights)
        source.require_layer(layer)
        with torch.no_grad():
            empty = torch.zeros(1, 3, *source.input_size, device=next(source.parameters()).device)
            channels = read_tokens(source, empty, layer, tokens).shape[2]
        self.sae = SparseAutoencoder(kind, channels, latents, k)
        self.source = {"encoder": encoder, "weights": weights, "encoder_sha256": source.fingerprint,
                       "layer": layer, "tokens": tokens}  # fmt: skip
        self.images, self.per_image, self.rows = images, per_image, rows
        self.learning_rate, self.warmup, self.decay = learning_rate, warmup, decay
        self.revival, self.dead_after = revival, dead_after
        self.held_out = SparsityMetrics(latents)
        self.register_buffer("idle", torch.zeros(latents, dtype=torch.long))  # steps since last on

    def read_data(self, images: ImageFolderData) -> ActivationData:
        """What this module trains on, made of what the command line gives: images."""

        def read(pixels: Iterable[Batch], cache: Path, device: torch.device) -> Tensor:
            encoder = load_encoder(self.source["encoder"], self.source["weights"])
            place = self.source["layer"], self.source["tokens"]
            return cached_activations(encoder, pixels, *place, self.per_image, cache, device)

        return ActivationData(images, read, self.rows, self.images)

    def setup(self, stage: str) -> None:
        """The normalisation of the training set; a checkpoint, read after this, holds the same."""
        mean, scale = moments(self.trainer.datamodule.train_set)
        self.sae.mean.copy_(mean)
        self.sae.scale.copy_(scale)

    def identity(self) -> dict[str, Any]:
        """What the latents are of, for `CheckResumed`; the encoder by its weights, wherever they lie."""
        place = {k: self.source[k] for k in ("encoder_sha256", "layer", "tokens")}
        return place | {"model.kind": self.sae.kind, "model.k": self.sae.k}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        h, sae = batch["activation"], self.sae
        pre = sae.preactivations(h)
        opened = self.gates(pre)
        error = sae.normalise(h) - sae.combine(pre * opened)
        nmse, on = error.square().mean(), opened.sum(1).mean()
        loss = nmse
        if sae.kind == "jumprelu":
            loss = loss + (on / sae.k - 1) ** 2
        self.idle = torch.where(self._over_ranks(opened.detach().amax(0)) > 0, 0, self.idle + 1)
        dead = self.idle >= self.dead_after
        if self.revival and dead.any():
            loss = loss + self.revival * self.revived(pre, error.detach(), dead)
        logs = {"train_nmse": nmse, "train_l0": on.float(), "train_dead": dead.float().mean()}
        self.log("train_loss", loss, prog_bar=True, batch_size=len(h))
        self.log_dict(logs, batch_size=len(h))
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"], batch_size=len(h))
        return loss

    def work_of(self, batch: Batch) -> tuple[str, int]:
        """For `StepMonitor`."""
        return "activations", len(batch["activation"])

    def gates(self, pre: Tensor) -> Tensor:
        """pre (B, M) -> open gates, 0 or 1, in training; moves the threshold."""
        sae = self.sae
        if sae.kind == "topk":
            return sae.open(pre).to(pre)
        if sae.kind == "batchtopk" or self.global_step == 0:
            with torch.no_grad():
                n = min(pre.shape[0] * sae.k, pre.numel())
                lowest = pre.flatten().topk(n).values[-1].clamp(min=1e-6)
                # the threshold at use is one, though each rank has a batch of its own
                mean = self._over_ranks(lowest)
                if sae.kind == "jumprelu":
                    sae.log_threshold.fill_(mean.log())
                else:
                    share = 1 / min(self.global_step + 1, 100)
                    sae.log_threshold.copy_(sae.threshold.lerp(mean.to(sae.threshold), share).log())
                    return (pre >= lowest).to(pre)
        return Step.apply(pre, sae.threshold)

    def _over_ranks(self, value: Tensor) -> Tensor:
        """The mean over processes; called on all of them."""
        alone = self._trainer is None or self.trainer.world_size == 1
        return value if alone else self.trainer.strategy.reduce(value.float(), reduce_op="mean")

    def revived(self, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """|e - e_hat|^2 / C by the dead latents alone."""
        count = int(dead.sum())
        best = pre[:, dead].topk(min(count, max(self.sae.channels // 2, 1)), dim=1)
        z = torch.zeros(len(pre), count, dtype=pre.dtype, device=pre.device).scatter(
            1, best.indices, best.values
        )
        return (error - z @ functional.normalize(self.sae.decoder[dead], dim=1)).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """val_nmse, val_l0, val_alive over the whole held-out set, with the gates as they are at use."""
        h = batch["activation"]
        z = self.sae.encode(h)
        self.held_out.update(self.sae.normalise(h), self.sae.combine(z), z)

    def on_validation_epoch_end(self) -> None:
        found = self.held_out.compute()
        self.log_dict({f"val_{name}": value for name, value in found.items()}, prog_bar=True)
        self.held_out.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [p for p in self.sae.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, self.learning_rate)
        return warm_hold_decay(optimizer, self.trainer, self.warmup, self.decay, shape="linear")

    def export(self, folder: Path) -> Path:
        """Writes folder/sae, addressed as sae=folder/sae#LATENT."""
        folder = Path(folder) / "sae"
        with whole_folder(folder) as part:
            self.sae.save(part, self.source)
        return folder


class SparsityMetrics(Metric):
    """l0: latents on a row, mean. nmse: sum |x - x_hat|^2 / sum |x|^2, x = 0 being the mean of the training set. alive:
    share of the latents that were on for at least one of the rows. rows: how many these were."""

    def __init__(self, latents: int):
        super().__init__(sync_on_compute=False)  # each process reads the whole held-out set
        for name, shape in (("on", latents), ("error", ()), ("power", ()), ("rows", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor, z: Tensor) -> None:
        self.on += (z > 0).sum(0)
        self.error += (x - x_hat).double().square().sum()
        self.power += x.double().square().sum()
        self.rows += len(x)

    def compute(self) -> dict[str, Tensor]:
        found = {
            "l0": self.on.sum() / self.rows,
            "nmse": self.error / self.power,
            "alive": (self.on > 0).double().mean(),
            "rows": self.rows,
        }
        return {name: value.float() for name, value in found.items()}


class Step(torch.autograd.Function):
    """H(pre - theta), with d/dtheta = -1/BANDWIDTH where |pre - theta| < BANDWIDTH/2 and no derivative in pre."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return (pre > theta).to(pre)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        pre, theta = ctx.saved_tensors
        inside = (pre - theta).abs() < BANDWIDTH / 2
        return None, -(gradient * inside).sum(0) / BANDWIDTH


def moments(activations: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, C) -> their mean (C,), and the root mean square of an entry about it, (). Raises UserError if all rows are
    the same."""
    chunks = activations.split(65536)
    mean = sum(c.double().sum(0) for c in chunks) / len(activations)
    scale = (sum((c.double() - mean).square().sum() for c in chunks) / activations.numel()).sqrt()
    if scale == 0:
        raise UserError(
            "the activations of the training images are all the same: address another layer or tokens"
        )
    return mean.float(), scale.float()
