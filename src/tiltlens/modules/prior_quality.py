"""How near the samples of a prior in training are to natural images, and whether they are copies."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.metrics import EncoderFeatures, quality, sample_images
from tiltlens.modules.image_data import Images, to_unit_range
from tiltlens.modules.sharding import is_sharded

READ = 64  # images at once


class PriorQuality(Callback):
    """Logs quality/NAME_nN of `tiltlens.metrics.quality`: kid, frechet, nearer, copied, and the floors of real images.

    encoder: whose features, a name as in a unit's address. n: samples, held-out and training images compared; fewer
    where the data has fewer, and N says how many. neighbours: training images among which, with their mirror images,
    copies are looked for.
    steps, eta, order, seed: of the samples. With the averaged weights, before the first step and then at the first
    validation that is every_n_steps steps later; always at the end of training and by `train.py validate`. In
    float32, whatever training's precision, as the exported prior is sampled. Several devices share the samples.

    Raises UserError for a module that is no prior, an unknown encoder, data of fewer than 3 images.
    """

    def __init__(
        self,
        encoder: str = "bundled",
        n: int = 512,
        every_n_steps: int = 2000,
        neighbours: int = 5000,
        steps: int = 25,
        eta: float = 0.0,
        order: int = 1,
        seed: int = 0,
    ):
        if n < 3 or every_n_steps < 1 or neighbours < n:
            raise UserError(
                f"PriorQuality: n = {n}, every_n_steps = {every_n_steps}, neighbours = {neighbours}: expected n >= 3, "
                "every_n_steps >= 1, neighbours >= n"
            )
        self.encoder, self.n, self.every_n_steps, self.neighbours = encoder, n, every_n_steps, neighbours
        self.steps, self.eta, self.order, self.seed = steps, eta, order, seed
        self._last, self._real = 0, None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_sampled(self, trainer, pl_module, self.steps)
        sets = {k: getattr(trainer.datamodule, k, None) for k in ("train_set", "val_set")}
        if any(found is None or len(found[1]) < 3 for found in sets.values()):
            raise UserError(
                "PriorQuality: expected ImageFolderData with 3 images for training and 3 held out: add images, raise "
                "data.val_share or set data.val"
            )
        self._sets = {k: found[0] for k, found in sets.items()}
        held_out = len(self._sets["val_set"])
        if held_out < self.n:
            rank_zero_warn(f"PriorQuality: n is {held_out}, the held-out images there are, and not {self.n}")
        try:
            self._features = EncoderFeatures(self.encoder)
        except (ValueError, OSError) as error:
            raise UserError(f"PriorQuality.encoder: {error}") from error

    def state_dict(self) -> dict[str, int]:
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._last = state_dict["last"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The prior that training begins with: what fine-tuning is held against."""
        if trainer.global_step:
            return
        modes = {part: part.training for part in pl_module.modules()}
        pl_module.eval()
        found = self.measure(trainer, pl_module)
        for part, mode in modes.items():
            part.training = mode
        for logger in trainer.loggers:
            logger.log_metrics(found, step=0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # In the first batch, as in ImageGrid: at the end of the epoch the average may be swapped out already.
        if batch_idx or trainer.sanity_checking:
            return
        early = trainer.global_step - self._last < self.every_n_steps
        if trainer.state.fn == "fit" and early and not trainer.should_stop:
            return
        self._last = trainer.global_step
        # every rank has the same numbers; sync_dist only keeps Lightning from warning of it
        pl_module.log_dict(self.measure(trainer, pl_module), batch_size=1, sync_dist=True)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """quality/NAME_nN of the weights as they are."""
        device = pl_module.device
        if self._real is None:  # the encoder is frozen: natural images are read once
            rows = {"train_set": self.neighbours, "val_set": self.n}
            self._real = {k: self._read(self._sets[k], n, device) for k, n in rows.items()}
            self._real["mirrored"] = self._read(self._sets["train_set"], self.neighbours, device, flip=True)
        each = -(-self.n // trainer.world_size)
        first = self.seed + each * trainer.global_rank
        images = sample_images(
            pl_module.denoiser,
            pl_module.decode,
            range(first, first + each),
            self.steps,
            self.eta,
            device,
            self.order,
        )
        drawn = self._features.of(images.split(READ), device)
        if trainer.world_size > 1:
            drawn = pl_module.all_gather(drawn.to(device)).flatten(0, 1).cpu()
        found = quality(
            drawn[: self.n], self._real["val_set"], self._real["train_set"], self._real["mirrored"]
        )
        return {f"quality/{name}": value for name, value in found.items()}

    def _read(self, images: Images, n: int, device: torch.device, flip: bool = False) -> Tensor:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))[:n]
        batches = (to_unit_range(images[rows]) for rows in order.split(READ))
        return self._features.of((x.flip(-1) for x in batches) if flip else batches, device)


def check_sampled(callback: Callback, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
    """Raises UserError unless samples can be drawn from the module during training."""
    name = type(callback).__name__
    if not (hasattr(pl_module, "denoiser") and hasattr(pl_module, "decode")):
        raise UserError(f"{name} draws from a prior in training; {type(pl_module).__name__} is none")
    is_sharded(trainer)  # refuses what is not known
    table = len(pl_module.denoiser.schedule)
    if not 1 <= steps <= table:
        raise UserError(f"{name}.steps = {steps}: expected 1 to {table}, the length of the training table")
