"""Noise by name: one generator for each sample and stream.

A sample is named by its seed; its noise comes from independent streams (start, step, twist, resampling, and for a walk
in noise space proposal and accept), each a generator of its own seeded by a hash of (domain, seed, stream). So the same
name gives the same noise whatever the batch, its order, the number of ranks or a resume; and as unit and strength are
left out of the name, one seed is one scene over a whole sweep. The pilot and the burn-in live in domains of their own:
their noise is independent of every sample's.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

STREAMS = ("start", "step", "twist", "resampling", "proposal", "accept")
BLOCK = 4096  # numbers drawn at once: small states would otherwise spend their time in calls of the generator


def stream_seed(domain: str, seed: int, stream: str, number: int | None = None) -> int:
    """A 63-bit seed from a name; number: of a step, where the stream has one generator a step. Raises ValueError for an
    unknown stream."""
    if stream not in STREAMS:
        raise ValueError(f"unknown noise stream {stream!r}: expected one of {', '.join(STREAMS)}")
    name = f"tiltlens/{domain}/{seed}/{stream}" + ("" if number is None else f"/{number}")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Noise:
    """Standard normal noise of a batch of named samples.

    seeds (B,). shape: of one state. Drawn on the CPU in float32 and moved, so that a name gives the same noise on every
    device and in every precision of the state. Each stream is read in order: a call is the next draw.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, domain: str = "sample",
    ):  # fmt: skip
        self.shape, self.device, self.dtype = tuple(shape), device, dtype
        self._names = [(domain, int(s)) for s in seeds]
        self._generators: dict[str, list[torch.Generator]] = {}
        self._block = max(BLOCK // max(math.prod(self.shape), 1), 1)
        self._ready: dict[str, Tensor] = {}

    def draw(self, stream: str, count: int | None = None) -> Tensor:
        """The next draw (B, *shape), or the next `count` of them, (B, count, *shape)."""
        drawn = [self._next(stream) for _ in range(1 if count is None else count)]
        return drawn[0] if count is None else torch.stack(drawn, 1)

    def at(self, stream: str, number: int, count: int) -> Tensor:
        """Draws that are named by a step too, (B, count, *shape): the same whether or not the steps before drew, for a row
        may share its batch with one that is guided earlier. A stream is read by `at` alone, or never."""
        seeds = [stream_seed(domain, seed, stream, number) for domain, seed in self._names]
        drawn = [torch.randn((count, *self.shape), generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(drawn).to(self.device, self.dtype)

    def uniform(self, stream: str, rows: Sequence[int]) -> Tensor:
        """The next number uniform in [0, 1) of each of these rows' own streams, (len(rows),) float64; the streams of the
        others stay where they are. A stream is read by `draw` or by `uniform`, never by both."""
        generators = self._stream(stream)
        drawn = [torch.rand(1, dtype=torch.float64, generator=generators[i]) for i in rows]
        return torch.cat(drawn).to(self.device) if drawn else torch.empty(0, dtype=torch.float64)

    def _next(self, stream: str) -> Tensor:
        ready = self._ready.get(stream)
        if ready is None or not len(ready):
            ready = torch.stack(
                [torch.randn((self._block, *self.shape), generator=g) for g in self._stream(stream)], 1
            )
        self._ready[stream] = ready[1:]
        return ready[0].to(self.device, self.dtype)

    def _stream(self, stream: str) -> list[torch.Generator]:
        if stream not in self._generators:
            seeds = [stream_seed(domain, seed, stream) for domain, seed in self._names]
            self._generators[stream] = [torch.Generator().manual_seed(s) for s in seeds]
        return self._generators[stream]
