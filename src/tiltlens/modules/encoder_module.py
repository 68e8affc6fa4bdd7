"""Training of an image encoder as a classifier: a vision transformer of timm, in miniature.

Loss: cross-entropy with smoothed labels, (1 - e) [-log p_y] + e mean_k [-log p_k], on the pooled patches and,
where the pooling leaves the cls token out, as timm's DINOv3 does, as much again on the cls token through the
same head: else the last cls would be read by nobody in training and mean nothing to whoever asks for it
later.

The encoder will be read on x0_hat = E[x_0 | x_t], a diffusion model's clean estimate, which is a blurry image
at high noise. An encoder that saw sharp images only answers there with accidents of its filters, and guidance
follows them. So a share of the training images is passed through a random low-pass (down to 8..24 of 32
pixels and up again, bilinear) or gets a little Gaussian noise; the rest stays sharp.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from lightning import LightningModule
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional

from tiltlens.errors import UserError
from tiltlens.modules.image_data import Batch
from tiltlens.modules.learning_rate import check_rate, warm_hold_decay
from tiltlens.writing import whole_folder


class EncoderModule(LightningModule):
    """A timm network, create_model(architecture, num_classes=..., **model_args), trained as a classifier.

    Batches: {image (B, 3, H, W) in [-1, 1], label (B,), seed}. The network reads [-1, 1], mean 0.5 and
    deviation 0.5 in timm's words.

    optimizer: a name of timm.optim (adamw; muon: orthogonalised momentum for matrices, AdamW for the rest).
    learning_rate: the peak; warm-up over the share `warmup` of all steps, then a cosine to 0. degraded: the
    share of images drawn for `degrade`. fused_attention: False where the fused kernel is the slow one: the
    CPU's backward in bf16 takes four times as long as the plain products. compile: torch.compile of training's
    forward and backward. Raises UserError for an unknown architecture, arguments that it refuses, numbers out of
    range, and images that the network does not take.
    """

    def __init__(
        self,
        architecture: str = "vit_small_patch16_dinov3",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 10,
        optimizer: str = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        label_smoothing: float = 0.1,
        degraded: float = 0.4,
        fused_attention: bool = True,
        compile: bool = False,
    ):
        super().__init__()
        check_rate(learning_rate, weight_decay, warmup, 1 - warmup)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing = {label_smoothing}: expected at least 0 and below 1")
        if not 0 <= degraded <= 1:
            raise UserError(f"model.degraded = {degraded}: expected a share of the images, 0 to 1")
        self.size: int | None = None
        self.architecture, self.model_args, self.num_classes = (
            architecture,
            dict(model_args or {}),
            num_classes,
        )
        try:
            self.network = timm.create_model(architecture, num_classes=num_classes, **self.model_args)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"timm cannot build {architecture!r} with model_args {self.model_args}: {error}"
            ) from error
        for part in self.network.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused_attention and part.fused_attn
        # The function, not the module: the names of the weights stay timm's.
        self.features = (
            torch.compile(self.network.forward_features) if compile else self.network.forward_features
        )
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.warmup, self.label_smoothing, self.degraded = warmup, label_smoothing, degraded

    def setup(self, stage: str) -> None:
        found = self.trainer.datamodule.class_names if self.trainer.datamodule else []
        if found and len(found) != self.num_classes:
            raise UserError(
                f"the data has {len(found)} classes ({', '.join(found[:12])}); model.num_classes is "
                f"{self.num_classes}: "
                "set it to the number of folders below data.train"
            )
        self.class_names = found
        self.size = getattr(self.trainer.datamodule, "size", None)
        self.check_data(self.trainer.datamodule)

    @torch.no_grad()
    def check_data(self, data: Any) -> None:
        """Raises UserError for images of another size or number of channels than the network takes: one is tried."""
        size, asked = getattr(data, "size", None), self.model_args.get("img_size")
        if size is None:
            return
        sides = set(asked) if isinstance(asked, list | tuple) else {asked or size}
        # a network of any size would take them, and be exported with the size that it never saw
        if sides != {size}:
            raise UserError(f"data.size = {size}: model.model_args.img_size is {asked}; set both to one size")
        training, weight = self.network.training, next(self.network.parameters())
        try:
            self.network.eval()(weight.new_zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"{type(self.network).__name__} does not take images of data.size = {size} pixels with 3 channels "
                f"({error}): set data.size to what it takes, or its img_size, patch_size and in_chans in model.model_args"
            ) from error
        finally:
            self.network.train(training)

    def identity(self) -> dict[str, Any]:
        """What the weights mean, for `CheckResumed`: heads, for instance, divide them without a trace in their shapes."""
        classes = getattr(self.trainer.datamodule, "class_names", [])
        return {
            "model.architecture": self.architecture,
            "model.model_args": self.model_args,
            "classes": list(classes),
        }

    def readouts(self, images: Tensor) -> list[Tensor]:
        """Logits (B, num_classes) of the network and, where its pooling leaves it out, of the cls token."""
        network = self.network
        # Validation's last batch may be short: compiling again for it would cost more than it saves.
        features = self.features(images) if self.training else network.forward_features(images)
        logits = [network.forward_head(features)]
        if getattr(network, "num_prefix_tokens", 0) and getattr(network, "global_pool", "") == "avg":
            logits.append(network.head(network.fc_norm(features[:, 0])))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch["seed"])
        images = degrade(augment(batch["image"], generator), self.degraded, generator)
        torch.manual_seed(
            batch["seed"]
        )  # dropped paths are drawn from the global generator: the batch names it too
        losses = [
            functional.cross_entropy(logits.float(), batch["label"], label_smoothing=self.label_smoothing)
            for logits in self.readouts(images)
        ]
        loss = sum(losses) / len(losses)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"], batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """val_top1 and val_loss on the images as they are; val_top1_blurred after a low-pass to half.

        val_top1_cls: of the cls token, where `readouts` has it.
        """
        images, labels = batch["image"], batch["label"]
        logits, *cls = self.readouts(images)
        logits = logits.float()
        for other in cls:
            self.log("val_top1_cls", (other.argmax(1) == labels).float().mean(), batch_size=len(labels))
        self.log("val_loss", functional.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(
            "val_top1", (logits.argmax(1) == labels).float().mean(), prog_bar=True, batch_size=len(labels)
        )
        blurred = self.network(low_pass(images, images.shape[-1] // 2)).float()
        self.log("val_top1_blurred", (blurred.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = create_optimizer_v2(
            self.network, opt=self.optimizer, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        return warm_hold_decay(optimizer, self.trainer, self.warmup, 1 - self.warmup, shape="cosine")

    def export(self, folder: Path) -> Path:
        """Writes folder/encoder, read by timm.create_model("local-dir:folder/encoder", pretrained=True)."""
        out = Path(folder) / "encoder"
        # A convolutional network takes any size: what it was trained on is what its reader must resize to.
        size = self.size or self.model_args.get("img_size") or self.network.pretrained_cfg["input_size"][-1]
        # timm copies the architecture's card; its tag and licence are those of weights that are not here.
        config: dict[str, Any] = {"pretrained_cfg": {"tag": None, "license": None}}
        if self.class_names:
            config["label_names"] = self.class_names
        with whole_folder(out) as part:
            save_for_hf(
                self.network,
                part,
                model_config=config,
                model_args=self.model_args,
                data_config={
                    "input_size": (3, size, size),
                    "mean": (0.5,) * 3,
                    "std": (0.5,) * 3,
                    "crop_pct": 1.0,
                },
                safe_serialization=True,
            )
        return out


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A shift of up to an eighth of the side (mirrored border), a flip, light jitter of contrast and colour.

    images (B, 3, H, W) in [-1, 1] -> the same shape, clipped to [-1, 1].
    """
    b, _, h, w = images.shape
    pad = max(1, h // 8)
    padded = functional.pad(images, (pad,) * 4, mode="reflect")
    down = torch.randint(2 * pad + 1, (b,), generator=generator).to(images.device)
    right = torch.randint(2 * pad + 1, (b,), generator=generator).to(images.device)
    mirrored = (torch.rand(b, generator=generator) < 0.5).to(images.device)
    columns = torch.arange(w, device=images.device).expand(b, w)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns) + right[:, None]
    rows = torch.arange(h, device=images.device) + down[:, None]
    which = torch.arange(b, device=images.device)[:, None, None]
    out = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    contrast, brightness, colour = (0.2 * (2 * torch.rand(3, b, 1, 1, 1, generator=generator) - 1)).to(out)
    grey = out.mean(1, keepdim=True)
    out = grey + (1 + colour) * (out - grey)
    return (out * (1 + contrast) + brightness).clamp(-1, 1)


def degrade(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Of a share of the images three quarters get a low-pass, half noise of sd up to 0.15 (some get both).

    The low-pass keeps a quarter to three quarters of the pixels of a side, one width for each eighth of the
    batch.
    """
    b, _, h, _ = images.shape
    hit = torch.rand(b, generator=generator) < share
    blur = hit & (torch.rand(b, generator=generator) < 0.75)
    noise = hit & (torch.rand(b, generator=generator) < 0.5)
    out = images.clone()
    for rows in blur.nonzero().flatten().chunk(8):
        width = int(torch.randint(h // 4, 3 * h // 4 + 1, (), generator=generator))
        if rows.numel():
            out[rows] = low_pass(images[rows], width)
    level = 0.15 * torch.rand(b, 1, 1, 1, generator=generator) * noise[:, None, None, None]
    return out + (level * torch.randn(images.shape, generator=generator)).to(images)


def low_pass(images: Tensor, width: int) -> Tensor:
    """Down to width x width (averaging) and back up, bilinear: keeps wavelengths above two coarse pixels."""
    small = functional.interpolate(
        images, size=(width, width), mode="bilinear", antialias=True, align_corners=False
    )
    return functional.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
