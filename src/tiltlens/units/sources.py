"""Where encoders come from: a name, and perhaps a file of weights, -> `Encoder`.

    bundled                             the small classifier that ships with tiltlens
    vit_small_patch16_dinov3.lvd1689m   any timm name; local-dir:FOLDER and hf-hub:NAME as timm writes them
    torchvision:resnet50, or resnet50   any torchvision classifier (the prefix where timm has the name too)
    package.module:factory              any importable maker of an nn.Module (or package.module.factory)

A factory may make an `Encoder`, with all of its preprocessing; or its module may say input_size, mean, std, interpolation, class_names, num_prefix_tokens and
num_registers of its own, and what it does not say is 224, 0.5, 0.5, bicubic, and nothing. `register_encoder`
makes one that was built in Python addressable. weights = "random:SEED" leaves a network untrained, from that
seed: for trying out an address whose weights are not at hand.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import timm
from torchvision import models as torchvision_models

from tiltlens.units.builders import (
    build_factory,
    build_timm,
    build_torchvision,
    module_and_attribute,
    random_seed,
    require_weights,
)
from tiltlens.units.encoder import Encoder
from tiltlens.units.near import near

_loaded: dict[tuple[str, str | None], Encoder] = {}
_registered: set[str] = set()


def load_encoder(name: str, weights: str | None = None) -> Encoder:
    """The encoder of this name and weights: the same object each time within a process, so that units share
    it.

    Raises ValueError for an unknown name (with near ones), unfit weights or such as could not be fetched, FileNotFoundError
    for a missing file.
    """
    if (name, weights) not in _loaded:
        _loaded[name, weights] = find_encoder(name, weights)()
    return _loaded[name, weights]


def register_encoder(encoder: Encoder) -> None:
    """Makes an encoder that was built in Python addressable by its name. A later one of the same name
    replaces it."""
    _loaded[encoder.name, None] = encoder
    _registered.add(encoder.name)


def is_registered(name: str) -> bool:
    """Whether only this process knows the encoder of that name."""
    return name in _registered


def find_encoder(name: str, weights: str | None = None) -> Callable[[], Encoder]:
    """The call that would load it, after every check that needs neither weights nor network. Raises as it
    would."""
    if (name, weights) in _loaded:
        return lambda: _loaded[name, weights]
    require_weights(weights)
    prefix, _, rest = name.partition(":")
    if name == "bundled" or (prefix == "local-dir" and rest):
        folder = Path(str(files("tiltlens") / "bundled" / "encoder")) if name == "bundled" else Path(rest)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"the encoder {name}: expected a timm folder, with its config.json, at {folder}"
            )
        return lambda: build_timm(name, f"local-dir:{folder}", weights)
    if prefix == "hf-hub" and rest:
        return lambda: build_timm(name, name, weights)
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise ValueError(f"unknown weights {tag!r} of the timm model {base}; {near(tag, tags)}")
        return lambda: build_timm(name, name, weights)
    bare = rest if prefix == "torchvision" else name
    if bare in _torchvision_names():
        return lambda: build_torchvision(name, bare, weights)
    if prefix != "torchvision" and _importable(name):
        return lambda: build_factory(name, weights)
    if Path(name).is_dir():
        raise ValueError(f"unknown encoder {name!r}, which is a folder: write local-dir:{name}")
    known = ["bundled", *timm.list_models(), *timm.list_pretrained(), *_torchvision_names()]
    if bare in torchvision_models.list_models():
        raise ValueError(
            f"the encoder {name}: torchvision's {bare} is no image classifier (segmentation, detection, "
            "video and flow are not known by name): take its backbone, or write package.module:factory, a "
            "function of no arguments that makes an nn.Module for images (B, 3, H, W)"
        )
    module, factory = module_and_attribute(name)
    if ":" in name and module and prefix != "torchvision":
        raise ValueError(
            f"unknown encoder {name!r}: expected a module {module} that can be imported and makes it by {factory}(), found none: "
            f"put the folder of {module.partition('.')[0]} on PYTHONPATH"
        )
    raise ValueError(f"unknown encoder {name!r}; {near(bare, known)}")


def sketch_encoder(name: str, weights: str | None = None) -> Encoder | None:
    """The architecture of an encoder whose weights would have to be fetched or read, on the meta device: shapes
    and names, for every check that needs no numbers. None where it is at hand, where its configuration lies on
    the hub, too, and where it is not built without numbers: some compute their widths with tensors, a factory
    may do anything."""
    if (name, weights) in _loaded or random_seed(weights) is not None or name == "bundled":
        return None
    prefix, _, rest = name.partition(":")
    bare = rest if prefix == "torchvision" else name
    try:
        if timm.is_model(name.partition(".")[0]):
            return build_timm(name, name, None, sketch=True)
        return build_torchvision(name, bare, None, sketch=True) if bare in _torchvision_names() else None
    except Exception:  # whatever it is, it is told where the encoder itself is built, if it is there at all
        return None


@cache
def _torchvision_names() -> tuple[str, ...]:
    return tuple(torchvision_models.list_models(module=torchvision_models))


def _importable(name: str) -> bool:
    """Whether the module before the last ":" or "." can be found; only its parent packages are imported for
    that."""
    module, _ = module_and_attribute(name)
    try:
        return bool(module) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
    except Exception:  # a parent package that is there and broken: told where it is imported
        return True
