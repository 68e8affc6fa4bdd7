"""Readout: the output of a layer -> one number an image.

Three steps, in this order:

    positions     the layer's output, by its layout, -> h (B, P, C): the P positions that `tokens` selects
    pick          h -> (B, P), by the kind of the unit (`kinds`): a channel, a class, a direction
    reduce        (B, P) -> (B,): mean, max, logsumexp (over the positions; no 1/P), none (P must be 1)

Layouts: vectors (B, C) have one position. Token sequences (B, N, C) are [cls, registers, patches], patches
row by row; a layer before the prefix tokens are put on has patches only. Feature maps are (B, C, H, W) or (B,
H, W, C).
"""

import torch
from torch import Tensor

from tiltlens.units.encoder import Encoder


def positions(h: Tensor, tokens: str | None, encoder: Encoder) -> tuple[Tensor, str | None]:
    """h, as a layer of `encoder` puts it out -> (B, P, C), and the reduction this calls for.

    Raises ValueError where the layer has no such tokens, and for an output that is none of the three layouts.
    """
    if h.ndim not in (2, 3, 4):
        raise ValueError(
            f"the layer puts out {tuple(h.shape)}: expected (B, C), (B, N, C) or a feature map; "
            "address the block around it"
        )
    if h.ndim == 2:
        if tokens not in (None, "all"):
            raise ValueError(
                f"tokens={tokens}: the layer gives one vector an image, which has none; leave tokens out"
            )
        return h[:, None], "none"
    prefix, grid = 0, None
    if h.ndim == 4:
        h = h if _channels_last(h, encoder) else h.permute(0, 2, 3, 1)
        grid, h = h.shape[1:3], h.flatten(1, 2)
    else:
        prefix, grid = _sequence(h.shape[1], encoder)
    registers = min(encoder.num_registers, prefix)
    if tokens is None or tokens in ("patch", "map"):
        return h[:, prefix:], "mean"
    if tokens == "all":
        return h, "mean"
    if tokens == "cls" and prefix > registers:
        return h[:, :1], "none"
    if tokens == "register" and registers:
        return h[:, prefix - registers : prefix], "mean"
    if tokens in ("cls", "register"):
        raise ValueError(
            f"tokens={tokens}: the layer has none of these; it has {_inventory(prefix, registers, grid)}"
        )
    row, column = (int(k) for k in tokens.split(":")[1:])
    if grid is None or row >= grid[0] or column >= grid[1]:
        raise ValueError(
            f"tokens={tokens}: outside the grid of the layer, which has "
            f"{_inventory(prefix, registers, grid)} (cells count from 0)"
        )
    index = prefix + row * grid[1] + column
    return h[:, index : index + 1], "none"


def reduce(values: Tensor, reduction: str) -> Tensor:
    """(B, P) -> (B,), or (B, P, C) -> (B, C). Raises ValueError for reduction none where P > 1."""
    if reduction == "none":
        if values.shape[1] != 1:
            raise ValueError(
                f"reduction=none leaves {values.shape[1]} numbers, a unit is one number an image: take "
                "mean, max or logsumexp, or a single token (cls, cell:ROW:COLUMN)"
            )
        return values[:, 0]
    if reduction == "mean":
        return values.mean(1)
    return values.amax(1) if reduction == "max" else torch.logsumexp(values, 1)


def _channels_last(h: Tensor, encoder: Encoder) -> bool:
    """Square images have square maps, which tells the layouts apart; where C = H = W, the model's own word
    counts."""
    a, b, c = h.shape[1:]
    if encoder.input_size[0] == encoder.input_size[1]:
        if a == b != c:
            return True
        if b == c != a:
            return False
        if a != b:
            raise ValueError(
                f"the layer puts out {tuple(h.shape)}, which is no feature map of a square image; "
                "address the block around it"
            )
    return encoder.layout == "nhwc"


def _sequence(length: int, encoder: Encoder) -> tuple[int, tuple[int, int] | None]:
    """(prefix tokens, grid) of a sequence: the patches fill the patch grid, or else (later stages) a
    square."""
    for prefix in (encoder.num_prefix_tokens, 0):
        if encoder.grid and length - prefix == encoder.grid[0] * encoder.grid[1]:
            return prefix, encoder.grid
    for prefix in (encoder.num_prefix_tokens, 0):
        side = round(max(length - prefix, 0) ** 0.5)
        if side and side * side == length - prefix:
            return prefix, (side, side)
    return min(encoder.num_prefix_tokens, length), None


def _inventory(prefix: int, registers: int, grid: tuple[int, int] | None) -> str:
    have = ["cls"] * (prefix > registers) + [f"{registers} registers"] * (registers > 0)
    return ", ".join([*have, f"{grid[0]} x {grid[1]} patches" if grid else "patches in no grid"])
