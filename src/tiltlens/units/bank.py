"""Many units, one batch: row i is read by its own unit, and each encoder runs once, on the rows that ask for
it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tiltlens.batches import network_rows
from tiltlens.units.encoder import Encoder
from tiltlens.units.noise_aware import NoiseAware
from tiltlens.units.sources import sketch_encoder
from tiltlens.units.unit import EncoderUnit, Unit


class UnitBank(nn.Module):
    """a_u(x) for batches in which every row has its own unit u.

    units: loaded here. size: K, the largest number of members. encoders: the distinct ones, submodules, so
    that the bank's device is theirs. Encoders are shared within a process (`load_encoder`): moving one bank
    moves them all.
    """

    def __init__(self, units: Sequence[Unit]):
        super().__init__()
        if not units:
            raise ValueError("a bank needs at least one unit")
        self.units = [unit.load() for unit in units]
        self.size = max(unit.size for unit in self.units)
        one = {
            m.name: m for unit in self.units for m in unit.members
        }  # a member of several units is read once
        self._members = [[one[m.name] for m in unit.members] for unit in self.units]
        self.encoders = nn.ModuleList({m.encoder: None for m in one.values() if m.encoder is not None})
        self.twins = nn.ModuleDict()  # by the encoder's sha256

    def adopt(self, twin: NoiseAware) -> None:
        """Read clean estimates of its encoder's units by this twin; of units that it was not trained for by the encoder."""
        self.twins[twin.config.encoder["sha256"]] = twin

    def _groups(
        self, members: Iterable[Unit], log_snr: float | None
    ) -> list[tuple[Encoder | NoiseAware | None, list[Unit]]]:
        """Who reads which members: each encoder, or its twin at the levels and of the units that it was trained for."""
        groups: dict[Encoder | NoiseAware | None, list[Unit]] = {}
        for encoder in [None, *self.encoders]:
            for m in (m for m in members if m.encoder is encoder):
                groups.setdefault(self._reader(m, log_snr), []).append(m)
        return list(groups.items())

    def _reader(self, member: Unit, log_snr: float | None) -> Encoder | NoiseAware | None:
        encoder = member.encoder
        if encoder is None or log_snr is None or encoder.fingerprint not in self.twins:
            return encoder
        twin = self.twins[encoder.fingerprint]
        return twin if twin.at(log_snr) and twin.reads(member) else encoder

    @property
    def has_readers(self) -> bool:
        """Whether a reader of units, not a twin of a whole encoder, reads any of its clean estimates."""
        return any(twin.config.units is not None for twin in self.twins.values())

    def expected(self, log_snr: Sequence[float]) -> list[list[bool]]:
        """Of each unit, at each of these levels: whether what is read of a clean estimate is E[a | x_t] as a twin learned it for this very unit.
        So it is where readers of units read all members and the unit is a sum of them; a twin of a whole encoder tells of layers."""
        return [
            [u.linear and all(self._told(m, x) for m in members) for x in log_snr]
            for u, members in zip(self.units, self._members)
        ]

    def _told(self, member: Unit, log_snr: float) -> bool:
        reader = self._reader(member, log_snr)
        return isinstance(reader, NoiseAware) and reader.config.units is not None

    def __len__(self) -> int:
        return len(self.units)

    def read(self, images: Tensor, which: Tensor, log_snr: float | None = None) -> Tensor:
        """Activations of the members of units[which[i]] on row i.

        images: (B, 3, H, W) in [-1, 1], or vectors (B, d) for projections. which: (B,) integers. log_snr: of
        clean estimates, which a twin may read; None for samples. Returns (B, K) float32 or better, raw (not
        standardised), zero where a unit has fewer members. Differentiable; row i depends on image i alone.
        """
        places: dict[Unit, list[tuple[int, int]]] = {}  # member -> the (row, column)s it fills
        for row, u in enumerate(which.tolist()):
            for column, member in enumerate(self._members[u]):
                places.setdefault(member, []).append((row, column))
        filled, values = [], []
        for reader, members in self._groups(places, log_snr):
            rows = sorted({row for m in members for row, _ in places[m]})
            index = {row: k for k, row in enumerate(rows)}
            for m, (h, read) in _see(reader, members, _take(images, rows), log_snr).items():
                filled += places[m]
                values.append(read(_take(h, [index[row] for row, _ in places[m]])))
        out = torch.zeros(len(images), self.size, dtype=_widest(values), device=images.device)
        if not values:
            return out
        rows, columns = torch.tensor(filled, device=images.device).T
        return out.index_put((rows, columns), torch.cat([v.to(out) for v in values]))

    def read_all(self, images: Tensor, log_snr: float | None = None) -> Tensor:
        """Every unit on every image, (B, units, K), one pass of each encoder. As `read` otherwise."""
        everyone = dict.fromkeys(m for members in self._members for m in members)
        values: dict[Unit, Tensor] = {}
        for reader, members in self._groups(everyone, log_snr):
            values |= {m: read(h) for m, (h, read) in _see(reader, members, images, log_snr).items()}
        rows = [torch.stack([values[m] for m in ms], 1) for ms in self._members]
        return torch.stack([torch.nn.functional.pad(r, (0, self.size - r.shape[1])) for r in rows], 1)

    def combine(self, z: Tensor, which: Tensor) -> Tensor:
        """Standardised activations (B, K) -> (B,), row i by the rule of units[which[i]]."""
        out = z.new_zeros(len(z))
        for u in sorted(set(which.tolist())):
            rows = (which == u).nonzero().squeeze(1).to(z.device)
            out = out.index_put((rows,), self.units[u].combine(z[rows]))
        return out

    @torch.no_grad()
    def validate_encoders(self) -> None:
        """One dry run of every unit that has an encoder, on an empty image of the encoder's own input size.

        Raises ValueError for what only a forward shows: tokens, cells, channels out of range, layers never called, an input
        size that the model itself does not take.
        """
        everyone = dict.fromkeys(m for members in self._members for m in members)
        for reader, members in self._groups(everyone, None):
            if reader is not None:
                device = next(reader.parameters(), torch.zeros(())).device
                x = torch.zeros(1, 3, *reader.input_size, device=device)
                try:
                    seen = _see(reader, members, x, None)
                except ValueError:
                    raise
                except Exception as error:  # a forward may raise anything
                    if device.type == "meta":
                        continue  # it asks for numbers, which a sketch has not
                    height, width = reader.input_size
                    raise ValueError(
                        f"the encoder {reader.name} does not take its own input size, {height} x {width} pixels: "
                        f"expected a forward of one tensor (B, 3, {height}, {width}), found "
                        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. A factory's module says another as its attribute input_size"
                    ) from error
                for h, read in seen.values():
                    read(h)

    @torch.no_grad()
    def validate(self, size: int | Sequence[int], gradient: bool = False) -> None:
        """The same on what a prior gives: an image of this side, or one input of this shape. Raises as `validate_encoders`,
        and for inputs that a unit cannot read; with `gradient` for units that are not differentiable, too.
        """
        shape = (3, size, size) if isinstance(size, int) else tuple(size)
        if len(self.encoders) and len(shape) != 3:
            names = ", ".join(e.name for e in self.encoders)
            raise ValueError(
                f"{names} reads images, the prior gives inputs of shape {shape}: take a projection"
            )
        device = next(self.parameters(), torch.zeros(())).device
        everyone = dict.fromkeys(m for members in self._members for m in members)
        for reader, members in self._groups(everyone, None):
            x = torch.zeros(1, *shape, device=device)
            for h, read in _see(reader, members, x, None).values():
                read(h)
            if gradient:
                _check_gradient(reader, members, x)


