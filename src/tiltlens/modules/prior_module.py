"""Training of a diffusion prior p(x): the loss of `denoising.py`, t uniform on the training table.

The module begins with a pipeline of diffusers and ends with one (`prior_pipeline.py`); what its network predicts and
the schedule are read from its scheduler as for sampling (`tiltlens.priors.families`). A latent prior is trained on
latents that are encoded once (`latents.py`). With LoRA (`tiltlens.priors.lora`) the prior's own weights are frozen, a
checkpoint holds the factors alone, and the export has them folded in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tiltlens.batches import in_equal_batches
from tiltlens.denoiser import NetworkDenoiser
from tiltlens.errors import UserError
from tiltlens.modules import prior_pipeline
from tiltlens.modules.autoguidance import Autoguidance, Teacher
from tiltlens.modules.checkpoints import drop_frozen, restore_frozen
from tiltlens.modules.denoising import DenoisingLoss, Errors, by_noise
from tiltlens.modules.image_data import Batch
from tiltlens.modules.latents import LatentCache
from tiltlens.modules.learning_rate import check_rate, warm_hold_decay
from tiltlens.modules.sharding import gathered, is_sharded, shard
from tiltlens.priors.diffusers_prior import sides
from tiltlens.priors.families import read_family
from tiltlens.priors.latent import Codec
from tiltlens.priors.lora import inject, lora_parameters, merge
from tiltlens.priors.networks import fixed_network
from tiltlens.writing import DISK_ERRORS


@dataclass(frozen=True)
class LoRA:
    """Arguments of `tiltlens.priors.lora.inject`: kinds of layers or ends of module names as targets."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("attention", "convolution")


