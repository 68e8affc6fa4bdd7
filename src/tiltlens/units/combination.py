"""Combinations of units, on the standardised scale of each member.

z_i = (a_i - mean_i)/std_i under the prior is the activation of member i; without it a logit and a channel
could not be weighed against each other. The rules:

    sum         0.7*A + 0.3*B       sum_i w_i z_i
    versus      A versus B          z_A - z_B
    and-not     A and not B         -log((exp(-z_A) + exp(z_B))/2)

and-not is a soft minimum of z_A and -z_B, both of which must be high: it lies between min(z_A, -z_B) and that
plus log 2, and equals both where they are equal.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiltlens.units.address import Address
from tiltlens.units.grammar import number, split
from tiltlens.units.near import near
from tiltlens.units.unit import EncoderUnit, Projection, Unit

RULES = ("sum", "versus", "and-not")
WORDS = {"versus": r"\sversus\s", "and-not": r"\sand\s+not\s", "sum": r"\s[+-]\s"}
WEIGHTED = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*\*\s*(.*)", re.DOTALL)
NUMBERS = r"\s*[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?\s*"
PROJECTION = re.compile(rf"projection\[({NUMBERS}(?:,{NUMBERS})*)\]")


class Combination(Unit):
    """units: simple units. rule: sum, versus or and-not; see the module. weights: one a unit, with rule sum
    only."""

    def __init__(self, units: Sequence[object], weights: Sequence[float] | None = None, rule: str = "sum"):
        self.units = [build_unit(u) for u in units]
        self.rule = rule
        self.weights = [1.0] * len(self.units) if weights is None else [float(w) for w in weights]
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r} of a combination; {near(str(rule), RULES)}")
        if any(u.members != [u] for u in self.units):
            raise ValueError(
                "a combination is made of simple units; found a combination within a combination"
            )
        if rule != "sum" and (len(self.units) != 2 or weights is not None):
            found = f"{len(self.units)} units and weights {weights}"
            raise ValueError(f"the rule {rule} takes two units and no weights; found {found}")
        if len(self.units) < 2 or len(self.weights) != len(self.units):
            found = f"{len(self.units)} units and {len(self.weights)} weights"
            raise ValueError(f"a sum takes two units or more, and a weight a unit; found {found}")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"the weights of a sum are finite numbers; found {self.weights}")
        names = [u.name for u in self.units]
        terms = [f"{number(w)}*{n}" for w, n in zip(self.weights, names)]
        self.name = " + ".join(terms) if rule == "sum" else f" {rule.replace('-', ' ')} ".join(names)

    @property
    def members(self) -> list[Unit]:
        return self.units

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(
            "\n".join([self.name, *(u.fingerprint for u in self.units)]).encode()
        ).hexdigest()

    def load(self) -> "Combination":
        for unit in self.units:
            unit.load()
        return self

    @property
    def linear(self) -> bool:
        return self.rule != "and-not"

    def combine(self, z: Tensor) -> Tensor:
        if self.rule == "sum":
            return (z[:, : self.size] * z.new_tensor(self.weights)).sum(
                1
            )  # a product of matrices rounds by batch size
        if self.rule == "versus":
            return z[:, 0] - z[:, 1]
        return math.log(2) - torch.logaddexp(-z[:, 0], z[:, 1])


def build_unit(spec: object) -> Unit:
    """A string, a mapping, an `Address` or a unit -> a unit. No weights are loaded.

    Strings: an address, projection[1,0,-0.5], or a combination. Mappings: the keys of `Address`, or units,
    weights and rule. Raises ValueError (near names included) and FileNotFoundError.
    """
    if isinstance(spec, Unit):
        return spec
    if isinstance(spec, Address):
        return EncoderUnit(spec)
    if isinstance(spec, Mapping):
        if "units" not in spec and "rule" not in spec:
            return EncoderUnit(Address.from_mapping(spec))
        unknown = [k for k in spec if k not in ("units", "weights", "rule")]
        if unknown:
            offer = near(str(unknown[0]), ("units", "weights", "rule"))
            raise ValueError(f"unknown key {unknown[0]!r} in a combination; {offer}")
        return Combination(spec.get("units") or [], spec.get("weights"), spec.get("rule") or "sum")
    if not isinstance(spec, str):
        raise ValueError(f"a unit is an address, a mapping or a unit; found {type(spec).__name__} {spec!r}")
    return _parse(spec.strip())


def _parse(text: str) -> Unit:
    used = {rule: split(text, words) for rule, words in WORDS.items()}
    found = [rule for rule, (parts, _) in used.items() if len(parts) > 1]
    if len(found) > 1:
        raise ValueError(
            f"{text!r} mixes {' and '.join(found)}: a combination has one rule. A name that holds such a "
            'word is put in double quotes, class="a and not b"'
        )
    rule = found[0] if found else "sum"
    parts, operators = used[rule]
    weighted = [WEIGHTED.fullmatch(p) for p in parts]
    if rule != "sum":
        return Combination(parts, rule=rule)
    if len(parts) == 1 and not weighted[0]:
        projection = PROJECTION.fullmatch(text)
        if projection:
            return Projection([float(v) for v in projection[1].split(",")])
        return EncoderUnit(Address.parse(text))
    signs = [1.0, *(-1.0 if o == "-" else 1.0 for o in operators)]
    weights = [s * (float(m[1]) if m else 1.0) for s, m in zip(signs, weighted)]
    return Combination([m[2] if m else p for m, p in zip(weighted, parts)], weights)
