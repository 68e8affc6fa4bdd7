"""What the rest of the house knows of a prior."""

from torch import Tensor, nn

from tiltlens.denoiser import Denoiser


class Prior(nn.Module):
    """A law of natural images, sampled by a chain over its denoiser.

    name: as asked for. denoiser: the x0 contract; its `shape` is that of the chain's states. fingerprint: sha256
    (hex) of the weights, or of the numbers that define an analytic law. images: True if `decode` gives images
    (B, 3, H, W) in [-1, 1], False for plain vectors (B, d).
    """

    name: str
    denoiser: Denoiser
    fingerprint: str
    images: bool = True

    @property
    def image_size(self) -> int | None:
        """Side of the decoded image in pixels; None where the prior has no images."""
        raise NotImplementedError

    def decode(self, x_0: Tensor) -> Tensor:
        """Chain state (B, *denoiser.shape) -> what a unit sees. Differentiable; the identity unless latent."""
        return x_0
