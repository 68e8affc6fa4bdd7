"""How good a prior is, by the figures that a card should state.

    python benchmarks/prior_quality.py --prior bundled|DIR|owner/name --data HELD_OUT [--train TRAIN] [--n 1000]
    python benchmarks/prior_quality.py --prior bundled|DIR|owner/name --grid FILE.png      a picture alone, no data

HELD_OUT, TRAIN: sources as data.val and data.train of train.py: folders, CIFAR10, tar:SHARDS. In the features of a
named encoder, each next to what as many training images have against the same held-out ones (the floor): the kernel
distance (KID), the Frechet distance, and how often a sample is nearer to its nearest training image (or the mirror
image of one) than a held-out image is to its own (1/2 where nothing is copied; copied: the share nearer than 99 % of
held-out images, 0.01 where nothing is). Then the error of x0_hat, the mean of |x0_hat - x_0|^2 per value of a state, by
bins of log-SNR (t uniform on the training table) and the min-SNR-5 loss over all. Without TRAIN the floor is that of two
halves of HELD_OUT, and copies are not looked for. +- standard error over images. All of it is repeated to the digit by
the same command.

--weak PRIOR --weight W: samples of both networks, the prior's and a weaker one's, extrapolated: x0_hat + W (x0_hat - that of
the weak one). It says which weight a student should be taught (configs/train/prior-autoguided.yaml).
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from tiltlens.denoiser import Denoiser
from tiltlens.errors import UserError
from tiltlens.metrics import EncoderFeatures, quality, sample_images
from tiltlens.metrics.denoising_error import denoised
from tiltlens.modules.denoising import bin_names, by_noise
from tiltlens.modules.image_data import read_images, to_unit_range
from tiltlens.priors import DiffusersPrior, load_prior
from tiltlens.sampling.chain import ORDERS

READ = 64
GRID = 64


class Extrapolated(Denoiser):
    """Autoguidance by two networks (`tiltlens.modules.autoguidance`)."""

    def __init__(self, strong: Denoiser, weak: Denoiser, weight: float):
        super().__init__()
        self.strong, self.weak, self.weight = strong, weak, weight
        self.schedule, self.shape = strong.schedule, strong.shape

    def forward(self, x_t: torch.Tensor, t: int) -> torch.Tensor:
        x0_hat = self.strong(x_t, t)
        return x0_hat + self.weight * (x0_hat - self.weak(x_t, t))


def drawn(text: str, size: int, n: int, held_out: bool) -> torch.Tensor:
    """At most n images (n, 3, size, size) in [-1, 1] of a source, in an order drawn once."""
    images, labels, _ = read_images(text, size, held_out)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
    return to_unit_range(images[order])


def write_grid(images: torch.Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = to_pil_image(make_grid(images[:GRID].cpu().clamp(-1, 1) / 2 + 0.5, nrow=8))
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS)
    picture.save(file, optimize=True)


def denoiser_of(prior: DiffusersPrior, asked: argparse.Namespace) -> Denoiser:
    if not asked.weak:
        return prior.denoiser
    weak = load_prior(asked.weak, precision=asked.precision).to(asked.device)
    return Extrapolated(prior.denoiser, weak.denoiser, asked.weight)


def print_samples(prior: DiffusersPrior, held_out: torch.Tensor, asked: argparse.Namespace) -> None:
    features, device = EncoderFeatures(asked.encoder), asked.device
    if asked.train:
        n, train = min(asked.n, len(held_out)), drawn(asked.train, prior.image_size, asked.neighbours, False)
    else:
        n = min(asked.n, len(held_out) // 2)
        held_out, train = held_out[:n], held_out[n:]
    start = time.process_time()
    images = sample_images(
        denoiser_of(prior, asked), prior.decode, range(n), asked.steps, asked.eta, device, asked.order
    )
    seconds = time.process_time() - start
    if asked.grid:
        write_grid(images, asked.grid)
    sets = [features.of(x.split(READ), device) for x in (images, held_out[:n], train)]
    if asked.train:
        sets.append(features.of(train.flip(-1).split(READ), device))
    found = quality(*sets)
    told = f"weak {asked.weak}, weight {asked.weight:g}; " if asked.weak else ""
    told += f"{asked.steps} steps uniform in log-SNR, order {asked.order}, eta = {asked.eta:g}, seeds 0..{n - 1}, {seconds:.0f} s of processor time"
    print(f"samples: {told}; features of the encoder {asked.encoder}; {len(train)} training images")
    for name, value in found.items():
        stem, _, count = name.rpartition("_")
        if stem.endswith("_se") or not (asked.train or stem.startswith(("kid", "frechet"))):
            continue
        se = found.get(f"{stem}_se_{count}")
        print(f"{name}: {value:.5g}" + (f" +- {se:.2g}" if se is not None else ""))


def print_denoising(prior: DiffusersPrior, held_out: torch.Tensor, device: str) -> None:
    x_0 = torch.cat([prior.encode(x.to(device)) for x in held_out.split(READ)])
    x0_hat, log_snr = denoised(prior, x_0)
    error = (x0_hat - x_0).square().flatten(1).mean(1).cpu()
    loss = log_snr.exp().clamp(max=5) * error
    print(f"min-SNR-5 loss ({len(loss)} images): {loss.mean():.4f} +- {loss.std() / len(loss) ** 0.5:.4f}")
    print("log-SNR | images | error of x0_hat")
    means, squares = by_noise(error, log_snr), by_noise(error.square(), log_snr)
    for name in (b for b in bin_names() if b in means):
        (mean, rows), (square, _) = means[name], squares[name]
        print(f"{name} | {rows} | {mean:.4f} +- {((square - mean**2).clamp(min=0) / rows) ** 0.5:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="bundled")
    parser.add_argument("--data", help="held-out images; without them --grid alone is written")
    parser.add_argument("--train", help="the images that the prior was trained on")
    parser.add_argument("--n", type=int, default=1000, help="samples, and as many images of either set")
    parser.add_argument("--n-loss", type=int, default=3000, help="held-out images for the denoising error")
    parser.add_argument("--neighbours", type=int, default=10_000, help="training images searched for copies")
    parser.add_argument("--encoder", default="bundled", help="timm name, local-dir:FOLDER or bundled")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--order", type=int, default=1, choices=ORDERS, help="of the chain")
    parser.add_argument("--grid", type=Path, help="write the first 64 samples, eight by eight, as PNG")
    parser.add_argument("--weak", help="a weaker prior of the same kind, to extrapolate from")
    parser.add_argument("--weight", type=float, default=2.0, help="of the extrapolation")
    parser.add_argument("--precision", default="float32", help="of the prior's network: float32 or bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    if asked.data is None and (asked.grid is None or asked.train):
        parser.error(
            "figures need --data HELD_OUT; without it --grid FILE.png, with no --train, writes a picture"
        )
    try:
        prior = load_prior(asked.prior, precision=asked.precision).to(asked.device)
        if asked.data is None:
            seeds = range(min(asked.n, GRID))
            denoiser = denoiser_of(prior, asked)
            images = sample_images(
                denoiser, prior.decode, seeds, asked.steps, asked.eta, asked.device, asked.order
            )
            return write_grid(images, asked.grid)
        held_out = drawn(asked.data, prior.image_size, 10**9, True)
        print_denoising(prior, held_out[: asked.n_loss], asked.device)
        print_samples(prior, held_out, asked)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
