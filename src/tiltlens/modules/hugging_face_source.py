"""Image data sets of the Hugging Face hub, by the optional package `datasets` (pip install datasets).

Its tables lie on disk as Arrow and are read by row, so that a large set needs no memory and shuffles whole.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tiltlens.errors import UserError
from tiltlens.modules.image_sources import split_arguments

SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves in a folder
HELD_OUT = ("test", "validation", "val")


class HuggingFaceSource:
    """NAME?split=...&image=COLUMN&label=COLUMN&config=...&download=true; NAME a hub name or a folder.

    By default the split is train, for held-out images the first of test, validation, val; the columns are the
    first of type Image and the first of type ClassLabel. A hub name is looked for in the local cache alone
    unless download=true. Raises UserError with the name of the package where it is not installed.
    """

    def __init__(self, text: str, held_out: bool):
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"hf:{text} needs the package datasets: pip install datasets") from error
        name, given = split_arguments(text)
        if wrong := set(given) - {"split", "image", "label", "config", "download"}:
            raise UserError(
                f"hf:{text}: unknown {', '.join(sorted(wrong))}; expected split, image, label, config, download"
            )
        wanted = [str(given["split"])] if "split" in given else list(HELD_OUT) if held_out else ["train"]
        self.table = _load(datasets, name, wanted, given)
        features = self.table.features
        images = [k for k, f in features.items() if isinstance(f, datasets.Image)]
        labels = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
        self.image = given.get("image") or (images or [None])[0]
        label = given.get("label") or (labels or [None])[0]
        for what, column in (("image", self.image), ("label", label)):
            if column not in features and (column is not None or what == "image"):
                raise UserError(
                    f"hf:{name} has no {what} column{f' {column!r}' if column else ''}: it has "
                    f"{', '.join(f'{k} ({type(f).__name__})' for k, f in features.items())}; give ?{what}=COLUMN"
                )
        self.name_, self.fingerprint = name, f"hf {name} {self.table._fingerprint} {self.image} {label}"
        # undecoded: datasets turns images by itself, and one odd EXIF would end the run
        self.feature = features[self.image]
        if isinstance(self.feature, datasets.Image):
            self.table = self.table.cast_column(self.image, datasets.Image(decode=False))
        n = len(self.table)
        if not n:
            raise UserError(f"hf:{name} has no rows: expected a table of images; give another ?split=NAME")
        values = [-1] * n if label is None else self.table[label][:]
        names = getattr(features.get(label), "names", None)
        if names is None and label is not None:
            names = sorted({str(v) for v in values if v is not None}, key=lambda v: (len(v), v))
            number = {name: k for k, name in enumerate(names)}
            values = [None if v is None else number[str(v)] for v in values]
        values = [-1 if v is None else v for v in values]
        self.labels, self.class_names = torch.tensor(values), [str(c) for c in names or []]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"{self.name_}[{i}]"

    def open(self, i: int) -> Image.Image:
        value = self.table[i][self.image]
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            # beside the table, or in an archive that datasets alone knows how to enter
            path = value["path"]
            return Image.open(path) if os.path.lexists(path) else type(self.feature)().decode_example(value)
        return as_image(value)


def as_image(value: Any) -> Image.Image:
    """A Pillow image, its bytes, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8.

    Raises ValueError for another number of channels or kind of number.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        value = value["bytes"]
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[-1] in (3, 4)):
        raise ValueError(f"an array of shape {pixels.shape}: expected height x width with 1, 3 or 4 channels")
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"an array of {pixels.dtype}: expected integers 0..255")
    return Image.fromarray(pixels.astype(np.uint8))


@contextmanager
def _local_alone(config: Any) -> Iterator[None]:
    """local_files_only of a DownloadConfig still asks the hub what a name is, and waits for it."""
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _load(datasets: Any, name: str, splits: list[str], given: dict[str, Any]) -> Any:
    try:
        if Path(name).is_dir() and any((Path(name) / f).is_file() for f in SAVED):
            found = datasets.load_from_disk(name)
        else:
            with nullcontext() if given.get("download", False) else _local_alone(datasets.config):
                found = datasets.load_dataset(name, given.get("config"))
    except IndexError as error:  # how datasets says that there is not one file of rows
        raise UserError(f"hf:{name} has no rows: expected a table of images; save it again") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"hf:{name} cannot be read ({error}): give a folder, or hf:{name}?download=true to fetch it"
        ) from error
    if not isinstance(found, dict):  # a single table that was saved alone
        if "split" in given and str(given["split"]) != str(found.split):
            raise UserError(
                f"hf:{name}?split={given['split']}: expected a folder of several splits, found one table that was saved "
                "alone: take ?split away"
            )
        return found
    for split in splits:
        if split in found:
            return found[split]
    raise UserError(
        f"hf:{name} has the splits {', '.join(found)}; expected {' or '.join(splits)}: give ?split=NAME"
    )
