"""How good a prior and an encoder are, on held-out images: the numbers of the bundled cards.

    python benchmarks/bundle_quality.py --data data/cifar10/test [--prior DIR] [--encoder DIR] [--n 2000]

Prior: the error of x0_hat, the mean of |x0_hat - x_0|^2 per value in [-1, 1], by bins of log-SNR (t uniform
on the table, noise by seed), and the min-SNR-5 loss it was trained on. Encoder: top-1 on the images as they
are, after a low-pass to 16 and to 8 pixels, and on the prior's x0_hat in each bin: what guidance shows it.
"""

import argparse
import math
from pathlib import Path

import timm
import torch

from tiltlens.modules.denoising import LOG_SNR_EDGES, bin_names
from tiltlens.modules.encoder_module import low_pass
from tiltlens.modules.image_data import read_images, to_unit_range
from tiltlens.modules.prior_module import PriorModule

BUNDLED = Path(__file__).parents[1] / "src" / "tiltlens" / "bundled"
BATCH = 100


def held_out(root: Path, n: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """n images in an order drawn once: images (n, 3, 32, 32) in [-1, 1], labels (n,), class names."""
    images, labels, names = read_images(str(root), 32)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
    return to_unit_range(images[order]), labels[order], names


@torch.no_grad()
def denoised(prior: PriorModule, x_0: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0_hat (N, 3, H, W), log-SNR (N,)) at times that cover the table evenly."""
    scheduler, kind = prior.scheduler, prior.scheduler.config.prediction_type
    generator = torch.Generator().manual_seed(seed)
    length = len(scheduler.alphas_cumprod)
    t = ((torch.arange(len(x_0)) + torch.rand(len(x_0), generator=generator)) * length / len(x_0)).long()
    x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t)
    alpha = scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    f = torch.cat([prior.network(a, b).sample for a, b in zip(x_t.split(BATCH), t.split(BATCH))])
    x0_hat = {"v_prediction": alpha * x_t - sigma * f, "epsilon": (x_t - sigma * f) / alpha, "sample": f}[
        kind
    ]
    return x0_hat, 2 * (alpha / sigma).log().flatten()


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
    prior = PriorModule(init_from=asked.prior).eval()
    x0_hat, log_snr = denoised(prior, images, seed=0)
    error = (x0_hat - images).square().flatten(1).mean(1)
    loss = log_snr.exp().clamp(max=5.0) * error
    print(f"prior min-SNR-5 loss ({len(labels)}): {loss.mean():.4f} +- {loss.std() / len(loss) ** 0.5:.4f}")
    print("log-SNR | images | error of x0_hat | encoder top-1 % on x0_hat")
    which = torch.bucketize(log_snr, torch.tensor(LOG_SNR_EDGES))
    for k, name in enumerate(bin_names()):
        rows = which == k
        spread = error[rows].std() / rows.sum() ** 0.5
        score = top1(encoder, x0_hat[rows], labels[rows])
        print(f"{name} | {int(rows.sum())} | {error[rows].mean():.4f} +- {spread:.4f} | {score}")


if __name__ == "__main__":
    main()
