"""Before a twin is trained: whether what is asked for can be, and a reader that begins with the weights of another."""

from collections.abc import Sequence
from typing import Any

from tiltlens.errors import UserError
from tiltlens.sampling.chain import ORDERS
from tiltlens.units.encoder import Encoder
from tiltlens.units.noise_aware import load_twin, place
from tiltlens.units.reader import UnitReader

COPY = "a copy of their encoder"


def check_asked(
    units: list[str] | None, network: str | None, layers: Sequence[str], log_snr: tuple[float, float], until: float | None,
    own: int, own_share: float, order: int, responses: float, init_from: str | None,
) -> None:  # fmt: skip
    """The arguments of NoiseAwareModule of these names, before anything is loaded. Raises UserError for those that do not go together."""
    if not layers:
        raise UserError("model.layers: expected at least one layer")
    if not (0 <= own_share <= 1 and own >= 0) or (own == 0) != (own_share == 0):
        raise UserError(
            f"model.own = {own}, model.own_share = {own_share}: expected a count and a share of the batch, both 0 or neither"
        )
    if not log_snr[0] < log_snr[1]:
        raise UserError(f"model.log_snr = {log_snr}: expected (lowest, highest)")
    if until is not None and not log_snr[0] < until:
        raise UserError(
            f"model.until = {until}: expected a level above {log_snr[0]}, the lowest of model.log_snr"
        )
    if network is not None and not units:
        raise UserError("model.network reads single units: expected model.units, found none")
    if not units and (responses or init_from):
        raise UserError(
            "model.responses, model.init_from: of readers of single units; expected model.units, found none"
        )
    if order not in ORDERS:
        raise UserError(f"model.order = {order}: expected 1 or 2")
    if not 0 <= responses < float("inf"):
        raise UserError(f"model.responses = {responses}: expected a weight of at least 0")
    if responses and not 0 < own_share < 1:
        raise UserError(
            f"model.responses = {responses}: expected own samples, whose trajectories they are of, and images, found model.own_share = {own_share}"
        )


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
