"""A diffusers folder as bytes: found by name, checked and fingerprinted before anything heavy is read.

    folder/model_index.json                      the components: {"unet": ["diffusers", "UNet2DModel"], ...}
    folder/scheduler/scheduler_config.json       the noise schedule and what the network predicts
    folder/unet/config.json, *.safetensors       one sub-folder a model

A safetensors file is 8 bytes with the length n of a JSON header, the header, and the numbers; the header says
where every tensor ends, so that a truncated file is known from its first bytes. Pickled weights (.bin,
.ckpt) run code when they are read and are refused, as are folders that bring Python code of their own.
"""

import difflib
import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tiltlens.errors import UserError
from tiltlens.priors.pipeline import fetch

BUNDLED = "bundled"
SKIPPED = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "image_processor",
)  # no part of the law of x
WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
STEMS = ("diffusion_pytorch_model", "model")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CHUNK = 1 << 20


@dataclass(frozen=True)
class PriorFolder:
    """path: the folder. components: names of those that are loaded; skipped: of those that are not.

    weights: the weight files of the loaded ones, sorted.
    """

    path: Path
    components: list[str]
    skipped: list[str]
    weights: list[Path]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the bytes of the weight files, one after the other in the order of their paths.

        With one weight file it is what `sha256sum` prints for it.
        """
        digest = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


def find_folder(name: str) -> Path:
    """ "bundled", a folder, or a hub name (owner/name; fetched into the cache of the hub) -> a folder.

    Raises UserError where there is no such folder or the hub does not answer; near names are listed.
    """
    if name == BUNDLED:
        return Path(str(resources.files("tiltlens"))) / "bundled" / "prior"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    # "a/b" may be a hub name; where a folder "a" lies here, it was meant as a path.
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not folder.parent.is_dir():
        return fetch(name)
    raise UserError(
        f"unknown prior {name!r}: expected {BUNDLED!r}, a diffusers folder, or a hub name owner/name; "
        f"found no such folder.{_near(folder, name)}"
    )


def _near(folder: Path, name: str) -> str:
    here = folder.parent if folder.parent.is_dir() else Path()
    names = {BUNDLED: BUNDLED} | {p.name: str(p) for p in here.iterdir() if p.is_dir()}
    near = difflib.get_close_matches(folder.name or name, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(names[n]) for n in near)}?" if near else ""


def check_folder(path: Path) -> PriorFolder:
    """The folder with its weight files, all of them whole. Raises UserError: what was expected and found."""
    index = _read_json(
        path, "model_index.json", "a diffusers pipeline folder has one; `save_pretrained` writes it"
    )
    if not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"prior {path}: its pipeline class is code of its own; no code may execute from a prior folder"
        )
    listed = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None}
    components = {k: v for k, v in listed.items() if k not in SKIPPED}
    if "scheduler" not in components:
        raise UserError(
            f"prior {path}: model_index.json names no scheduler (found {', '.join(components) or 'none'}); "
            "it says how the network was trained: save the pipeline with the scheduler of its training"
        )
    _read_json(path, "scheduler/scheduler_config.json", "it says how the network was trained")
    weights: list[Path] = []
    for name, (library, _) in components.items():
        if (path / name / f"{library}.py").exists():
            raise UserError(
                f"prior {path}: {name} is code of its own, and no code may execute from a prior folder"
            )
        if not name.startswith(WITHOUT_WEIGHTS):
            _read_json(path, f"{name}/config.json", f"model_index.json names the component {name}")
            weights += _weight_files(path / name)
    for file in weights:
        check_safetensors(file)
    return PriorFolder(path, list(components), [k for k in listed if k in SKIPPED], sorted(weights))


def _read_json(path: Path, name: str, why: str) -> dict:
    file = path / name
    if not file.is_file():
        raise UserError(f"prior {path}: expected {name} ({why}), found none")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"prior {path}: {name} is no JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"prior {path}: expected an object in {name}, found {type(content).__name__}")
    return content


def _weight_files(component: Path) -> list[Path]:
    for stem in STEMS:
        whole, index = component / f"{stem}.safetensors", component / f"{stem}.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            told = _read_json(component, index.name, "the index of its shards")
            shards = told.get("weight_map")
            if not (isinstance(shards, dict) and shards and all(isinstance(v, str) for v in shards.values())):
                raise UserError(
                    f"prior {component.parent}: expected in {component.name}/{index.name} a weight_map, names of tensors to "
                    f"names of files, found {str(shards)[:100]!r}; fetch it again"
                )
            if not isinstance(told.get("metadata"), dict):  # diffusers takes it for granted
                raise UserError(
                    f"prior {component.parent}: expected in {component.name}/{index.name} an object metadata, {{}} will do, "
                    f"found {str(told.get('metadata'))[:100]!r}; fetch it again"
                )
            return [component / shard for shard in sorted(set(shards.values()))]
    found = sorted(p.name for p in component.iterdir() if p.suffix != ".json")
    wanted = (
        f"prior {component.parent}: expected {component.name}/{STEMS[0]}.safetensors (or model.safetensors)"
    )
    if any(name.endswith(PICKLED) for name in found):
        raise UserError(
            f"{wanted}, found only {', '.join(found)}: no code may execute from a weight file, and that of a "
            "pickle does: convert to safetensors (load it where you trust it, then save_pretrained)"
        )
    raise UserError(f"{wanted}, found {', '.join(found) or 'no weights'}; fetch or export the weights again")


def check_safetensors(file: Path) -> None:
    """Raises UserError unless the file is as long as its header promises; the numbers are not read."""
    if not file.is_file():
        raise UserError(f"prior weights {file}: its index names this file, found none; fetch it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        header = stream.read(length) if length <= size - 8 else b""
    try:
        ends = list(_ends(json.loads(header)))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"prior weights {file}: no whole safetensors header in {size} bytes: truncated, or a Git LFS "
            "pointer, or another format; fetch it again"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise UserError(
            f"prior weights {file}: truncated or damaged: its header promises {expected} bytes, found {size}"
            "; fetch it again"
        )


def _ends(header: dict) -> Iterator[int]:
    for name, tensor in header.items():
        if name != "__metadata__":
            yield int(tensor["data_offsets"][1])
