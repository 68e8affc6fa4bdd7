"""A grid of images from a prior in training, the same seeds at every look, as PNG and on W&B."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torchvision.utils import make_grid

from tiltlens.metrics.quality import sample_images
from tiltlens.modules.prior_quality import check_sampled
from tiltlens.modules.sharding import is_sharded


class ImageGrid(Callback):
    """At each validation writes OUT/grids/step-NNNNNN.png: n images of seeds seed, seed + 1, ..., averaged weights.

    Any prior that `PriorModule` trains, pixels or latents: the chain of sample.py, `steps` uniform in log-SNR, eta = 0, order 2.
    With a WandbLogger the same picture is its image "grid". What changes from one picture to the next is the
    network alone. How often: trainer.val_check_interval. Raises UserError for a module that is no prior.
    """

    def __init__(self, n: int = 36, steps: int = 20, seed: int = 0):
        self.n, self.steps, self.seed = n, steps, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_sampled(self, trainer, pl_module, self.steps)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # In the first batch, not at the end of the epoch: there the average may be swapped out already.
        if batch_idx or trainer.sanity_checking or not (trainer.is_global_zero or is_sharded(trainer)):
            return  # weights in shards are together only where all ranks call the network
        seeds = range(self.seed, self.seed + self.n)
        images = sample_images(
            pl_module.denoiser, pl_module.decode, seeds, self.steps, 0.0, pl_module.device, order=2
        )
        if not trainer.is_global_zero:
            return
        grid = make_grid(images.add(1).div(2), nrow=max(1, int(self.n**0.5)))
        pixels = grid.mul(255).round().byte().permute(1, 2, 0).numpy()
        folder = Path(trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("grid", [pixels], step=trainer.global_step)
