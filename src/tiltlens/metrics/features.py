"""Images as an encoder sees them: what its classifier would read, one vector an image."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tiltlens.batches import in_equal_batches
from tiltlens.units.sources import find_encoder


class EncoderFeatures(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, num_features) float32, the pooled input of the last layer.

    encoder: the name of a timm encoder as in a unit's address: "bundled", a timm model, local-dir:FOLDER.
    A row does not depend on its batch. Raises ValueError for an unknown encoder and one that is not timm's.
    """

    def __init__(self, encoder: str = "bundled"):
        super().__init__()
        self.name, self.encoder = encoder, find_encoder(encoder)()
        if not hasattr(self.encoder.model, "forward_head"):
            raise ValueError(f"the encoder {encoder} has no pooled features: expected one of timm's")
        self.num_features = int(self.encoder.model.head_hidden_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return in_equal_batches(self._one, images.float())

    def _one(self, images: Tensor) -> Tensor:
        model = self.encoder.model
        return model.forward_head(model.forward_features(self.encoder.preprocess(images)), pre_logits=True)

    def of(self, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
        """Features (N, num_features), on the CPU, of batches of images."""
        self.to(device)
        return torch.cat([self(images.to(device)).float().cpu() for images in batches])
