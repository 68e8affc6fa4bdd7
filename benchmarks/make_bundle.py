"""Half-precision copies of a trained prior, encoder, sparse autoencoder and noise-aware reader: what src/tiltlens/bundled/ holds.

    python benchmarks/make_bundle.py --prior runs/prior-cifar10/prior --encoder runs/encoder-cifar10/encoder

Weights are rounded to float16, all else is copied; readers cast them up to float32 again. The card of each
folder (README.md) is left alone: write there what benchmarks/bundle_quality.py and sae_quality.py print.
"""

import argparse
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from tiltlens.units.noise_aware import PRECISE

BUNDLED = Path(__file__).parents[1] / "src" / "tiltlens" / "bundled"


def halve(source: Path, target: Path, keep: tuple[str, ...] = ()) -> int:
    """Copies a folder over another, its .safetensors rounded to float16 but for the tensors to keep; returns the bytes
    written."""
    size = 0
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                metadata = file.metadata()
            small = [n for n, t in tensors.items() if t.is_floating_point() and n not in keep]
            tensors |= {n: tensors[n].half().contiguous() for n in small}
            save_file(tensors, out, metadata=metadata)
        else:
            shutil.copyfile(path, out)
        out.chmod(0o644)
        size += out.stat().st_size
    return size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", type=Path, help="a diffusers folder, as train.py exports it")
    parser.add_argument("--encoder", type=Path, help="a timm local-dir folder, as train.py exports it")
    parser.add_argument("--sae", type=Path, help="a sparse autoencoder's folder, as train.py exports it")
    parser.add_argument("--noise-aware", type=Path, help="a twin's folder, as train.py exports it")
    parser.add_argument("--to", type=Path, default=BUNDLED)
    asked = parser.parse_args()
    for name in ("prior", "encoder", "sae", "noise-aware"):
        source = getattr(asked, name.replace("-", "_"))
        if source is not None:
            if not source.is_dir():
                parser.error(f"--{name} {source}: no such folder")
            keep = PRECISE if name == "noise-aware" else ()
            print(f"{asked.to / name}: {halve(source, asked.to / name, keep) / 1e6:.1f} MB")
