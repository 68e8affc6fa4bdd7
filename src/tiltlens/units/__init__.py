"""Image -> activation: encoders, the addresses of their units, and what is read there."""

from tiltlens.units.address import Address
from tiltlens.units.bank import UnitBank
from tiltlens.units.combination import Combination, build_unit
from tiltlens.units.encoder import Encoder
from tiltlens.units.sources import load_encoder, register_encoder
from tiltlens.units.unit import EncoderUnit, Projection, Unit

__all__ = [
    "Address",
    "Combination",
    "Encoder",
    "EncoderUnit",
    "Projection",
    "Unit",
    "UnitBank",
    "build_unit",
    "load_encoder",
    "register_encoder",
]
