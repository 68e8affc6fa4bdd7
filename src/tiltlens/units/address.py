"""The address of a unit: one string, or an equal mapping (YAML).

    ENCODER,key=value,key=value
    bundled,class=horse
    vit_small_patch16_dinov3.lvd1689m,layer=blocks.8,tokens=patch,reduction=mean,channel=37
    bundled,sae=bundled#17

encoder     bundled | a timm name | local-dir:FOLDER | hf-hub:NAME | torchvision:NAME | package.module:factory
weights     a local file for the encoder, or random:SEED (an untrained network, for trying out)
layer       dotted module path; left out: the model's output, the logits
tokens      cls | register | patch | all | cell:ROW:COLUMN | map; left out: patch
reduction   mean | max | logsumexp | none, over the positions of `tokens`; left out: mean, if several
channel, class, direction, sae     the unit itself, one of `tiltlens.units.kinds.KINDS`

A sparse autoencoder's latent, sae=FOLDER#LATENT, brings its own layer and tokens, and max as its reduction.

`map` is `patch` without the default reduction: it asks for the map, so it must be said how the map becomes
one number.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tiltlens.units.grammar import number, quote, slug, split, unquote
from tiltlens.units.kinds import KINDS, Value, parse_numbers
from tiltlens.units.near import near

TOKENS = ("cls", "register", "patch", "all", "map", "cell:ROW:COLUMN")
REDUCTIONS = ("mean", "max", "logsumexp", "none")


@dataclass(frozen=True)
class Address:
    """A unit's address; see the module. Comparable, hashable, and `Address.parse(str(a)) == a`.

    unit: 37, "37", "channel=37"; "horse", "class=horse"; "direction=FILE", a list of floats. Held as an int,
    a tuple of floats, or "class=…" / "direction=…" / "sae=…". Raises ValueError (with near names) for anything else.
    """

    encoder: str = "bundled"
    weights: str | None = None
    layer: str | None = None
    tokens: str | None = None
    reduction: str | None = None
    unit: Value | list[float] | None = None

    def __post_init__(self) -> None:
        for name in ("encoder", "weights", "layer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} = {value!r}: expected a name")
        if self.encoder is None:
            raise ValueError("an address needs an encoder, such as bundled")
        object.__setattr__(self, "tokens", _tokens(self.tokens))
        object.__setattr__(self, "unit", _unit(self.unit))
        if self.reduction is not None and self.reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {self.reduction!r}; {near(str(self.reduction), REDUCTIONS)}")
        if self.kind == "class" and self.layer is not None:
            raise ValueError(
                f"class={self.value} reads the model's output, but layer={self.layer} is given: leave it "
                "out, or address a channel or a direction"
            )
        if self.tokens == "map" and self.reduction in (None, "none"):
            raise ValueError(
                "tokens=map gives a value a cell, a unit is one number an image: add reduction=mean, "
                "max or logsumexp, or take one cell with tokens=cell:ROW:COLUMN"
            )
        if self.tokens in ("patch", "register") and self.reduction == "none":
            raise ValueError(
                f"tokens={self.tokens} with reduction=none gives many numbers, a unit is one number an "
                "image: take reduction=mean, max or logsumexp, or tokens=cell:ROW:COLUMN"
            )

    @property
    def kind(self) -> str:
        """channel, class, direction, sae: a key of KINDS."""
        if isinstance(self.unit, str):
            return self.unit.partition("=")[0]
        return "channel" if isinstance(self.unit, int) else "direction"

    @property
    def value(self) -> Value:
        """What stands after "kind="."""
        return self.unit.partition("=")[2] if isinstance(self.unit, str) else self.unit

    @property
    def slug(self) -> str:
        """A short, unique, file-system safe name."""
        return slug(str(self))

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The string form. Raises ValueError."""
        items, _ = split(text, ",")
        mapping: dict[str, str] = {}
        for k, item in enumerate(items):
            match = re.match(r"(\w+)\s*=\s*(.*)", item, re.DOTALL)
            if not match and (k > 0 or not item):
                raise ValueError(
                    f"cannot read {item!r} in the address {text!r}: expected ENCODER,key=value,key=value"
                )
            key, value = match.groups() if match else ("encoder", item)
            if key in mapping:
                raise ValueError(f"the address {text!r} gives {key} twice")
            mapping[key] = unquote(value)
        return cls.from_mapping(mapping)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> "Address":
        """The YAML form: the fields of `Address`; channel, class, direction or sae may stand for
        unit. Raises ValueError."""
        names = [f.name for f in fields(cls)]
        given = {k: v for k, v in mapping.items() if v is not None}
        for key in given:
            if key not in names and key not in KINDS:
                raise ValueError(f"unknown key {key!r} in an address; {near(str(key), [*names, *KINDS])}")
        units = [k for k in given if k in KINDS or k == "unit"]
        if len(units) != 1:
            found = " and ".join(units) or "none"
            raise ValueError(
                f"an address names one unit, by {', '.join(KINDS)} or unit; found {found} in {given}"
            )
        unit = given.pop(units[0])
        if units[0] != "unit" and not isinstance(unit, list | tuple):
            unit = f"{units[0]}={unit}"
        return cls(**given, unit=unit)

    def __str__(self) -> str:
        given = [(k, getattr(self, k)) for k in ("weights", "layer", "tokens", "reduction")]
        items = [quote(self.encoder), *(f"{k}={quote(v)}" for k, v in given if v is not None)]
        if isinstance(self.value, tuple):
            return ",".join([*items, f"direction=[{','.join(map(number, self.value))}]"])
        return ",".join([*items, f"{self.kind}={quote(str(self.value))}"])


def _tokens(tokens: object) -> str | None:
    """ "2,5" and [2, 5] are the grid cell cell:2:5."""
    if tokens is None:
        return None
    text = ",".join(map(str, tokens)) if isinstance(tokens, list | tuple) else str(tokens)
    cell = re.fullmatch(r"(?:cell:)?([0-9]+)\s*[:,]\s*([0-9]+)", text)
    if cell:
        return f"cell:{int(cell[1])}:{int(cell[2])}"
    if text not in TOKENS[:-1]:
        raise ValueError(f"unknown tokens {text!r}; {near(text, TOKENS)}; a grid cell is written cell:2:5")
    return text


def _unit(unit: object) -> Value:
    if unit is None:
        raise ValueError(f"an address names a unit: {', '.join(k + '=…' for k in KINDS)}")
    if isinstance(unit, list | tuple):
        return parse_numbers(unit)
    text = json.dumps(unit) if isinstance(unit, bool | float) else str(unit)
    kind, equals, value = text.partition("=")
    if not equals:
        kind = "channel" if re.fullmatch(r"-?[0-9.]+", text) or not isinstance(unit, str) else "class"
        kind, value = ("direction", text) if text.startswith("[") else (kind, text)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of unit {kind!r} in {text!r}; {near(kind, KINDS)}")
    parsed = KINDS[kind].parse(value)
    return f"{kind}={parsed}" if isinstance(parsed, str) or kind not in ("channel", "direction") else parsed
