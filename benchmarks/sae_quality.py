"""How good a sparse autoencoder is, on held-out images: the numbers of the bundled card, and what its latents look like.

    python benchmarks/sae_quality.py --data data/cifar10/test [--sae bundled] [--encoder bundled] [--n 10000] [--out DIR]

Every token of every image, through the exported file alone: normalised MSE (the mean of the training set as its unit),
latents on a token, share of latents on for at least one token; top-1 of the encoder with the layer's tokens replaced by
their reconstruction, next to the untouched encoder and to the mean token in their place (what share of the gap is kept).
How many latents have top images of mostly one class says how far they go beyond edges and colours.
--out: a grid with the top images of 8 latents, one row each: four at even steps of how often they are on, then the four
whose top images are most of one class. No latent is chosen by eye.
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
TOP, SHOW = 12, 4  # images of a latent, latents of either sort
SHARES = (0.5, 0.05, 0.005)
PURE = (0.5, 0.75, 1.0)


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
    parser.add_argument("--out", type=Path, help="where latents.png goes")
    asked = parser.parse_args()
    build_unit(f"{asked.encoder},sae={asked.sae}#0").load()  # whether the two belong together
    encoder, sae, config = load_encoder(asked.encoder), load_dictionary(asked.sae), read_config(asked.sae)
    layer, tokens = config["layer"], config["tokens"]
    images, labels, names = read_images(str(asked.data), encoder.input_size[0], True)
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

    strength = torch.cat(best)  # (N, M)
    often = (strength > 0).double().mean(0)
    top = strength.topk(TOP, dim=0).indices  # (TOP, M)
    of_class = torch.nn.functional.one_hot(labels[top], len(names)).double().mean(0)
    purest, which = of_class.masked_fill((often * len(images) < TOP)[:, None], 0).max(1)
    print(f"latents whose {TOP} top images are of one class: " + ", ".join(
        f"{int((purest >= bound - 1e-9).sum())} in {100 * bound:.0f} %" for bound in PURE))  # fmt: skip
    usual = often.argsort(descending=True)
    usual = usual[often[usual] * len(images) >= TOP]
    even = usual[torch.linspace(0, len(usual) - 1, SHOW + 2).long()[1:-1]]
    chosen = [*even.tolist(), *purest.argsort(descending=True, stable=True)[:SHOW].tolist()]
    print(
        "| latent | on in tokens, % | on in images, % | most frequent class of its top images |\n|---|---|---|---|"
    )
    for j in chosen:
        cells = f"{100 * share[j]:.2f} | {100 * often[j]:.1f} | {names[which[j]]}, {int(TOP * purest[j] + 0.5)} of {TOP}"
        print(f"| {j} | {cells} |")
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        rows = torch.cat([images[top[:, j]] for j in chosen])
        save_image(make_grid(rows / 2 + 0.5, TOP, pad_value=1), asked.out / "latents.png")


if __name__ == "__main__":
    main()
