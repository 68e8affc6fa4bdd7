"""Natural images from a folder, as a unit would see them from the prior: cropped and resized to the prior's size.

Which files of a folder are images, and what colours they have, is the same for training (`modules.image_sources`,
`modules.image_decoding`).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tiltlens.units.bank import UnitBank

TURNED = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def read_natural_members(
    folder: str, bank: UnitBank, side: int, device: str | torch.device, limit: int = 2000
) -> list[Tensor]:
    """Raw member activations (N, k) of each unit on the images of a folder (any nesting, at most `limit`, evenly spaced
    in the sorted list). Raises ValueError for a folder that is missing or holds fewer than 16 readable images."""
    files = natural_files(folder)
    files = [files[int(i)] for i in np.linspace(0, len(files) - 1, min(limit, len(files)))]
    reads = []
    for i in range(0, len(files), 64):
        images = torch.stack([load_image(f, side) for f in files[i : i + 64]]).to(device)
        with torch.no_grad():
            reads.append(bank.read_all(images).double().cpu())
    members = torch.cat(reads)
    return [members[:, i, : u.size] for i, u in enumerate(bank.units)]


def natural_files(folder: str) -> list[Path]:
    """The image files of a folder, sorted. Raises ValueError for one that is missing or holds fewer than 16."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"natural: expected an image folder, found no folder at {folder!r}")
    files = sorted(p for p in files_below(root) if p.suffix.lower() in SUFFIXES)
    if len(files) < 16:
        raise ValueError(
            f"natural: expected at least 16 images ({', '.join(SUFFIXES)}) in {folder!r}, found {len(files)}"
        )
    return files


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; an EXIF that cannot be read says nothing, for the pixels are whole all the same."""
    try:
        turned = TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever a camera wrote: Pillow raises a dozen types here
        turned = None
    return image if turned is None else image.transpose(turned)


def files_below(root: Path) -> Iterator[Path]:
    """Every file below root, in linked folders too; a link back to a folder that it lies in is not followed.

    Names that begin with a dot are left out: .ipynb_checkpoints is no class, ._1.png (of macOS) no image.
    """
    above = {str(root): {os.path.realpath(root)}}
    for folder, inner, names in os.walk(root, followlinks=True):
        entered = above.pop(folder)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in inner}
        inner[:] = [n for n in inner if real[n] not in entered and not n.startswith(".")]
        above |= {os.path.join(folder, name): entered | {real[name]} for name in inner}
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image of Pillow -> 8-bit RGB, upright, alpha on white. Raises ValueError for pixels of unknown range."""
    image = upright(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would clip at 255 and turn it white
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min():g}..{values.max():g}: expected 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range: expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_image(path: Path, side: int | None = None) -> Tensor:
    """(3, H, W) in [-1, 1], EXIF rotation applied; with a side, the centre square of it, resized by Lanczos."""
    try:
        with Image.open(path) as image:
            rgb = to_rgb(image)
            if side is not None:
                rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.LANCZOS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"natural: {path} cannot be read as an image ({error}); remove it or repair it"
        ) from error
    return torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1).float() / 127.5 - 1
