"""What the rest of the house knows of a prior."""

import hashlib

import torch
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

    def identity(self) -> dict:
        """All that samples of it depend on, for a run's identity: name, fingerprint, a digest of the tables around the network
        (noise levels, parametrisation, scale of latents), and prompt and precision where it has them."""
        denoiser, codec = self.denoiser, getattr(self, "codec", None)
        schedule = denoiser.schedule
        tables = [schedule.alpha, schedule.sigma, schedule.time, torch.tensor([schedule.init_std])]
        tables += [getattr(denoiser, name) for name in ("skip", "out", "scale_in") if hasattr(denoiser, name)]
        tables += [torch.tensor([codec.scale, codec.shift])] if codec is not None else []
        digest = hashlib.sha256()
        for table in tables:
            digest.update(table.double().cpu().numpy().tobytes())
        told = {name: getattr(self, name) for name in ("prompt", "precision") if hasattr(self, name)}
        return {"name": self.name, "fingerprint": self.fingerprint, "tables": digest.hexdigest(), **told}

    @property
    def law(self) -> str:
        """One digest of it all but the name, which is where it lies: the key of what was drawn from this prior."""
        told = {k: v for k, v in self.identity().items() if k != "name"}
        return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()

    def decode(self, x_0: Tensor) -> Tensor:
        """Chain state (B, *denoiser.shape) -> what a unit sees. Differentiable; the identity unless latent."""
        return x_0
