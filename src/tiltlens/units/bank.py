"""Many units, one batch: row i is read by its own unit, and each encoder runs once, on the rows that ask for
it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tiltlens.units.encoder import Encoder
from tiltlens.units.noise_aware import NoiseAware
from tiltlens.units.unit import Unit


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
        """Read clean estimates of its encoder's units by this twin. Raises ValueError where the bank has no such encoder, or
        units of it that the twin was not trained for."""
        sha256 = twin.config.encoder["sha256"]
        if sha256 not in [e.fingerprint for e in self.encoders]:
            raise ValueError(
                f"no unit of {', '.join(u.name for u in self.units)} is of the encoder {twin.config.encoder['name']}"
            )
        mine = [
            m.name
            for ms in self._members
            for m in ms
            if m.encoder is not None and m.encoder.fingerprint == sha256
        ]
        if twin.config.units is not None and (strange := [n for n in mine if n not in twin.config.units]):
            raise ValueError(
                f"the noise-aware twin of {twin.config.encoder['name']} was trained for {', '.join(twin.config.units)} alone, "
                f"found {', '.join(strange)}: train one for it, or leave it out"
            )
        self.twins[sha256] = twin

    def _see(
        self, encoder: Encoder | None, members: list[Unit], x: Tensor, log_snr: float | None
    ) -> dict[Unit, tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """What each member reads, and how: the input itself, or its layer's output; at the levels of a twin what this has
        read. One forward."""
        if encoder is None:
            return {m: (x, m.read) for m in members}
        name = encoder.fingerprint
        if log_snr is not None and name in self.twins and self.twins[name].at(log_snr):
            return {m: (v, _as_it_is) for m, v in self.twins[name].read(members, x, log_snr).items()}
        outputs = encoder.activations(x, list(dict.fromkeys(m.address.layer for m in members)))
        return {m: (outputs[m.address.layer], m.read) for m in members}

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
        for encoder, members in self._by_encoder(places):
            rows = sorted({row for m in members for row, _ in places[m]})
            index = {row: k for k, row in enumerate(rows)}
            for m, (h, read) in self._see(encoder, members, _take(images, rows), log_snr).items():
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
        for encoder, members in self._by_encoder(everyone):
            values |= {m: read(h) for m, (h, read) in self._see(encoder, members, images, log_snr).items()}
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
    def validate(self, size: int | Sequence[int]) -> None:
        """One dry run of every unit on an empty input: an image of this side, or one input of this shape.

        Raises ValueError for what only a forward shows: tokens, cells, channels out of range, layers never
        called.
        """
        shape = (3, size, size) if isinstance(size, int) else tuple(size)
        if len(self.encoders) and len(shape) != 3:
            names = ", ".join(e.name for e in self.encoders)
            raise ValueError(
                f"{names} reads images, the prior gives inputs of shape {shape}: take a projection"
            )
        device = next(self.parameters(), torch.zeros(())).device
        everyone = dict.fromkeys(m for members in self._members for m in members)
        for encoder, members in self._by_encoder(everyone):
            x = torch.zeros(1, *shape, device=device)
            for h, read in self._see(encoder, members, x, None).values():
                read(h)

    def _by_encoder(self, members: Iterable[Unit]) -> list[tuple[Encoder | None, list[Unit]]]:
        groups = [
            (encoder, [m for m in members if m.encoder is encoder]) for encoder in [None, *self.encoders]
        ]
        return [(encoder, mine) for encoder, mine in groups if mine]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _take(x: Tensor, rows: list[int]) -> Tensor:
    return x if rows == list(range(len(x))) else x[torch.tensor(rows, device=x.device)]


def _widest(values: Iterable[Tensor]) -> torch.dtype:
    return torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
