"""All that is asked of a prior's samples, by name: what a callback logs and a benchmark prints."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltlens.denoiser import Denoiser
from tiltlens.metrics.distances import frechet_distance, kernel_distance
from tiltlens.metrics.memorisation import memorisation
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.schedule import step_indices

BATCH = 64


@torch.no_grad()
def sample_images(
    denoiser: Denoiser, decode: Callable[[Tensor], Tensor], seeds: Sequence[int], steps: int, eta: float,
    device: torch.device | str = "cpu", order: int = 1,
) -> Tensor:  # fmt: skip
    """Unguided images (n, 3, H, W) in [-1, 1], uint8-rounded, on the CPU: the chain of sample.py, a seed an image.

    Steps uniform in log-SNR. An image depends on its seed alone, not on how many are drawn.
    """
    chain = Chain(denoiser, step_indices(denoiser.schedule, steps), eta, order=order)
    images = []
    for start in range(0, len(seeds), BATCH):
        noise = Noise(seeds[start : start + BATCH], denoiser.shape, device)
        state, _ = deque(chain.run(noise), maxlen=1).pop()
        images.append(decode(state.x).float().clamp(-1, 1).cpu())
    # natural images have 256 levels; an encoder would see the difference
    return torch.cat(images).add(1).mul(127.5).round().div(127.5).sub(1)


def quality(
    samples: Tensor, held_out: Tensor, train: Tensor, mirrored: Tensor | None = None
) -> dict[str, float]:
    """Distances of samples to held-out images, next to what n training images have; features (., d).

    mirrored: of the training images turned left to right: what was trained with flips may copy these as well.

    kid_nN, frechet_nN and kid_floor_nN, frechet_floor_nN with N = the least of the three lengths, from the first N rows
    of each; nearer_nN, copied_nN with all rows of train and mirrored as neighbours; standard errors as NAME_se.
    """
    n = min(len(samples), len(held_out), len(train))
    real, fake, other = held_out[:n], samples[:n], train[:n]
    kid, floor = kernel_distance(fake, real), kernel_distance(other, real)
    near = memorisation(fake, real, train if mirrored is None else torch.cat([train, mirrored]))
    found = {
        "kid": kid.value, "kid_se": kid.se, "kid_floor": floor.value, "kid_floor_se": floor.se,
        "frechet": frechet_distance(fake, real), "frechet_floor": frechet_distance(other, real),
        "nearer": near.nearer.value, "nearer_se": near.nearer.se,
        "copied": near.copied.value, "copied_se": near.copied.se,
        "neighbour_distance": near.sample, "neighbour_distance_held_out": near.held_out,
    }  # fmt: skip
    return {f"{name}_n{n}": value for name, value in found.items()}
