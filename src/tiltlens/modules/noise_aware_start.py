"""A reader that begins with the weights of another."""

from collections.abc import Sequence
from typing import Any

from tiltlens.errors import UserError
from tiltlens.units.encoder import Encoder
from tiltlens.units.noise_aware import load_twin, place
from tiltlens.units.reader import UnitReader

COPY = "a copy of their encoder"


def begin_with(
    folder: str, reader: UnitReader, encoder: Encoder, prior_sha256: str, network: str | None, layers: Sequence[str | None]
) -> dict[str, Any]:  # fmt: skip
    """Give a reader the weights of the one in a folder, or of the "bundled" one; returns how that was trained. network, layers: the
    reader's, as of NoiseAwareModule.

    Raises UserError where there is none, and for one of another encoder, prior, network or of other units.
    """
    try:
        known = load_twin(folder, [encoder], prior_sha256)
    except (ValueError, OSError) as error:
        raise UserError(f"model.init_from: {error}") from None
    mine, config = [place(m) for m in reader.members], known.config
    if (config.units, config.network, config.layers) != (mine, network, list(layers) if network else None):
        raise UserError(
            f"model.init_from {folder}: expected a reader of {', '.join(mine)} by {network or COPY}, found one of "
            f"{', '.join(config.units or ['every layer'])} by {config.network or COPY}"
        )
    reader.load_state_dict(known.twin.state_dict())
    return config.trained
