"""Before a twin is trained: whether what is asked for can be, and a reader that begins with the weights of another."""

from collections.abc import Sequence
from typing import Any

from tiltlens.errors import UserError
from tiltlens.sampling.chain import ORDERS
from tiltlens.units.combination import build_unit
from tiltlens.units.encoder import Encoder
from tiltlens.units.every import is_every, spread
from tiltlens.units.noise_aware import few, load_twin, place
from tiltlens.units.reader import UnitReader
from tiltlens.units.unit import Unit

COPY = "a copy of their encoder"


def members_of(units: Sequence[str], encoder: Encoder) -> tuple[int, list[Unit]]:
    """How many of a reader's units are named one by one, and all of them, those first; each once. Raises ValueError for none that can be."""
    one = [u for u in units if not is_every(u)]
    members = {m.name: m for u in one for m in build_unit(u).load().members}
    named = len(members)
    for u in spread([u for u in units if is_every(u)], encoder):
        for m in build_unit(u).load().members:
            members.setdefault(m.name, m)
    return named, list(members.values())


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
    """Give a reader the weights of the one in a folder, or of the "bundled" one, of the same units or some of them; returns how that was
    trained. network, layers: the reader's, as of NoiseAwareModule.

    Raises UserError where there is none, and for one of another encoder, prior, network or of other units.
    """
    try:
        known = load_twin(folder, [encoder], prior_sha256)
    except (ValueError, OSError) as error:
        raise UserError(f"model.init_from: {error}") from None
    mine, config = [place(m) for m in reader.members], known.config
    strange = [u for u in config.units or ["every layer"] if u not in mine]
    if strange or (config.network, config.layers) != (network, list(layers) if network else None):
        raise UserError(
            f"model.init_from {folder}: expected a reader of {few(mine)}, or of some of them, by {network or COPY}, found one of "
            f"{few(config.units or strange)} by {config.network or COPY}"
        )
    reader.begin_as(known.twin, [mine.index(u) for u in config.units])
    return config.trained