class PriorModule(LightningModule):
    """A prior in training on {image (B, 3, H, W) in [-1, 1]}; any that `load_prior` reads.

    init_from: a prior to go on from: "bundled", a diffusers folder or a hub name; None to start anew with `network`
    (arguments of UNet2DModel), `scheduler` (of DDPMScheduler, or of the class in its key `_class_name`) and, for
    latents, `autoencoder` (a latent prior whose own is taken, or a config with its `_class_name`). lora: None to train
    every weight. autoguidance: a teacher in place of the images' own noise (`tiltlens.modules.autoguidance`).
    prompt: the fixed text of a text-conditional prior. gamma: of min-SNR, None for equal weights.
    flip: mirror half of the images. learning_rate: the peak, reached after the share `warmup` of all steps and held;
    falls to 0 over the last share `decay`, in the form `decay_shape` (constant: decay 0; cosine: decay 1, cosine).
    latent_cache: the folder of latents. fused_attention: False where the fused kernel is the slow one, as in a CPU's
    backward in bf16. compile: torch.compile of training's forward and backward; pictures and metrics stay as they are.

    Raises UserError for a prior that cannot be had, two ways of starting at once, LoRA targets that match nothing,
    and numbers that are no learning rate, weight decay or share.
    """

    def __init__(
        self,
        init_from: str | None = None,
        network: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        autoencoder: str | dict[str, Any] | None = None,
        lora: LoRA | None = None,
        autoguidance: Autoguidance | None = None,
        prompt: str = "",
        gamma: float | None = 5.0,
        flip: bool = True,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.02,
        decay: float = 0.4,
        decay_shape: Literal["linear", "cosine"] = "linear",
        latent_cache: Path | None = None,
        fused_attention: bool = True,
        compile: bool = False,
    ):
        super().__init__()
        check_rate(learning_rate, weight_decay, warmup, decay)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.decay, self.decay_shape, self.flip = warmup, decay, decay_shape, flip
        # a plain object: of the teacher nothing is trained, averaged or kept in checkpoints
        self.teacher = Teacher(autoguidance, init_from, prompt) if autoguidance else None
        self.pipeline = prior_pipeline.begin(init_from, network, scheduler, autoencoder)
        self.scheduler, self.family = self.pipeline.scheduler, read_family(self.pipeline.scheduler)
        self.loss = DenoisingLoss(self.family, gamma)
        fixed = fixed_network(self.pipeline, prompt)
        self.network, self.channels, self.condition = (
            fixed.network.float().train(),
            fixed.channels,
            fixed.names,
        )
        for name in self.condition:
            self.register_buffer(name, getattr(fixed, name), persistent=False)
        if not fused_attention:
            plain_attention(self.network)
        self.side = sides(fixed)[0]  # of a state
        self.compile_step, self._compiled = compile, None
        codec = prior_pipeline.codec_of(self.pipeline)
        # in a plain object: the autoencoder is neither trained, averaged nor kept in checkpoints
        self.latents = LatentCache(Codec(codec), latent_cache) if codec is not None else None
        expected = self.latents.codec.channels if self.latents else 3
        if self.channels != expected:
            begun = "model.network" if init_from is None else f"model.init_from {init_from}: its network"
            kind = "the latents of its autoencoder" if self.latents else "images, which are RGB"
            raise UserError(
                f"{begun}: expected in_channels = {expected}, as of {kind}, found {self.channels}: "
                + ("set in_channels and out_channels" if init_from is None else "begin with another prior")
            )
        if init_from is None:
            self._try_network()
        self.adapted = inject(self.network, lora.rank, lora.alpha, lora.targets) if lora else []
        self.prompt, self.lora_scale = prompt, (lora.alpha or lora.rank) / lora.rank if lora else None
        self.random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.network.modules())

    @torch.no_grad()
    def _try_network(self) -> None:
        """One row through a network made of a config. Raises UserError where it builds but does not run."""
        state = torch.zeros(1, self.channels, self.side, self.side)
        self.network.eval()  # dropout would draw from the global generator
        try:
            found = tuple(self(state, self.family.schedule.time[-1:].float()).shape)
        except prior_pipeline.CANNOT_RUN as error:
            raise UserError(
                f"model.network: this UNet2DModel takes no state of sample_size = {self.side} "
                f"({type(error).__name__}: {error}): expected a sample_size that halves evenly at every block but the "
                "last, an attention_head_dim that divides the channels of its blocks, and a time embedding of floating-point numbers"
            ) from error
        if found != tuple(state.shape):
            raise UserError(
                f"model.network: expected a network from {tuple(state.shape)} to the same shape, found {found}"
            )
        self.network.train()

    def configure_model(self) -> None:
        """Weights in shards, where the strategy wants them; see `tiltlens.modules.sharding`."""
        if is_sharded(self.trainer):
            if self.adapted:
                raise UserError(
                    "model.lora with weights in shards: adapters are small, train them by --trainer.strategy ddp"
                )
            shard(self.network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(
                f"trainer.precision = {precision}: noise levels and the average of weights need more; expected 32-true or a mixed one, "
                "such as bf16-mixed"
            )
        self.check_data(self.trainer.datamodule)

    def check_data(self, data: Any) -> None:
        """Raises UserError for images of another size, and for random crops where latents are kept."""
        size = getattr(data, "size", None)
        expected = self.side * (self.latents.codec.factor if self.latents else 1)
        if size not in (None, expected):
            raise UserError(
                f"data.size = {size}: the prior's images have {expected} pixels a side; set data.size to it"
            )
        if self.latents and getattr(data, "crop", None) == "random":
            raise UserError(
                "data.crop = random with a prior of latents: every crop is a new image, whose latents would be encoded and "
                "kept on disk for one use; set data.crop to centre"
            )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """F (B, C, H, W) of the network for x (B, C, H, W), time (B,), under its fixed condition."""
        rows = {n: getattr(self, n).expand(len(x), *getattr(self, n).shape[1:]) for n in self.condition}
        x = x.to(self.network.dtype, memory_format=torch.channels_last)
        return self._network(x, time, return_dict=False, **rows)[0][:, : self.channels]

    def identity(self) -> dict[str, Any]:
        """What the weights mean, for `CheckResumed`: a run is resumed under the same."""
        log_snr, out = self.family.schedule.log_snr, self.family.tables["out"]
        rows = torch.linspace(0, len(log_snr) - 1, 5).long()
        return {
            "prediction": f"{self.family.prediction} ({self.family.name})",
            "noise levels": len(log_snr),
            "log-SNR of five levels": [f"{v:.3g}" for v in log_snr[rows].tolist()],
            "scale of the network's output": [f"{v:.3g}" for v in out[rows].tolist()],
            "autoencoder": self.latents.folder.name if self.latents else None,
            "model.prompt": self.prompt,
            "model.lora.alpha / rank": self.lora_scale,
            "model.autoguidance": self.teacher.identity() if self.teacher else None,
        }

    @property
    def _network(self) -> nn.Module:
        """What trains: compiled at its first use, when weights are where they stay. Samples come in batches of any size."""
        if not (self.compile_step and self.training and torch.is_grad_enabled()):
            return self.network
        if self._compiled is None:
            # in a list: as a module's part it would put its prefix before the names of the weights
            self._compiled = [torch.compile(self.network)]
        return self._compiled[0]

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The contract of sampling over the weights as they are now, for pictures and metrics in training."""
        shape = (self.channels, self.side, self.side)
        return NetworkDenoiser(self, self.family.schedule, shape, **self.family.tables)

    def decode(self, x_0: Tensor) -> Tensor:
        """State (B, C, H, W) -> image (B, 3, H, W), about [-1, 1]."""
        return in_equal_batches(self.latents.codec.to(x_0.device).decode, x_0) if self.latents else x_0

    def encode(self, images: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> state: the image, or its latent from the cache."""
        return self.latents(images) if self.latents else images

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        generator, images = self._generator(batch), batch["image"]
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self.random:
            torch.manual_seed(
                batch["seed"]
            )  # dropout draws from the global generator: the batch names it too
        t = self._levels(len(images), generator)
        loss = self.loss(self, self.encode(images), t, generator, self.teacher).loss.mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"], batch_size=len(images))
        return loss

    def held_out(self, batch: Batch) -> Errors:
        """The errors of a batch, from which few images make a steady number."""
        generator = self._generator(batch)
        t = self._levels(len(batch["image"]), generator)
        return self.loss(self, self.encode(batch["image"]), t, generator, self.teacher)

    def _levels(self, n: int, generator: torch.Generator) -> Tensor:
        """t (n,), each uniform on the table and one in each n-th of it: less noise than n independent ones, in a mean and in a
        gradient (Kingma et al., Variational Diffusion Models, 2021, appendix I.1)."""
        u = torch.rand(n, generator=generator, device=generator.device)
        return (
            ((torch.arange(n, device=u.device) + u) * len(self.loss) / n).long().clamp(max=len(self.loss) - 1)
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs val_loss (weighted as in training, against the teacher where there is one) and the mean squared error of x0_hat by
        bins of log-SNR."""
        errors = self.held_out(batch)
        n = len(errors.loss)
        self.log("val_loss", errors.loss.mean(), prog_bar=True, batch_size=n, sync_dist=True)
        for name, (mean, rows) in by_noise(errors.clean, errors.log_snr).items():
            # no sync between ranks: a bin may be empty on one of them
            self.log(f"val_x0_error/{name}", mean, batch_size=rows)

    def _generator(self, batch: Batch) -> torch.Generator:
        """The batch's randomness, drawn where it is used: noise for a large batch would keep an accelerator waiting."""
        return torch.Generator(batch["image"].device).manual_seed(batch["seed"])

    def configure_optimizers(self) -> dict[str, Any]:
        learned = lora_parameters(self.network) if self.adapted else self.network.parameters()
        optimizer = torch.optim.AdamW(learned, self.learning_rate, weight_decay=self.weight_decay)
        return warm_hold_decay(optimizer, self.trainer, self.warmup, self.decay, self.decay_shape)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._keep_latents()
        drop_frozen(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_frozen(self, checkpoint)

    def on_train_epoch_end(self) -> None:
        self._keep_latents()

    def _keep_latents(self) -> None:
        try:
            if self.latents:
                self.latents.flush()
        except DISK_ERRORS as error:  # they are still in memory, and no reason to lose a checkpoint
            rank_zero_warn(f"latents could not be kept in {self.latents.folder} ({error})")

    def export(self, folder: Path) -> Path:
        """Writes folder/prior, a diffusers pipeline with the present weights (after `fit`: the average), merged. Weights in
        shards are gathered: called on all ranks then, and written by rank 0."""
        folder = Path(folder) / "prior"
        if self.device_mesh is None:
            network = merge(self.network)
        else:
            network = gathered(self.network)
            if network is None:
                return folder
        return prior_pipeline.end(
            self.pipeline, network.to(memory_format=torch.contiguous_format).eval(), folder
        )


def plain_attention(network: nn.Module) -> None:
    """Attention by plain products in place of the fused kernel; the weights and their names are untouched."""
    for part in network.modules():
        if isinstance(getattr(part, "processor", None), AttnProcessor2_0):
            part.set_processor(AttnProcessor())