def check_addresses(units: Iterable[Unit]) -> None:
    """`UnitBank.validate_encoders` before any weights are fetched or read, by the architecture alone, where that can
    be had. Raises ValueError, with near names."""
    for m in dict.fromkeys(m for unit in units for m in unit.members):
        if not isinstance(m, EncoderUnit) or m.encoder is not None or m.address.kind == "sae":
            continue
        sketch = sketch_encoder(m.address.encoder, m.address.weights)
        if sketch is not None:
            UnitBank([EncoderUnit(m.address).load(sketch)]).validate_encoders()


def _see(
    reader: Encoder | NoiseAware | None, members: list[Unit], x: Tensor, log_snr: float | None
) -> dict[Unit, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """What each member is read from, and how: the input itself, its layer's output, or what a twin has read. One forward."""
    if reader is None:
        return {m: (x, m.read) for m in members}
    if isinstance(reader, NoiseAware):
        return {m: (value, _as_it_is) for m, value in reader.read(members, x, log_snr).items()}
    outputs = reader.activations(x, list(dict.fromkeys(m.address.layer for m in members)))
    return {m: (outputs[m.address.layer], m.read) for m in members}


def _check_gradient(reader: Encoder | NoiseAware | None, members: list[Unit], x: Tensor) -> None:
    """Raises ValueError where a member's activation on x (1, *shape), which it can read, has no gradient."""
    advice = "remove no_grad, detach or rounding from the encoder's forward, or sample with NoiseSpace, which needs none"
    with torch.inference_mode(False), torch.enable_grad(), network_rows(1):  # a graph of one image is small
        x = x.clone().requires_grad_()
        try:
            values = {m: read(h) for m, (h, read) in _see(reader, members, x, None).items()}
            for m, value in values.items():
                if not value.requires_grad:
                    raise ValueError(
                        f"the unit {m.name} is not differentiable: guidance needs the gradient of its activation, found none; {advice}"
                    )
            torch.autograd.grad(sum(value.sum() for value in values.values()), x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # numpy, tensors of inference mode, operations without a derivative
            raise ValueError(
                f"the unit {' or '.join(m.name for m in members)} is not differentiable: guidance needs the gradient of its "
                f"activation, found {type(error).__name__}: {' '.join(str(error).split())[:200]}; {advice}"
            ) from error


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _take(x: Tensor, rows: list[int]) -> Tensor:
    return x if rows == list(range(len(x))) else x[torch.tensor(rows, device=x.device)]


def _widest(values: Iterable[Tensor]) -> torch.dtype:
    return torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
