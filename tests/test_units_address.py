"""The address grammar: what is written parses back, names are unique, errors offer near names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlens.units import Address, Combination, Projection, build_unit

NAMES = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(
        ["a/b:c.d", "x, y", 'say "a"', "a and not b", "a versus b", "0.7*a", "a + b", " a", "[1]", "\\"]
    ),
)
UNITS = st.one_of(
    st.integers(0, 10**6),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
    NAMES.map("class={}".format),
    NAMES.filter(lambda s: not s.startswith("[")).map("direction={}".format),
    st.tuples(
        NAMES.filter(str.strip).map(str.strip), st.integers(0, 10**6), st.sampled_from(["", ":gated"])
    ).map(lambda parts: "sae={}#{}{}".format(*parts)),
)


@st.composite
def addresses(draw):
    unit = draw(UNITS)
    tokens = draw(st.sampled_from([None, "cls", "register", "patch", "all", "map", "cell:0:3", "2,5"]))
    reduction = draw(st.sampled_from(["mean", "max", "logsumexp"]))
    layer = None if str(unit).startswith("class=") else draw(st.none() | NAMES)
    return Address(draw(NAMES), draw(st.none() | NAMES), layer, tokens, reduction, unit)


@settings(max_examples=300, deadline=None)
@given(addresses())
def test_an_address_is_what_it_is_written_as(address):
    assert Address.parse(str(address)) == address
    assert Address.parse(str(address)).slug == address.slug
    mapping = {f: getattr(address, f) for f in ("encoder", "weights", "layer", "tokens", "reduction", "unit")}
    assert Address.from_mapping(mapping) == address


@settings(max_examples=200, deadline=None)
@given(st.lists(addresses(), min_size=2, max_size=12, unique_by=str))
def test_slugs_are_unique_and_safe_for_a_file_system(many):
    slugs = [a.slug for a in many]
    assert len({s.casefold() for s in slugs}) == len(many)
    assert all(
        set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and len(s) <= 80 and s[0] != "."
        for s in slugs
    )


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("class=horse", Address(unit="horse")),
        ("bundled,unit=37", Address(unit=37)),
        ("bundled, channel = 37", Address(unit="37")),
        ("bundled,unit=channel=37", Address(unit="channel=37")),
        ("e,layer=b.1,direction=[1, -0.5]", Address("e", layer="b.1", unit=[1, -0.5])),
        ("e,layer=b.1,tokens=cell:2:5,channel=0", Address("e", layer="b.1", tokens="2,5", unit=0)),
        ("sae=bundled#17", Address(unit="sae=bundled#17")),
        ("bundled, sae=runs/a=b#1/sae#007:gated", Address(unit="sae=runs/a=b#1/sae#7:gated")),
        ("bundled,class=great white shark", Address(unit="class=great white shark")),
        ('bundled,class="goldfish, Carassius auratus"', Address(unit="class=goldfish, Carassius auratus")),
    ],
)
def test_forms_of_one_address(left, right):
    assert Address.parse(left) == right


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("bundled,chanel=3", "channel"),
        ("bundled,latent=3", "unknown key 'latent'"),
        ("bundled,layer=b,tokens=patches,channel=3", "patch"),
        ("bundled,layer=b,reduction=men,channel=3", "mean"),
        ("bundled,layer=b", "names one unit"),
        ("bundled,channel=3,class=horse", "names one unit"),
        ("bundled,channel=-3", "0 or above"),
        ("bundled,sae=bundled", "expected FOLDER#LATENT"),
        ("bundled,sae=bundled#-1", "expected FOLDER#LATENT"),
        ("bundled,sae=bundled#1:gate", "expected FOLDER#LATENT"),
        ("bundled,sea=bundled#1", "sae"),
        ("bundled,channel=1,channel=2", "twice"),
        ("bundled,layer=b,tokens=map,channel=3", "reduction=mean"),
        ("bundled,layer=b,class=horse", "leave it out"),
        ("bundled,horse", "key=value"),
        ('bundled,class="horse', "double quotes"),
        ("bundled,direction=[1,nan]", "list of numbers|finite"),
        ("", "expected ENCODER"),
    ],
)
def test_a_wrong_address_says_what_is_near(text, near):
    with pytest.raises(ValueError, match=near):
        Address.parse(text)


A, B = "projection[1,0]", "projection[0,1]"


@pytest.mark.parametrize(
    "text", [f"0.7*{A} + 0.3*{B}", f"{A} - {B}", f"{A} and not {B}", f"{A} versus {B}", A]
)
def test_a_combination_is_what_it_is_written_as(text):
    unit = build_unit(text)
    assert build_unit(unit.name).name == unit.name
    assert [m.name for m in unit.members] == ([A, B] if unit.size == 2 else [A])
    if isinstance(unit, Combination):
        weights = unit.weights if unit.rule == "sum" else None
        assert build_unit({"units": [A, B], "weights": weights, "rule": unit.rule}).name == unit.name


def test_the_rules_on_standardised_activations():
    z = torch.randn(64, 2, dtype=torch.float64)
    both = torch.minimum(z[:, 0], -z[:, 1])
    torch.testing.assert_close(build_unit(f"0.7*{A} - 2*{B}").combine(z), 0.7 * z[:, 0] - 2 * z[:, 1])
    torch.testing.assert_close(build_unit(f"{A} versus {B}").combine(z), z[:, 0] - z[:, 1])
    soft = build_unit(f"{A} and not {B}").combine(z)
    assert ((soft >= both) & (soft <= both + torch.log(torch.tensor(2.0)))).all()
    torch.testing.assert_close(
        build_unit(f"{A} and not {B}").combine(torch.tensor([[3.0, -3.0]])), torch.tensor([3.0])
    )


@pytest.mark.parametrize(
    "spec",
    [
        f"2*{A}",
        f"{A} versus {B} and not {A}",
        {"units": [A, B], "rule": "summ"},
        {"units": [A, B, B], "rule": "versus"},
        3,
    ],
)
def test_a_wrong_combination_is_refused(spec):
    with pytest.raises(ValueError, match=r"takes|mixes|near names|an address"):
        build_unit(spec)


def test_a_projection_is_a_dot_product_with_a_short_name():
    assert Projection([1, -0.5]).name == "projection[1,-0.5]"
    long, other = Projection(range(64)), Projection([*range(63), 99])
    assert len(long.name) < 60
    assert len({long.name, other.name}) == len({long.fingerprint, other.fingerprint}) == 2
    torch.testing.assert_close(Projection([1, -2]).read(torch.tensor([[3.0, 1.0]])), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="2 entries"):
        Projection([1, -2]).read(torch.zeros(1, 3))
