"""An encoder's activations of an image set, computed once and kept on disk by what they are made of.

The name of the file is a hash of the encoder's weights and preprocessing, the layer, the tokens, the positions that
were kept and every pixel: nothing that changes the numbers leaves the name as it is.
"""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_data import Batch
from tiltlens.units.encoder import Encoder
from tiltlens.units.readout import positions
from tiltlens.writing import whole_file


def read_tokens(encoder: Encoder, images: Tensor, layer: str | None, tokens: str | None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> h (B, P, C), as a unit of this layer and these tokens reads it."""
    return positions(encoder.activations(images, [layer])[layer].float(), tokens, encoder)[0]


def cached_activations(
    encoder: Encoder,
    images: Iterable[Batch],
    layer: str | None,
    tokens: str | None,
    per_image: int | None,
    cache: Path,
    device: torch.device | str = "cpu",
) -> Tensor:
    """images: batches {image (B, 3, H, W) in [-1, 1]}, the same at each pass -> activations (rows, C) float16, image by
    image; per_image positions of each, drawn by the number of the image (None: all). Raises ValueError for tokens that
    the layer has not, UserError for activations beyond float16."""
    named = (encoder.identity, layer, tokens, per_image)
    digest = hashlib.sha256(repr(named).encode())
    for batch in images:
        digest.update(f"{tuple(batch['image'].shape)}".encode())
        digest.update(batch["image"].contiguous().numpy())
    path = cache / f"activations-{digest.hexdigest()[:24]}.safetensors"
    if not path.is_file():
        rows = _encode(encoder.to(device), images, layer, tokens, per_image)
        encoder.cpu()  # the accelerator's memory is for training
        with whole_file(path) as part:
            safetensors.torch.save_file({"activations": rows}, part)
    return safetensors.torch.load_file(path)["activations"]


@torch.no_grad()
def _encode(
    encoder: Encoder, images: Iterable[Batch], layer: str | None, tokens: str | None, per_image: int | None
) -> Tensor:
    device = next(encoder.parameters(), torch.zeros(())).device
    generator = torch.Generator().manual_seed(0)
    kept = []
    for batch in images:
        h = read_tokens(encoder, batch["image"].to(device), layer, tokens).cpu()
        if per_image is not None and per_image < h.shape[1]:
            drawn = torch.rand(h.shape[:2], generator=generator).argsort(1)[:, :per_image]
            h = h.gather(1, drawn[..., None].expand(-1, -1, h.shape[2]))
        rows = h.flatten(0, 1).half()
        if not torch.isfinite(rows).all():
            top = float(h.abs().max())
            found = f"up to {top:.3g}" if math.isfinite(top) else "NaN or infinity"
            raise UserError(
                f"layer {layer or 'output'} of {encoder.name} puts out {found}; activations are cached as float16 "
                "(up to 65504): take a layer behind a norm"
            )
        kept.append(rows)
    return torch.cat(kept)
