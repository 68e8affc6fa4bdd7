"""A latent of a sparse autoencoder as a unit: sae=FOLDER#17, or sae=bundled#17 for the dictionary that ships.

    bundled,sae=bundled#17              pre_17 where it is largest: max over the tokens that it was trained on
    bundled,tokens=cell:2:5,sae=...     at one patch
    bundled,sae=bundled#17:gated        z_17, what the field calls the latent's activation

The unit is the pre-activation pre_j, and the reduction, if none is given, max. Where the latent is on, pre_j is its
activation z_j; where it is off, z_j is 0 and has no gradient, so that guidance could never turn it on, while pre_j
says how far off it is. Under max both are the same number for every image in which the gate is open at the largest
pre_j. (mean of pre_j would be one direction read on the mean token: the sparsity would be gone. mean of z_j, with
":gated,reduction=mean", is not.) No gate looks at another row.

The layer and the tokens come from the dictionary; an address may repeat them, or take fewer of the tokens.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tiltlens.batches import in_equal_batches
from tiltlens.units.sparse_autoencoder import CONFIG, WEIGHTS, dictionary_folder, load_dictionary, read_config

if TYPE_CHECKING:
    from tiltlens.units.encoder import Encoder
    from tiltlens.units.kinds import Pick, Place

LATENT = re.compile(r"(.+)#([0-9]+)(:gated)?", re.DOTALL)
PART_OF = {"patch": ("patch", "map"), "cls": ("cls",), "register": ("register",)}  # all has every token


def parse_latent(text: str) -> str:
    """FOLDER#LATENT, in its canonical form. Raises ValueError."""
    match = LATENT.fullmatch(text.strip())
    if not match:
        raise ValueError(f"sae = {text!r}: expected FOLDER#LATENT, such as sae=bundled#17")
    return f"{match[1]}#{int(match[2])}{match[3] or ''}"


def _parts(value: str) -> tuple[str, int, bool]:
    """(folder, latent, gated)."""
    folder, latent, gated = LATENT.fullmatch(value).groups()
    return folder, int(latent), bool(gated)


def latent_files(value: str) -> list[Path]:
    folder, _, _ = _parts(value)
    read_config(folder)
    return [dictionary_folder(folder) / file for file in (CONFIG, WEIGHTS)]


def place_latent(value: str, place: "Place") -> "Place":
    """Raises ValueError for a latent that the dictionary does not have, and for another layer or other tokens."""
    folder, latent, _ = _parts(value)
    config = read_config(folder)
    if latent >= config["latents"]:
        raise ValueError(
            f"sae={value}: the dictionary has {config['latents']} latents, 0 to {config['latents'] - 1}"
        )
    layer, tokens = config["layer"], config["tokens"]
    if place["layer"] not in (None, layer):
        raise ValueError(
            f"layer={place['layer']}: the dictionary {folder} was trained on {layer or 'the output of the model'}; "
            "leave layer out"
        )
    asked = place["tokens"] or tokens
    whole = tokens or "patch"
    within = asked in PART_OF.get(whole, (asked,)) or (whole == "patch" and str(asked).startswith("cell:"))
    if asked is not None and not within:
        raise ValueError(
            f"tokens={asked}: the dictionary {folder} was trained on tokens={whole}; leave tokens out"
        )
    return {"layer": layer, "tokens": asked, "reduction": place["reduction"] or "max"}


def bind_latent(value: str, encoder: "Encoder") -> "Pick":
    """Raises ValueError for a dictionary of another encoder, or whose weights cannot be read."""
    folder, latent, gated = _parts(value)
    config = read_config(folder)
    if config["encoder_sha256"] != encoder.fingerprint:
        raise ValueError(
            f"sae={value}: the dictionary was trained on the encoder {config['encoder']} with weights of sha256 "
            f"{config['encoder_sha256'][:12]}…, {encoder.name} has {encoder.fingerprint[:12]}…: address that encoder, or "
            "train a dictionary on this one (configs/train/sae-cifar10.yaml)"
        )
    sae = load_dictionary(folder)

    def pick(h: Tensor) -> Tensor:
        if h.shape[-1] != sae.channels:
            raise ValueError(f"the dictionary reads {sae.channels} channels, the layer has {h.shape[-1]}")
        sae.to(h)
        pre = sae.preactivation(h, latent)
        if not gated:
            return pre
        if sae.kind == "topk":  # asks where this latent stands among all
            opened = in_equal_batches(lambda part: sae.open(sae.preactivations(part)), h.detach())
            return pre * opened[..., latent]
        return pre * (pre > sae.threshold.expand(sae.latents)[latent])

    return pick
