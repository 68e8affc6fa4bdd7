"""Network calls of one shape: why a sample is the same to the bit in any company.

A library picks its kernels by shape, and they round differently: about 1e-6 from one batch size to another, which a
strongly guided chain makes a thousand times larger. A network that always sees the same number of rows rounds a row the
same way whatever its neighbours are. Memory, and the cost of a small batch, go by it: see `network_rows`.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

ROWS_ON_CPU = 16
ROWS_ELSEWHERE = 32  # an accelerator wants more to do at once

_rows: ContextVar[int | None] = ContextVar("rows", default=None)

Outputs = Tensor | dict[Hashable, Tensor]


@contextmanager
def network_rows(rows: int | None) -> Iterator[None]:
    """Calls of `in_equal_batches` within take this many rows; None: what they take without."""
    before = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(before)


def in_equal_batches(call: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
    """call(x) for x (B, ...), in batches of one fixed size, the last filled up with copies of its last row.

    call: rows in, rows out, a tensor or a dict of tensors; the same comes back, of B rows. Differentiable.
    """
    size = _rows.get() or (ROWS_ON_CPU if x.device.type == "cpu" else ROWS_ELSEWHERE)
    missing = -len(x) % size
    filled = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
    done = [call(part) for part in filled.split(size)]
    if isinstance(done[0], dict):
        return {key: torch.cat([d[key] for d in done])[: len(x)] for key in done[0]}
    return torch.cat(done)[: len(x)]
