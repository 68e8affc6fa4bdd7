"""A reader: the expected activations of a few units at every noise level, by one network that is told the level.

    reader(x0_hat, log-SNR) (B, K)  ~  E[(a_k(x_0) - mean_k)/std_k | x_t]

The network is the units' own encoder, each unit read at its own place, or any other with linear heads: a small one reads
the units of a large one at a fraction of the cost of a guided step. The level comes in twice, as a tile of TILE x TILE
pixels that is added all over the image (the conditioning of a diffusion network, in the one place that every architecture
has), and as a gain and a shift of each unit. Both begin at zero: a reader with its own encoder begins as the encoder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from tiltlens.batches import in_equal_batches
from tiltlens.units.encoder import Encoder
from tiltlens.units.readout import positions
from tiltlens.units.unit import Unit, read_together

TILE = 4
WAVES = 16
HIDDEN = 64


class UnitReader(nn.Module):
    """K units, read by `network` from images (B, 3, H, W) in [-1, 1] and their log-SNR.

    network: a copy that is the reader's own. members: the units, loaded. layers: the network's, None being its output, whose
    cls token and mean patch linear heads read; None where the network is the units' encoder, read as the units say.
    mean, std: (K,), of the raw activations.
    """

    def __init__(self, network: Encoder, members: Sequence[Unit], layers: Sequence[str | None] | None = None):
        super().__init__()
        self.network, self.members, self.layers = network, list(members), layers
        self._reads = list(dict.fromkeys(layers or [m.address.layer for m in self.members]))
        for layer in self._reads:
            network.require_layer(layer)
        units = len(self.members)
        self.register_buffer("waves", torch.linspace(0.1, 2.0, WAVES), persistent=False)
        # Parameters that are never trained: an average of weights carries parameters along, and leaves buffers behind.
        self.mean = nn.Parameter(torch.zeros(units), requires_grad=False)
        self.std = nn.Parameter(torch.ones(units), requires_grad=False)
        last = nn.Linear(HIDDEN, 3 * TILE**2 + 2 * units)
        self.level = nn.Sequential(nn.Linear(2 * WAVES + 1, HIDDEN), nn.SiLU(), last)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.heads: nn.Linear | None = None
        if layers is not None:
            with torch.no_grad():
                size = self._features(torch.zeros(1, 3, *network.input_size)).shape[1]
            self.heads = nn.Linear(size, units)
            nn.init.zeros_(self.heads.weight), nn.init.zeros_(self.heads.bias)

    def trained(self) -> list[nn.Parameter]:
        """All weights but mean and std."""
        return [p for p in self.parameters() if p is not self.mean and p is not self.std]

    def begin_as(self, other: "UnitReader", columns: Sequence[int]) -> None:
        """The weights of a reader by the same network, whose units are these columns; any other unit as that network reads it."""
        columns, units, theirs = list(columns), len(self.members), len(other.members)
        rows = list(range(first := 3 * TILE**2))
        for k, rest in ((first, range(theirs)), (first + units, range(theirs))):
            rows += [k + columns[j] for j in rest]
        self.network.load_state_dict(other.network.state_dict())
        self.level[0].load_state_dict(other.level[0].state_dict())
        with torch.no_grad():
            pairs = [(self.mean, other.mean, columns), (self.std, other.std, columns)]
            pairs += [(p, q, rows) for p, q in zip(self.level[-1].parameters(), other.level[-1].parameters())]
            if self.heads is not None:
                pairs += [(p, q, columns) for p, q in zip(self.heads.parameters(), other.heads.parameters())]
            for mine, known, at in pairs:
                mine[at] = known

    def forward(self, images: Tensor, log_snr: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        """Standardised activations (B, K) float32 or better; log_snr (B,). columns: those of K that are wanted, None for all."""
        wanted = list(range(len(self.members)) if columns is None else columns)
        phase = log_snr[:, None] * self.waves
        level = self.level(torch.cat([phase.sin(), phase.cos(), log_snr[:, None] / 5], 1))
        tile, gain, shift = level.split([3 * TILE**2, len(self.members), len(self.members)], 1)
        height, width = images.shape[-2:]
        tile = tile.unflatten(1, (3, TILE, TILE)).repeat(1, 1, -(-height // TILE), -(-width // TILE))
        seen = images + tile[..., :height, :width].to(images.dtype)
        z = self._own(seen, wanted) if self.heads is None else self.heads(self._features(seen))[:, wanted]
        return z * (1 + gain[:, wanted]) + shift[:, wanted]

    def read(self, images: Tensor, log_snr: float, columns: Sequence[int]) -> Tensor:
        """Raw activations (B, columns) at one noise level, a row the same in any company. Differentiable. No further than to the last
        layer that these columns need."""
        columns = list(columns)

        def part(rows: Tensor) -> Tensor:
            return self(rows, torch.full((len(rows),), log_snr, device=rows.device), columns)

        return in_equal_batches(part, images) * self.std[columns] + self.mean[columns]

    def _own(self, images: Tensor, columns: Sequence[int]) -> Tensor:
        members = [self.members[k] for k in columns]
        outputs = self.network.outputs(images, list(dict.fromkeys(m.address.layer for m in members)))
        return (read_together(members, outputs) - self.mean[columns]) / self.std[columns]

    def _features(self, images: Tensor) -> Tensor:
        outputs, found = self.network.outputs(images, self._reads), []
        for layer in self._reads:
            h = outputs[layer].float()
            everywhere, patches = (positions(h, tokens, self.network)[0] for tokens in ("all", None))
            found.append(patches.mean(1))
            if (
                everywhere.shape[1] - patches.shape[1] > self.network.num_registers
            ):  # the first is the cls token
                found.append(everywhere[:, 0])
        return torch.cat([layer_norm(f, f.shape[1:]) for f in found], 1)
