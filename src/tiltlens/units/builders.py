"""One builder a family of encoders: timm, torchvision, importable factories."""

import contextlib
import importlib
import re
from collections.abc import Iterator

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torchvision import models as torchvision_models

from tiltlens.units.classes import imagenet_names
from tiltlens.units.encoder import NEUTRAL, Encoder
from tiltlens.units.hub import fetching
from tiltlens.units.near import near
from tiltlens.units.weights import read_weights, require_file


def build_timm(name: str, source: str, weights: str | None, sketch: bool = False) -> Encoder:
    """source: what timm.create_model understands. Preprocessing and labels are those of the pretrained
    config. sketch: the architecture alone, on the meta device: shapes and names, no numbers."""
    seed = random_seed(weights)
    # source="timm": of all the places that a config may name, the state dict given here counts
    overlay = None
    if seed is None and weights:
        overlay = {"source": "timm", "state_dict": read_weights(weights), "custom_load": False}
    with _seeded(seed), fetching(name, weights), _device(sketch):
        model = timm.create_model(
            source, pretrained=seed is None and not sketch, pretrained_cfg_overlay=overlay
        )
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    cfg = resolve_model_data_config(model)
    labels, ids = model.pretrained_cfg.get("label_names"), None
    if not labels or len(labels) != model.num_classes:
        labels, ids = imagenet_names(model.num_classes)
    return Encoder(
        model,
        tuple(cfg["input_size"][-2:]),
        cfg["mean"],
        cfg["std"],
        cfg["interpolation"],
        name=name,
        class_names=list(labels) if labels else None,
        class_ids=ids,
    )


def build_torchvision(name: str, model_name: str, weights: str | None, sketch: bool = False) -> Encoder:
    """Preprocessing of torchvision's best weights of this model; its classes are ImageNet's. sketch: as above."""
    best = torchvision_models.get_model_weights(model_name).DEFAULT
    seed = random_seed(weights)
    state = read_weights(weights) if seed is None and weights else None
    with _seeded(seed), fetching(name, weights), _device(sketch):
        model = torchvision_models.get_model(model_name, weights=None if weights or sketch else best)
        if state is not None:
            if hasattr(model, "transform_input"):
                model.transform_input = True  # as torchvision itself does with its own weights
            model.load_state_dict(state)
    views = best.transforms()
    names, ids = imagenet_names(len(best.meta["categories"]))
    interpolation = views.interpolation.value
    return Encoder(
        model,
        views.crop_size[0],
        views.mean,
        views.std,
        interpolation,
        name=name,
        class_names=names,
        class_ids=ids,
    )


def build_factory(name: str, weights: str | None) -> Encoder:
    """package.module:factory; what the module says of its preprocessing and tokens as attributes is taken
    over. A factory that makes an Encoder has said it all. Raises ValueError where it cannot be imported or called."""
    path, attribute = module_and_attribute(name)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise ValueError(
            f"the encoder {name} cannot be imported: expected a module {path}, found {_said(error)}. "
            "Put that right, and import it in Python first"
        ) from error
    if not callable(getattr(module, attribute, None)):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise ValueError(
            f"unknown encoder {name!r}: {path} has no {attribute!r} to call; {near(attribute, public)}"
        )
    make, seed = getattr(module, attribute), random_seed(weights)
    with _seeded(seed):
        try:
            model = make if isinstance(make, nn.Module) else make()
        except Exception as error:
            raise ValueError(
                f"the encoder {name} could not be made: expected a call with no arguments that gives an nn.Module "
                f"for images (B, 3, H, W), found {_said(error)}. Write a function of no arguments that makes it"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the encoder {name} makes a {type(model).__name__}, expected an nn.Module for images "
            "(B, 3, H, W)"
        )
    if seed is None and weights:
        state = read_weights(weights)
        with fetching(name, weights):
            (model.model if isinstance(model, Encoder) else model).load_state_dict(state)
    if isinstance(model, Encoder):
        model.name = name  # what it is asked for by
        return model
    names = ("interpolation", "class_names", "num_prefix_tokens", "num_registers")
    own = {k: getattr(model, k) for k in names if hasattr(model, k)}
    size = getattr(model, "input_size", 224)
    size = size if isinstance(size, int) else tuple(size)[-2:]
    mean, std = (torch.as_tensor(getattr(model, k, NEUTRAL)).flatten().tolist() for k in ("mean", "std"))
    return Encoder(model, size, mean, std, name=name, **own)


def module_and_attribute(name: str) -> tuple[str, str]:
    """package.module:factory or package.module.factory -> (package.module, factory); ("", name) if
    neither."""
    module, colon, attribute = name.partition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    return (module, attribute) if attribute.isidentifier() else ("", name)


def random_seed(weights: str | None) -> int | None:
    """random:7 -> 7; None for anything that is a file."""
    match = re.fullmatch(r"random:([0-9]+)", weights or "")
    return int(match[1]) if match else None


def require_weights(weights: str | None) -> None:
    """Raises FileNotFoundError unless there is nothing to read, a seed, or a file."""
    if weights and random_seed(weights) is None:
        require_file(weights, "the weights")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _device(sketch: bool) -> contextlib.AbstractContextManager:
    return torch.device("meta") if sketch else contextlib.nullcontext()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """A random initialisation, even one that is overwritten, leaves the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        yield
