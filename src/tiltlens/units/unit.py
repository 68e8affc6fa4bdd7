"""Units: what a(x) is. An activation of an encoder, a projection of a vector, or a combination of such."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tiltlens.units.address import Address
from tiltlens.units.classes import class_index
from tiltlens.units.encoder import Encoder
from tiltlens.units.grammar import number, short_hash, slug
from tiltlens.units.kinds import KINDS, Pick, parse_numbers
from tiltlens.units.readout import positions, reduce
from tiltlens.units.sources import find_encoder, load_encoder


class Unit:
    """A scalar a(x) of an input x.

    name: canonical; the same name is the same unit. members: the simple units that it is made of, itself if
    it is one. Construction is cheap: it checks all that can be checked without weights, and `load` does the
    rest.
    """

    name: str
    encoder: Encoder | None = None  # whose layer `read` is given, known after `load`; None: the input itself

    @property
    def slug(self) -> str:
        """A short, unique, file-system safe name."""
        return slug(self.name)

    @property
    def members(self) -> list["Unit"]:
        return [self]

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what defines the unit, weights included. Loads the encoder."""
        raise NotImplementedError

    def load(self) -> "Unit":
        """Weights into memory, names to indices. Raises what is wrong with the address, seen from the
        encoder."""
        return self

    @property
    def linear(self) -> bool:
        """Whether `combine` is a sum: the mean of the unit is then that of its members' means."""
        return True

    def combine(self, z: Tensor) -> Tensor:
        """Standardised activations of the members z (B, size) -> (B,)."""
        return z[:, 0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


class EncoderUnit(Unit):
    """A unit of an encoder, by its address.

    name: the address as it was given. address: with the layer, tokens and reduction that its kind fills in.
    """

    def __init__(self, address: Address):
        self.name = str(address)
        self._pick: Pick | None = None
        find_encoder(address.encoder, address.weights)
        kind = KINDS[address.kind]
        self._files = kind.files(address.value)
        place = {name: getattr(address, name) for name in ("layer", "tokens", "reduction")}
        self.address = replace(address, **kind.place(address.value, place))

    def load(self, encoder: Encoder | None = None) -> "EncoderUnit":
        """encoder: one that is at hand, in place of the one that the address names."""
        if self._pick is None:
            encoder = encoder or load_encoder(self.address.encoder, self.address.weights)
            encoder.require_layer(self.address.layer)
            self._pick = KINDS[self.address.kind].bind(self.address.value, encoder)
            self.encoder = encoder
        return self

    @property
    def fingerprint(self) -> str:
        read = ""
        for path in self._files:
            with open(path, "rb") as file:
                read += hashlib.file_digest(file, "sha256").hexdigest()
        parts = (self.name, self.load().encoder.identity, read)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, h: Tensor) -> Tensor:
        """The output of the addressed layer -> activations (B,), float32 or better."""
        try:
            h, default = positions(_precise(h), self.address.tokens, self.encoder)
            return reduce(self._pick(h), self.address.reduction or default)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def read_together(units: Sequence[EncoderUnit], outputs: Mapping[str | None, Tensor]) -> Tensor:
    """Activations (B, units) of one encoder's units, from the outputs of its layers: `read`, but what channels of one place have in
    common, positions and reduction, is done once for all. As exact, not to the bit. Raises what `read` raises."""
    order, places, others = _plan(tuple(units))
    found = []
    for (layer, tokens, reduction), channels in places.items():
        try:
            h, default = positions(_precise(outputs[layer]), tokens, units[0].encoder)
            found.append(reduce(h, reduction or default)[:, channels])
        except (ValueError, IndexError):
            for u in units:  # the one that cannot be read says so
                u.read(outputs[u.address.layer])
            raise
    found += [u.read(outputs[u.address.layer])[:, None] for u in others]
    return torch.cat(found, 1)[:, order]


@lru_cache(maxsize=64)
def _plan(units: tuple[EncoderUnit, ...]) -> tuple[list[int], dict[tuple, list[int]], list[EncoderUnit]]:
    """Of `read_together`: the column of each unit among those that are found, the channels of each place, and what is no channel."""
    places: dict[tuple, list[int]] = {}
    at: dict[int, tuple[tuple, int]] = {}
    others = []
    for k, unit in enumerate(units):
        a = unit.address
        if a.kind in ("channel", "class"):
            channels = places.setdefault((a.layer, a.tokens, a.reduction), [])
            at[k] = (a.layer, a.tokens, a.reduction), len(channels)
            channels.append(class_index(unit.encoder, a.value) if a.kind == "class" else a.value)
        else:
            others.append(unit)
    first, begins = 0, {}
    for place, channels in places.items():
        begins[place] = first
        first += len(channels)
    rest = iter(range(first, len(units)))
    return [begins[at[k][0]] + at[k][1] if k in at else next(rest) for k in range(len(units))], places, others


class Projection(Unit):
    """a(x) = <direction, x>, x flattened to (B, d); no encoder. With an analytic prior, the oracle of
    everything.

    direction: d finite numbers.
    """

    def __init__(self, direction: Sequence[float]):
        self.direction = parse_numbers(list(direction))
        numbers = [number(v) for v in self.direction]
        text = ",".join(numbers)
        self.name = f"projection[{text}]"
        if len(numbers) > 8:
            self.name = f"projection[{','.join(numbers[:3])},...x{len(numbers)}#{short_hash(text)}]"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.direction).encode()).hexdigest()

    def read(self, x: Tensor) -> Tensor:
        """Vectors (B, d), or anything of d numbers a row -> (B,)."""
        x = _precise(x.flatten(1))
        if x.shape[1] != len(self.direction):
            raise ValueError(
                f"{self.name}: the direction has {len(self.direction)} entries, x has {x.shape[1]}"
            )
        # Not as a product of matrices: that rounds by the size of the batch.
        return (x * x.new_tensor(self.direction)).sum(1)


def _precise(x: Tensor) -> Tensor:
    """Activations are float32 or better, whatever the network ran in."""
    return x if x.dtype == torch.float64 else x.float()
