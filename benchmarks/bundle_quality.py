"""How good an encoder is, on held-out images: the numbers of the bundled encoder's card.

    python benchmarks/bundle_quality.py --data data/cifar10/test [--prior DIR] [--encoder DIR] [--n 2000]

Top-1 on the images as they are, after a low-pass to 16 and to 8 pixels, and on a prior's x0_hat in each bin of
log-SNR: what guidance shows it. The prior's own figures: benchmarks/prior_quality.py.
"""

import argparse
import math
from pathlib import Path

import timm
import torch

from tiltlens.metrics.denoising_error import denoised
from tiltlens.modules.denoising import LOG_SNR_EDGES, bin_names
from tiltlens.modules.encoder_module import low_pass
from tiltlens.modules.image_data import read_images, to_unit_range
from tiltlens.priors import load_prior

BUNDLED = Path(__file__).parents[1] / "src" / "tiltlens" / "bundled"
BATCH = 100


def held_out(root: Path, n: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """n images in an order drawn once: images (n, 3, 32, 32) in [-1, 1], labels (n,), class names."""
    images, labels, names = read_images(str(root), 32)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
    return to_unit_range(images[order]), labels[order], names


@torch.no_grad()
def top1(encoder: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> str:
    """Top-1 in percent with its standard error."""
    right = torch.cat([encoder(x).argmax(1) for x in images.split(BATCH)]).eq(labels).float().mean().item()
    return f"{100 * right:.1f} +- {100 * math.sqrt(right * (1 - right) / len(labels)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="held-out images, FOLDER/CLASS/*")
    parser.add_argument("--prior", type=Path, default=BUNDLED / "prior")
    parser.add_argument("--encoder", type=Path, default=BUNDLED / "encoder")
    parser.add_argument("--n", type=int, default=10_000, help="images for the encoder's clean top-1")
    parser.add_argument("--n-prior", type=int, default=3000, help="images for the prior")
    asked = parser.parse_args()
    images, labels, names = held_out(asked.data, asked.n)
    encoder = timm.create_model(f"local-dir:{asked.encoder}", pretrained=True).float().eval()
    if list(encoder.pretrained_cfg.get("label_names") or names) != names:
        parser.error(f"--data has classes {names}; expected {encoder.pretrained_cfg['label_names']}")
    print(f"encoder top-1 % ({len(labels)} images): {top1(encoder, images, labels)}")
    images, labels = images[: asked.n_prior], labels[: asked.n_prior]
    for width in (16, 8):
        print(f"encoder top-1 % low-passed to {width} px: {top1(encoder, low_pass(images, width), labels)}")
    x0_hat, log_snr = denoised(load_prior(str(asked.prior)), images)
    print("log-SNR of the prior's x0_hat | images | encoder top-1 % on it")
    which = torch.bucketize(log_snr, torch.tensor(LOG_SNR_EDGES))
    for k, name in enumerate(bin_names()):
        rows = which == k
        print(f"{name} | {int(rows.sum())} | {top1(encoder, x0_hat[rows], labels[rows])}")


if __name__ == "__main__":
    main()
