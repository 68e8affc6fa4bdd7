"""Where images come from: one name for each kind of source.

    DIR                                   a folder, nested at will: DIR/CLASS/**/*.jpg (png, webp, bmp)
    CIFAR10, FakeData, ...                a data set of torchvision.datasets, where no folder has that name
    torchvision:CIFAR10?root=DIR          the same, with arguments of its class; nothing is fetched unless
                                          download=true is among them
    tar:DIR/part-{000..010}.tar           WebDataset shards on disk: KEY.jpg with KEY.cls
    hf:NAME?split=train                   a Hugging Face data set, from the local cache unless download=true

Every source is a table with random access: `len`, `labels`, `class_names`, `name(i)` and `open(i)`. That is
why one batch is a function of its number alone, however large the set: nothing is read in order.
"""

import hashlib
import inspect
import os
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import to_pil_image

from tiltlens.errors import UserError
from tiltlens.modules.image_shards import ShardSource
from tiltlens.sampling.natural_images import SUFFIXES, files_below

FAKE_HELD_OUT = 1 << 31  # the seed of FakeData's first held-out image: beyond any of training
FAKE_SIZE = 512  # images of FakeData where its size is not given: enough for a smoke run


class ImageSource(Protocol):
    """labels: (N,) int64, -1 where there is none. class_names: of the labels 0, 1, ..., where known.

    fingerprint: changes with what the source holds.
    """

    labels: Tensor
    class_names: list[str]
    fingerprint: str

    def __len__(self) -> int: ...
    def name(self, i: int) -> str: ...
    def open(self, i: int) -> Image.Image: ...


def open_source(text: str, held_out: bool, size: int, cache: Path) -> ImageSource:
    """The source that `text` names (see the module). held_out: its test part, where it has one.

    size: pixels of a side, for sources that make images up. cache: where torchvision's sets lie by default.
    Raises UserError for an unknown kind, name or argument, and for a source that is not there.
    """
    kind, _, rest = text.partition(":")
    if kind == "tar" and rest:
        return ShardSource(rest, cache)
    if kind == "hf" and rest:
        from tiltlens.modules.hugging_face_source import HuggingFaceSource  # it reads names by this module

        return HuggingFaceSource(rest, held_out)
    named = kind == "torchvision" and rest
    if named or (not Path(text).is_dir() and text.partition("?")[0] in torchvision_names()):
        return TorchvisionSource(rest if named else text, held_out, size, cache / "torchvision")
    return FolderSource(Path(text))


class FolderSource:
    """Every image below root, in linked folders too, sorted by path; the first folder below the root is the class."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(
                f"no image folder at {root}: expected FOLDER/CLASS/*.jpg or FOLDER/*.png, a name of "
                "torchvision.datasets such as CIFAR10, tar:SHARDS or hf:NAME; set data.train and data.val"
            )
        self.root = root
        files = list(files_below(root))
        self.files = sorted(p for p in files if p.suffix.lower() in SUFFIXES)
        if not self.files:
            found = sorted({p.suffix.lower() or "no suffix" for p in files})
            raise UserError(
                f"no images below {root}: expected files ending in {', '.join(SUFFIXES)}; found "
                f"{', '.join(found[:8]) or 'no file at all'}"
            )
        parts = [p.relative_to(root).parts for p in self.files]
        self.class_names = sorted({p[0] for p in parts if len(p) > 1})
        number = {name: k for k, name in enumerate(self.class_names)}
        self.labels = torch.tensor([number[p[0]] if len(p) > 1 else -1 for p in parts])
        digest = hashlib.sha256(str(root.resolve()).encode())
        for path in self.files:
            try:
                stat = path.stat()
                said = f"{path} {stat.st_size} {stat.st_mtime_ns}\n"
            except OSError:  # a link to nowhere or to itself: `open` fails too, and it counts as broken
                said = f"{path} gone\n"
            digest.update(os.fsencode(said))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files[i].relative_to(self.root).as_posix()

    def open(self, i: int) -> Image.Image:
        return Image.open(self.files[i])


class FakeImages(datasets.FakeData):
    """torchvision's FakeData, number for number, but from generators of its own: the original seeds torch's
    global one for every image, which is slow and mixes up threads that decode at once."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        generator = torch.Generator().manual_seed(index + self.random_offset)
        image = torch.randn(*self.image_size, generator=generator)
        target = torch.randint(0, self.num_classes, size=(1,), generator=generator)
        return to_pil_image(image), int(target)


