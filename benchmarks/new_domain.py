"""What a short fine-tuning brings on images that the bundled prior never saw: KID and Frechet distance, before and after.

    python benchmarks/new_domain.py --images FOLDER [--out DIR] [--steps 80] [--quick]

FOLDER: photographs, larger than 32 pixels. 32-pixel crops of them, 8 of each, drawn at random, are the domain; every
eighth photograph is held out, with all its crops. `train.py fit` runs twice, with configs/train/prior-lora.yaml and
prior-finetune.yaml at the rank and rates of TRAININGS, higher than theirs, for a run this short; samples of each
export, and of the bundled prior, are then held against the held-out crops in the features of the bundled encoder. floor: as many training crops in place of samples. gain: the
share of full fine-tuning's gain. +- is one standard error over images; the spread between trainings is not in it.
Crops, trainings and run folders lie in --out: the same call goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from tiltlens.metrics import EncoderFeatures, quality, sample_images
from tiltlens.modules.image_data import read_images, to_unit_range
from tiltlens.priors import load_prior, lora

ROOT = Path(__file__).resolve().parents[1]
SIZE, EACH, HELD_OUT = 32, 8, 8
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TRAININGS = {
    "LoRA": ("prior-lora.yaml", {"model.lora.rank": 8, "model.learning_rate": 1.5e-3}),
    "full": ("prior-finetune.yaml", {"model.learning_rate": 2e-4}),
}
COMMON = {
    "data.batch_size": 32,
    "data.val_n": 128,
    "trainer.enable_progress_bar": "false",
    "trainer.logger": "false",
}
CALLBACKS = [{"class_path": "tiltlens.modules.ema.WarmEMA", "init_args": {"decay": 0.99}}]
READ = 64


def cut(images: Path, out: Path) -> None:
    """Crops as PNG, EACH of a photograph, in out/train and out/held_out."""
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(paths) < 2 * HELD_OUT:
        raise SystemExit(f"{images}: expected at least {2 * HELD_OUT} photographs, found {len(paths)}")
    generator = torch.Generator().manual_seed(0)
    for k, path in enumerate(paths):
        folder = out / ("train" if k % HELD_OUT else "held_out")
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as file:
            image = file.convert("RGB")
        if min(image.size) < SIZE:
            raise SystemExit(f"{path}: expected at least {SIZE} pixels a side, found {image.size}")
        for j in range(EACH):
            x, y = (int(torch.randint(s - SIZE + 1, (), generator=generator)) for s in image.size)
            image.crop((x, y, x + SIZE, y + SIZE)).save(folder / f"{k:05d}-{j}.png")


def train(name: str, crops: Path, out: Path, steps: int) -> None:
    config, settings = TRAININGS[name]
    settings = COMMON | settings | {"data.train": crops, "trainer.max_steps": steps, "out": out}
    settings |= {"trainer.callbacks": json.dumps(CALLBACKS), "trainer.val_check_interval": steps}
    command = [sys.executable, ROOT / "train.py", "fit", "--config", ROOT / "configs/train" / config]
    command += [part for k, v in settings.items() for part in (f"--{k}", str(v))]
    subprocess.run([*command, "--ckpt_path", "last"], check=True, stdout=sys.stderr, cwd=ROOT)


def trained_share(name: str) -> float:
    """Trained weights / weights of the bundled prior."""
    network = load_prior("bundled").denoiser.network
    total = sum(p.numel() for p in network.parameters())
    if name == "LoRA":
        lora.inject(network, rank=TRAININGS[name][1]["model.lora.rank"])
        return sum(p.numel() for p in lora.lora_parameters(network)) / total
    return float(name == "full")


def features(path: Path, of: EncoderFeatures, n: int) -> torch.Tensor:
    """(n, d) of crops, drawn once."""
    images, labels, _ = read_images(str(path), SIZE, True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
    return of.of(to_unit_range(images[order]).split(READ), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    parser.add_argument("--steps", type=int, default=80, help="of either training, of 32 images")
    parser.add_argument("--n", type=int, default=512, help="samples, and crops of either set")
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="does it run; the figures mean nothing")
    asked = parser.parse_args()
    if asked.quick:
        asked.steps, asked.n, asked.sampling_steps = 2, 32, 4
    out = asked.out or Path(tempfile.mkdtemp(prefix="new-domain-"))
    crops = out / "crops"
    if not crops.exists():
        cut(asked.images, out / "crops.part")
        (out / "crops.part").rename(crops)
    of = EncoderFeatures("bundled")
    held_out, trained_on = (features(crops / d, of, asked.n) for d in ("held_out", "train"))
    rows = {}
    for name in ("bundled", *TRAININGS):
        start = time.process_time()
        if name != "bundled" and not (out / name / "prior").is_dir():
            train(name, crops / "train", out / name, asked.steps)
        prior = load_prior(
            "bundled" if name == "bundled" else str(out / name / "prior"), precision="bfloat16"
        )
        images = sample_images(prior.denoiser, prior.decode, range(asked.n), asked.sampling_steps, 1.0, "cpu")
        found = quality(of.of(images.split(READ), "cpu"), held_out, trained_on)
        rows[name] = {k.rpartition("_")[0]: v for k, v in found.items()}
        print(f"{name}: {time.process_time() - start:.0f} s here", file=sys.stderr, flush=True)
    n = min(asked.n, len(held_out), len(trained_on))
    print(f"{asked.steps} steps of 32 images; {n} samples of {asked.sampling_steps} steps\n")
    print(
        f"| prior | trained | KID (n = {n}) | Frechet distance (n = {n}) | gain in KID | in Frechet distance |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        shares = [
            (rows["bundled"][k] - row[k]) / (rows["bundled"][k] - rows["full"][k]) for k in ("kid", "frechet")
        ]
        kid = f"{row['kid']:.4f} ± {row['kid_se']:.4f}"
        print(
            f"| {name} | {trained_share(name):.1%} | {kid} | {row['frechet']:.2f} | {shares[0]:.0%} | {shares[1]:.0%} |"
        )
    row = rows["bundled"]
    floor = f"{row['kid_floor']:.4f} ± {row['kid_floor_se']:.4f}"
    print(f"| training crops (the floor) | | {floor} | {row['frechet_floor']:.2f} | | |")
    (out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
