"""Class names of a classifier: the model's own labels, or ImageNet's where the number of outputs says so."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset

from tiltlens.units.near import near

if TYPE_CHECKING:
    from tiltlens.units.encoder import Encoder


def imagenet_names(num_classes: int) -> tuple[list[str] | None, list[str] | None]:
    """(names, synset ids) of an ImageNet head with this many outputs, a name being its lemmas with commas
    between.

    (None, None) if no ImageNet head has this many.
    """
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None, None
    info = ImageNetInfo(subset)
    ids = [info.index_to_label_name(i) for i in range(num_classes)]
    return [info.label_name_to_description(label) for label in ids], ids


def class_index(encoder: "Encoder", name: str) -> int:
    """Row of the logits for a class: its full name, its synset id, or any one of its comma-separated
    synonyms.

    Case and underscores do not matter. Raises ValueError for an unknown name (with near ones), for a synonym
    of several classes (with their ids), and for an encoder that has no classes.
    """
    names, ids = encoder.class_names, encoder.class_ids
    if not names:
        raise ValueError(
            f"class={name}: the encoder {encoder.name} has no class names. Address a layer and a channel, "
            "or channel=INDEX on the model's output"
        )
    wanted = _plain(name)
    exact = [i for i, n in enumerate(names) if wanted == _plain(n) or (ids and wanted == ids[i])]
    hits = exact or [i for i, n in enumerate(names) if wanted in map(_plain, _synonyms(n))]
    if len(hits) == 1:
        return hits[0]
    if hits:
        which = "; ".join(f"{ids[i] if ids else i} ({names[i]})" for i in hits)
        raise ValueError(
            f"class={name} names {len(hits)} classes of {encoder.name}: {which}. Name one by its id "
            "or its full name"
        )
    known = [s for n in names for s in _synonyms(n)]
    raise ValueError(f"unknown class {name!r} of the encoder {encoder.name}; {near(wanted, known)}")


def _synonyms(name: str) -> Sequence[str]:
    return [part.strip() for part in name.split(",")]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
