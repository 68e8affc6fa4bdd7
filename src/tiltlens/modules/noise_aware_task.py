"""What a noise-aware twin is taught: every layer of its encoder, or a few of its units.

A task says what the encoder tells of x_0 (targets), and how far the twin's reading of x0_hat is from it (errors), in columns that
are each in units of the encoder's own variance. `weights` (columns,) are their shares of the loss, `told` the columns that
units read: those of val_error.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiltlens.modules.own_samples import read_samples
from tiltlens.units.encoder import Encoder
from tiltlens.units.reader import UnitReader
from tiltlens.units.readout import positions
from tiltlens.units.unit import read_together

Decode = Callable[[Tensor], Tensor]


class LayerTask:
    """All units at once. Two columns a layer: each position (all tokens, or the map), and their means (patches; the cls
    token beside them), which most units read. layers: module paths, None for the encoder's own output."""

    def __init__(self, encoder: Encoder, twin: Encoder, layers: Sequence[str | None], decode: Decode):
        self.encoder, self.twin, self.layers, self.decode = encoder, twin, list(layers), decode
        self.told = slice(1, None, 2)
        # the output as much as all other layers, means three times as much as positions
        output = torch.tensor([float(layer is None) for layer in self.layers])
        groups = [g / g.sum() for g in (output, 1 - output) if g.sum()]
        share = sum(groups) / len(groups)
        self.weights = (share[:, None] * torch.tensor([0.25, 0.75])).flatten()
        self._scales: list[Tensor] = []

    @property
    def output(self) -> int | None:
        """The column of the encoder's own output, as its mean; None where it is not among the layers."""
        return 2 * self.layers.index(None) + 1 if None in self.layers else None

    def know(
        self, own_states: Tensor | None, trainer: Any, names: Sequence[str], device: torch.device
    ) -> None:
        """Nothing of own samples is kept: their layers are too large."""

    @torch.no_grad()
    def targets(self, x_0: Tensor, own: Tensor, mirrored: Tensor) -> list[Tensor]:
        """(B, P, C) each."""
        return self._readouts(self.encoder, self.decode(x_0))

    def measure(self, seen: Sequence[list[Tensor]]) -> None:
        """Standard deviation (P, C) of each column, over batches of targets."""
        self._scales = [_floored(torch.cat(c).std(0)) for c in zip(*seen)]

    def errors(self, x0_hat: Tensor, log_snr: Tensor, targets: list[Tensor]) -> Tensor:
        """(B, columns)."""
        found = self._readouts(self.twin, self.decode(x0_hat))
        rows = [((f - t) / s).square().mean((1, 2)) for f, t, s in zip(found, targets, self._scales)]
        return torch.stack(rows, 1)

    def _readouts(self, encoder: Encoder, images: Tensor) -> list[Tensor]:
        outputs, found = encoder.outputs(images, self.layers), []
        for layer in self.layers:
            h = outputs[layer].float()
            everywhere = positions(h, "all", encoder)[0]
            patches = positions(h, None, encoder)[0]
            mean = patches.mean(1, keepdim=True)
            if everywhere.shape[1] - patches.shape[1] > encoder.num_registers:  # the first is the cls token
                mean = torch.cat([everywhere[:, :1], mean], 1)
            found += [everywhere, mean]
        return found


class UnitTask:
    """Units, a column each. The first `named` (None: all) are alike, and as much as all others together, place by place, which are there for
    what they teach the network that they share. What the encoder says of own samples is read once, and kept in the run's folder."""

    def __init__(self, encoder: Encoder, reader: UnitReader, decode: Decode, named: int | None = None):
        self.encoder, self.reader, self.members, self.decode = encoder, reader, reader.members, decode
        count = len(self.members)
        named = named or count
        self.told, self.output = slice(0, named), None
        addresses = [m.address for m in self.members[named:]]
        places = [(a.layer, a.tokens, a.reduction, a.kind) for a in addresses]
        of = Counter(places)
        rest = [0.5 / len(of) / of[p] for p in places]
        self.weights = torch.tensor([(0.5 if rest else 1.0) / named] * named + rest)
        self._known: Tensor | None = None

    def know(
        self, own_states: Tensor | None, trainer: Any, names: Sequence[str], device: torch.device
    ) -> None:
        """Read the own samples (N, *shape); names: what their reading depends on, besides the units."""
        if own_states is None:
            return
        name = "\n".join([*names, *(m.fingerprint for m in self.members)])
        with trainer.precision_plugin.forward_context():  # as targets are read in training
            self._known = read_samples(trainer, own_states, name, lambda x: self._raw(self.decode(x)), device)

    @torch.no_grad()
    def targets(self, x_0: Tensor, own: Tensor, mirrored: Tensor) -> Tensor:
        """Raw activations (B, units): of own samples the known ones."""
        out, new = x_0.new_zeros(len(x_0), len(self.members)), own < 0
        if (~new).any():
            out[~new] = self._known[own[~new], mirrored[~new].long()].to(out)
        if new.any():
            out[new] = self._raw(self.decode(x_0[new])).to(out)
        return out

    def measure(self, seen: Sequence[Tensor]) -> None:
        """Mean and standard deviation of each unit, which the reader keeps."""
        raw = torch.cat(list(seen))
        self.reader.mean.copy_(raw.mean(0))
        self.reader.std.copy_(torch.stack([_floored(c) for c in raw.std(0)]))

    def errors(self, x0_hat: Tensor, log_snr: Tensor, targets: Tensor) -> Tensor:
        """(B, units)."""
        z = self.reader(self.decode(x0_hat), log_snr).float()
        return (z - (targets - self.reader.mean) / self.reader.std).square()

    def _raw(self, images: Tensor) -> Tensor:
        """(B, units), by the encoder."""
        outputs = self.encoder.outputs(images, list(dict.fromkeys(m.address.layer for m in self.members)))
        return read_together(self.members, outputs)


def _floored(std: Tensor) -> Tensor:
    """Standard deviations of one column, none of them zero."""
    return std + 1e-3 * std.mean() + 1e-12
