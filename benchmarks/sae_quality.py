"""How good a sparse autoencoder is, on held-out images: the numbers of the bundled card, and what its latents look like.

    python benchmarks/sae_quality.py --data data/cifar10/test [--sae bundled] [--encoder bundled] [--n 10000] [--out DIR]

Every token of every image, through the exported file alone: normalised MSE (the mean of the training set as its unit),
latents on a token, share of latents on for at least one token; top-1 of the encoder with the layer's tokens replaced by
their reconstruction, next to the untouched encoder and to the mean token in their place (what share of the gap is kept).
--out: a grid with the top images of --show latents, one row each, drawn at even steps of how often they are on; no
latent is chosen by eye.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from tiltlens.modules.image_data import read_images, to_unit_range
from tiltlens.modules.sae_module import SparsityMetrics
from tiltlens.units import build_unit, load_encoder
from tiltlens.units.readout import positions
from tiltlens.units.sparse_autoencoder import load_dictionary, read_config

BATCH = 256
TOP = 12
SHARES = (0.5, 0.05, 0.005)


@torch.no_grad()
def top1(encoder: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Right (N,), boolean."""
    found = [encoder.activations(x, [None])[None].argmax(1) for x in images.split(BATCH)]
    return torch.cat(found).eq(labels)


def replaced(encoder: torch.nn.Module, layer: str, tokens: str | None, by: Callable[[Tensor], Tensor]):
    """A hook: the tokens that the autoencoder was trained on, within the layer's output (B, N, C), mapped by `by`."""
    index = torch.arange(encoder.num_prefix_tokens + math.prod(encoder.grid))[None, :, None]
    rows = positions(index, tokens, encoder)[0].flatten()

    def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, rows] = by(output[:, rows])
        return output

    return encoder.model.get_submodule(layer).register_forward_hook(hook)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="held-out images, FOLDER/CLASS/*")
    parser.add_argument("--sae", default="bundled", help="bundled, or a folder as train.py exports it")
    parser.add_argument("--encoder", default="bundled")
    parser.add_argument("--n", type=int, default=10_000, help="images")
    parser.add_argument("--show", type=int, default=8, help="latents in the grid")
    parser.add_argument("--out", type=Path, help="where latents.png goes")
    asked = parser.parse_args()
    build_unit(f"{asked.encoder},sae={asked.sae}#0").load()  # whether the two belong together
    encoder, sae, config = load_encoder(asked.encoder), load_dictionary(asked.sae), read_config(asked.sae)
    layer, tokens = config["layer"], config["tokens"]
    images, labels, _ = read_images(str(asked.data), encoder.input_size[0], True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: asked.n]
    images, labels = to_unit_range(images[order]), labels[order]

    metrics, best, seen = SparsityMetrics(sae.latents), [], 0
    with torch.no_grad():
        for x in images.split(BATCH):
            h = positions(encoder.activations(x, [layer])[layer], tokens, encoder)[0]
            z = sae.encode(h)
            metrics.update(*(v.flatten(0, 1) for v in (sae.normalise(h), sae.combine(z), z)))
            best.append(z.amax(1))
            seen += h.shape[0] * h.shape[1]
    found = {name: float(value) for name, value in metrics.compute().items()}
    share = metrics.on / metrics.rows
    print(f"{config['kind']}, {sae.latents} latents, k = {sae.k}; {len(images)} images, {seen} tokens")
    print(
        f"normalised MSE {found['nmse']:.4f} | latents on a token {found['l0']:.2f} | alive {found['alive']:.4f}"
    )
    rare = ", ".join(f"{int((share > bound).sum())} above {100 * bound:g} %" for bound in SHARES)
    print(f"latents that are on in tokens: {rare}")

    right = {"as it is": top1(encoder, images, labels)}
    for name, by in (
        ("by reconstruction", lambda h: sae.decode(sae.encode(h))),
        ("by the mean", lambda h: sae.mean.expand_as(h)),
    ):
        handle = replaced(encoder, layer, tokens, by)
        right[f"tokens of {layer} {name}"] = top1(encoder, images, labels)
        handle.remove()
    for name, r in right.items():
        p = r.double().mean().item()
        print(f"top-1 %, {name}: {100 * p:.1f} +- {100 * math.sqrt(p * (1 - p) / len(r)):.1f}")

    if asked.out:
        strength = torch.cat(best)  # (N, M)
        usual = (strength > 0).double().mean(0).argsort(descending=True)
        alive = usual[(strength[:, usual] > 0).sum(0) >= TOP]
        chosen = alive[torch.linspace(0, len(alive) - 1, asked.show + 2).long()[1:-1]]
        rows = [images[strength[:, j].topk(TOP).indices] for j in chosen]
        asked.out.mkdir(parents=True, exist_ok=True)
        save_image(make_grid(torch.cat(rows) / 2 + 0.5, TOP, pad_value=1), asked.out / "latents.png")
        for j in chosen.tolist():
            print(
                f"latent {j}: on in {100 * share[j]:.2f} % of the tokens and "
                f"{100 * (strength[:, j] > 0).double().mean():.1f} % of the images"
            )


if __name__ == "__main__":
    main()
