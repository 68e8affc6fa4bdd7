"""A grid of images from a prior in training, the same seeds at every look, as PNG."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler
from lightning import Callback, LightningModule, Trainer
from torchvision.utils import save_image


class ImageGrid(Callback):
    """After each validation writes OUT/grids/step-NNNNNN.png: n images by DDIM (eta = 0), averaged weights.

    The start noise is drawn once from `seed`: what changes from one picture to the next is the network alone.
    """

    def __init__(self, n: int = 36, steps: int = 20, seed: int = 0):
        self.n, self.steps, self.seed = n, steps, seed

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # In the first batch, not at the end of the epoch: there the average may be swapped out already.
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        scheduler = DDIMScheduler.from_config(module.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn((self.n, *batch["image"].shape[1:]), generator=generator).to(module.device)
        with trainer.precision_plugin.forward_context():
            for t in scheduler.timesteps:
                x = scheduler.step(module.network(x, t).sample.float(), t, x).prev_sample
        folder = Path(trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(
            x.clamp(-1, 1) / 2 + 0.5,
            folder / f"step-{trainer.global_step:06d}.png",
            nrow=max(1, int(self.n**0.5)),
        )