class TorchvisionSource:
    """A class of torchvision.datasets, NAME?argument=value&..., whose items are (image, class)."""

    def __init__(self, text: str, held_out: bool, size: int, root: Path):
        name, given = split_arguments(text)
        if name not in torchvision_names():
            raise UserError(
                f"torchvision.datasets has no {name!r}: known are {', '.join(torchvision_names())}"
            )
        maker = FakeImages if name == "FakeData" else getattr(datasets, name)
        known = inspect.signature(maker).parameters
        if wrong := set(given) - set(known):
            raise UserError(
                f"torchvision's {name} has no {', '.join(sorted(wrong))}: it has {', '.join(known)}"
            )
        if "root" in known:
            given.setdefault("root", str(root))
        if name == "FakeData":
            given = {"size": FAKE_SIZE, "image_size": (3, size, size), **given}
            # image i is drawn from the seed i + random_offset: held-out images must be others
            given.setdefault("random_offset", FAKE_HELD_OUT if held_out else 0)
        part = part_arguments(known, given, held_out)
        # torchvision's loader turns a file to RGB itself: alpha on black, 16 bits clipped. `decode` knows better.
        as_it_is = "loader" in known and known["loader"].default is default_loader and "loader" not in given
        try:
            self.data = maker(**given, **part, **({"loader": Image.open} if as_it_is else {}))
        except ImportError as error:
            raise UserError(
                f"torchvision's {name} needs a package that is not here ({error}): pip install it"
            ) from error
        except (RuntimeError, FileNotFoundError) as error:
            way = f"{name}?root=DIR where it lies, or {name}?download=true to fetch it"
            raise UserError(
                f"torchvision's {name} is not below {given.get('root')} ({error}): {way}"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(f"torchvision's {name} refuses {given | part}: {error}") from error
        try:
            count = len(self.data)
            if name == "FakeData" and count:
                self.data[0]  # its sizes are looked at by nobody before
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"torchvision's {name} refuses {given | part}: {error}") from error
        if not count:
            raise UserError(
                f"torchvision's {name} holds no images with {given | part}: expected at least one"
            )
        told = given | part | ({"root": str(Path(given["root"]).resolve())} if "root" in given else {})
        if as_it_is:
            told["loader"] = "as it is"
        self.text, self.paths = name, paths_of(self.data)
        self.root = given.get("root", "")
        self.fingerprint = f"torchvision {name} {told} {len(self.data)} {digest_of(self.paths)}"
        named = (getattr(self.data, k, None) for k in ("targets", "_labels", "labels", "y"))
        labels = next((x for x in named if x is not None), None)
        if labels is None:  # only its items tell: each is read once
            labels = [_class(self.data[i][1]) for i in range(len(self.data))]
        self.labels = torch.as_tensor(labels).long()
        known_names = getattr(self.data, "classes", None)
        count = int(self.labels.max()) + 1
        if name == "FakeData":
            count = self.data.num_classes
        self.class_names = [str(c) for c in known_names or range(count)]

    def __len__(self) -> int:
        return len(self.data)

    def name(self, i: int) -> str:
        return os.path.relpath(self.paths[i], self.root) if self.paths else f"{self.text}[{i}]"

    def open(self, i: int) -> Image.Image:
        return self.data[i][0]


def paths_of(data: Any) -> list[Path]:
    """The image files, in order, of a set that reads its items from files; empty for others."""
    lists = (
        getattr(data, name, None) for name in ("samples", "_samples", "_image_files", "_images", "images")
    )
    found = next((x for x in lists if isinstance(x, list | tuple) and len(x)), ())
    paths = [
        Path(x[0] if isinstance(x, list | tuple) else x)
        for x in found
        if isinstance(x, str | Path | list | tuple)
    ]
    return paths if len(paths) == len(data) and all(p.is_file() for p in paths) else []


def digest_of(paths: list[Path]) -> str:
    """A digest of path, size and time of each file; empty where there are none."""
    if not paths:
        return ""
    said = repr([(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in paths])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _class(target: Any) -> int:
    whole = isinstance(target, int) or (torch.is_tensor(target) and target.ndim == 0)
    return int(target) if whole else -1


def part_arguments(known: Any, given: dict[str, Any], held_out: bool) -> dict[str, Any]:
    """train= or split= of a torchvision class for its training or held-out part, where it has one."""
    if "train" in known and "train" not in given:
        return {"train": not held_out}
    if "split" in known and "split" not in given and known["split"].default in ("train", "trainval"):
        return {"split": "test" if held_out else "train"}
    return {}


def torchvision_names() -> list[str]:
    return [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]


def split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """ "NAME?a=1&b=true" -> ("NAME", {"a": 1, "b": True})."""
    name, _, query = text.partition("?")
    words = {"true": True, "false": False}
    pairs = parse_qsl(query, keep_blank_values=True)
    return name, {k: words.get(v.lower(), int(v) if v.lstrip("-").isdigit() else v) for k, v in pairs}
