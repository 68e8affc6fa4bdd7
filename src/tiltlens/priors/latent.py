"""From the latent of a diffusion chain to the image, and back.

    image = D(x_0 / c + b),   x_0 = c (E(image) - b)

with c and b the scale and the shift of the autoencoder's config and E the mean of the encoder's posterior
(Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022).
"""

from torch import Tensor, nn

from tiltlens.errors import UserError

SUPPORTED = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


class Codec(nn.Module):
    """An autoencoder of diffusers: AutoencoderKL, AutoencoderTiny or VQModel. Raises UserError for another.

    channels: of a latent; factor: its pixels a side. A VQModel quantises in its decoder; gradients go
    straight through.
    """

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        kind, config = type(autoencoder).__name__, autoencoder.config
        means = config.get("latents_mean") is not None
        if kind not in SUPPORTED or means:
            found = kind + " with a mean for each latent channel" * means
            raise UserError(f"latent prior: expected one of {', '.join(SUPPORTED)}, found {found}")
        if config.out_channels != 3:
            raise UserError(
                f"latent prior: expected an autoencoder of 3 channels, found {config.out_channels}"
            )
        self.autoencoder = autoencoder
        self.scale = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latent (B, C, h, w) -> image (B, 3, factor h, factor w), [-1, 1], unclipped; differentiable."""
        return self.autoencoder.decode(x_0 / self.scale + self.shift).sample

    def encode(self, images: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> latent (B, C, H / factor, W / factor); the mean, no draw."""
        coded = self.autoencoder.encode(images)
        mean = coded.latent_dist.mean if hasattr(coded, "latent_dist") else coded.latents
        return (mean - self.shift) * self.scale
