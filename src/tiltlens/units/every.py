"""Many units in one address: channel=* is every channel of a place, class=* every class of the encoder."""

import re
from collections.abc import Iterable

import torch

from tiltlens.units.address import Address
from tiltlens.units.encoder import Encoder
from tiltlens.units.grammar import quote
from tiltlens.units.readout import positions

_EVERY = re.compile(r"(?<=,)(channel|class)=\*(?=,|$)")


def is_every(address: str) -> bool:
    """Whether it stands for many units."""
    return bool(_EVERY.search(address))


def spread(addresses: Iterable[str], encoder: Encoder) -> list[str]:
    """The addresses, a starred one replaced by those of every unit that it stands for, all units once; of this encoder. Raises ValueError
    for channel=* of a layer that is not there, and for class=* of an encoder without class names."""
    found: dict[str, None] = {}
    for address in addresses:
        found |= dict.fromkeys(_units(address, encoder))
    return list(found)


def _units(address: str, encoder: Encoder) -> list[str]:
    if not (star := _EVERY.search(address)):
        return [address]
    kind = star[1]
    if kind == "class":
        if not encoder.class_names:
            raise ValueError(f"{address}: the encoder {encoder.name} has no class names; address channel=*")
        values = [quote(name) for name in encoder.class_names]
    else:
        place = Address.parse(_EVERY.sub("channel=0", address))
        try:
            with torch.no_grad():
                h = encoder.activations(torch.zeros(1, 3, *encoder.input_size), [place.layer])[place.layer]
            values = range(positions(h, place.tokens, encoder)[0].shape[2])
        except ValueError as error:
            raise ValueError(f"{address}: {error}") from None
    return [_EVERY.sub(lambda _, v=v: f"{kind}={v}", address) for v in values]
