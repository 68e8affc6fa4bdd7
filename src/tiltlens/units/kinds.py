"""The kinds of unit: which number of a layer's channels is the activation.

A layer, read at P positions, gives h (B, P, C). A kind turns it into one value a position, (B, P):

    channel=37          h[..., 37]
    class=horse         h[..., row of the class], on the model's output, the logits
    direction=…         <direction, h>, the vector as given (not normalised), from a file or a list
    sae=FOLDER#17       pre_17 of the sparse autoencoder in FOLDER (`latents`)

`KINDS` is the only place that lists them: the grammar, the errors and the readout read this table. A new
kind is one more entry.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlens.units.classes import class_index
from tiltlens.units.latents import bind_latent, latent_files, parse_latent, place_latent
from tiltlens.units.weights import read_vector, require_file

if TYPE_CHECKING:
    from tiltlens.units.encoder import Encoder

Value = int | str | tuple[float, ...]
Pick = Callable[[Tensor], Tensor]
Place = dict[str, str | None]


@dataclass(frozen=True)
class Kind:
    """parse: the text after "kind=" -> value, ValueError if it cannot be one. bind: a value, an encoder -> h
    to (B, P). files: those that the value names, FileNotFoundError if they are not there. place: {layer, tokens,
    reduction} of the address -> as they are read, ValueError where the value does not belong there; no weights."""

    parse: Callable[[str], Value]
    bind: Callable[[Value, "Encoder"], Pick]
    files: Callable[[Value], list[Path]] = lambda value: []
    place: Callable[[Value, Place], Place] = lambda value, place: place


def parse_channel(text: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit():
        raise ValueError(f"channel = {text!r}: expected a whole number, 0 or above")
    return int(text)


def parse_class(text: str) -> str:
    if not text:
        raise ValueError("class names nothing: expected class=NAME, such as class=horse")
    return text


def parse_direction(text: str) -> Value:
    """ "[1, 0, -0.5]" -> the numbers; anything else names a file (.npy, .safetensors, .pt)."""
    if not text:
        raise ValueError("direction names nothing: expected direction=FILE or direction=[1, 0, …]")
    if not text.startswith("["):
        return text
    try:
        return parse_numbers(json.loads(text))
    except json.JSONDecodeError:
        raise ValueError(f"direction = {text}: expected a list of numbers such as [1, 0, -0.5]") from None


def parse_numbers(values: object) -> tuple[float, ...]:
    numbers = isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numbers or not values:
        raise ValueError(f"a direction is a list of one or more finite numbers; found {values!r}")
    return tuple(float(v) for v in values)


def bind_channel(value: Value, encoder: "Encoder") -> Pick:
    def pick(h: Tensor) -> Tensor:
        if value >= h.shape[-1]:
            raise ValueError(
                f"channel = {value}: the layer has {h.shape[-1]} channels, 0 to {h.shape[-1] - 1}"
            )
        return h[..., value]

    return pick


def bind_class(value: Value, encoder: "Encoder") -> Pick:
    return bind_channel(class_index(encoder, value), encoder)


def direction_files(value: Value) -> list[Path]:
    if not isinstance(value, str):
        return []
    require_file(value, "the direction")
    return [Path(value)]


def bind_direction(value: Value, encoder: "Encoder") -> Pick:
    vector = torch.tensor(value) if isinstance(value, tuple) else read_vector(value)

    def pick(h: Tensor) -> Tensor:
        if h.shape[-1] != vector.numel():
            raise ValueError(f"the direction has {vector.numel()} entries, the layer {h.shape[-1]} channels")
        # not as a product of matrices: that rounds by the size of the batch
        return (h * vector.to(h)).sum(-1)

    return pick


KINDS = {
    "channel": Kind(parse_channel, bind_channel),
    "class": Kind(parse_class, bind_class),
    "direction": Kind(parse_direction, bind_direction, direction_files),
    "sae": Kind(parse_latent, bind_latent, latent_files, place_latent),
}
