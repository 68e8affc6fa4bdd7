"""Diffusion priors from diffusers folders: the border where foreign models become x0_hat(x_t, t).

- `folder.py`: name -> folder, found, checked, fingerprinted. `pipeline.py`: folder -> pipeline of diffusers.
- `families.py`: scheduler -> the tables of x0_hat = skip_t x_t + out_t F(in_t x_t, time_t), and the schedule.
- `networks.py`: network -> F under a fixed condition.
- `latent.py`: autoencoder, where there is one -> image = D(x_0 / c + b).
"""

import torch
from torch import Tensor

from tiltlens.batches import in_equal_batches
from tiltlens.denoiser import NetworkDenoiser
from tiltlens.errors import UserError
from tiltlens.priors.families import Family, read_family
from tiltlens.priors.folder import check_folder, find_folder
from tiltlens.priors.latent import Codec
from tiltlens.priors.networks import FixedNetwork, fixed_network
from tiltlens.priors.pipeline import load_pipeline
from tiltlens.priors.prior import Prior

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class DiffusersPrior(Prior):
    """A pixel or latent diffusion prior; always in eval mode, its parameters frozen.

    family: variance-preserving, edm or flow. prediction_type: what the network predicts, in diffusers' words.
    codec: None for pixels.
    """

    dtype = torch.float32

    def __init__(
        self,
        name: str,
        fingerprint: str,
        network: FixedNetwork,
        family: Family,
        codec: Codec | None = None,
        prompt: str = "",
        precision: str = "float32",
    ):
        super().__init__()
        self.name, self.fingerprint, self.prompt, self.precision = name, fingerprint, prompt, precision
        self.family, self.prediction_type = family.name, family.prediction
        shape = (network.channels, *sides(network))
        expected = codec.channels if codec else 3
        if shape[0] != expected:
            kind = "latents of its autoencoder" if codec else "images (no autoencoder)"
            raise UserError(
                f"prior {name}: expected a network of {kind} with {expected} channels, found {shape[0]}"
            )
        self.denoiser = NetworkDenoiser(
            network, family.schedule, shape, **family.tables, autocast=PRECISIONS[precision]
        )
        self.codec = codec
        self.requires_grad_(False)
        self.float()  # weights stored in half precision compute in float32
        self.train(False)

    def train(self, mode: bool = True) -> "DiffusersPrior":
        """Stays in eval mode: a prior is a fixed law, and a trainer around it would switch its dropout on."""
        return super().train(False)

    @property
    def image_size(self) -> int:
        return self.denoiser.shape[-1] * (self.codec.factor if self.codec else 1)

    def decode(self, x_0: Tensor) -> Tensor:
        """State (B, *denoiser.shape) -> image (B, 3, H, W), about [-1, 1], unclipped. Differentiable."""
        return in_equal_batches(self.codec.decode, x_0) if self.codec else x_0

    def encode(self, images: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> state (B, *denoiser.shape): posterior mean, or the image."""
        return self.codec.encode(images) if self.codec else images

    def describe(self) -> dict:
        """What a manifest says of the prior, plain numbers and strings."""
        network = self.denoiser.network.network
        return {
            "family": self.family,
            "prediction": self.prediction_type,
            "network": type(network).__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            "space": "latent" if self.codec else "pixel",
            "shape": list(self.denoiser.shape),
            "image_size": self.image_size,
            "table": len(self.denoiser.schedule),
            "prompt": self.prompt,
            "precision": self.precision,
        }


def sides(network: FixedNetwork) -> tuple[int, int]:
    """Of a state, by the network's config. Raises UserError unless it tells them and they are equal."""
    size = network.network.config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or sides[0] != sides[1]:
        raise UserError(
            f"prior network: expected a square sample_size in its config, found {size!r}: set it to the pixels, or "
            "latents, of a side"
        )
    return sides


def load_prior(name: str, *, prompt: str = "", precision: str = "float32") -> DiffusersPrior:
    """A diffusion prior by name.

    name: "bundled", a diffusers folder, or a hub name (owner/name). prompt: the text under which a
    text-conditional network is the prior; it must stay empty for others. precision: of the network alone,
    float32 or bfloat16 (autocast); states, schedule and decoder stay in float32.

    `clip_sample`, `thresholding` and the solver of the folder's scheduler are ignored: clipping is an option
    of the chain. Raises UserError (a ValueError), one message with what was expected, what was found and what
    to do, for an unknown name, a hub that does not answer, a folder without scheduler or with missing,
    truncated or pickled weights, and a scheduler or network outside the supported families.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    folder = check_folder(find_folder(str(name)))
    pipeline = load_pipeline(folder.path, folder.components, folder.skipped)
    network = fixed_network(pipeline, prompt)
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    codec = Codec(autoencoder) if autoencoder is not None else None
    family = read_family(pipeline.scheduler)
    return DiffusersPrior(str(name), folder.fingerprint, network, family, codec, prompt, precision)
