"""Files of numbers: network weights and direction vectors. No file read here can run code.

safetensors holds tensors only, .npy is read without pickle, and everything else goes through
torch.load(weights_only=True), which refuses a pickle that wants to call something.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a file (.safetensors, .pt, .pth, .bin); checkpoints that wrap one are unwrapped.

    Raises FileNotFoundError, and ValueError for a file that is damaged, would run code, or holds no tensors.
    """
    state = _read(path, lambda: timm.models.load_state_dict(path, weights_only=True))
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no weights: expected a state dict, names to tensors")
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}


def read_vector(path: str) -> Tensor:
    """A direction (C,) float32 from .npy, .safetensors (one tensor) or .pt (a tensor, or a dict with one)."""
    readers = {
        ".npy": lambda: torch.from_numpy(np.load(path, allow_pickle=False)),
        ".safetensors": lambda: load_file(path),
    }
    found = _read(path, readers.get(Path(path).suffix, lambda: torch.load(path, "cpu", weights_only=True)))
    if isinstance(found, dict):
        if len(found) != 1:
            raise ValueError(
                f"{path} holds {len(found)} tensors, a direction is one: {', '.join(map(str, found))}"
            )
        found = next(iter(found.values()))
    if not isinstance(found, Tensor) or found.squeeze().ndim > 1 or found.numel() == 0:
        raise ValueError(
            f"{path}: expected one vector of shape (C,), found {getattr(found, 'shape', type(found))}"
        )
    vector = found.reshape(-1).float()
    if not torch.isfinite(vector).all():
        raise ValueError(f"{path}: a direction needs finite numbers, the file holds NaN or infinity")
    return vector


def require_file(path: str, what: str) -> None:
    """Raises FileNotFoundError unless `path` is a file; `what` says what it was meant to be."""
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{what} {path} {kind}: expected a file (from {Path.cwd()})")


def _read(path: str, reader: Callable[[], object]) -> object:
    require_file(path, "the file")
    try:
        return reader()
    except Exception as error:  # the readers raise a dozen types; all mean that this file is of no use
        found = list(_chain(error))
        told = " ".join(str(e) for e in found)
        # of a pickle by another hand torch says no more than that it does not know an operand, as of a plain text
        refused = any(isinstance(e, pickle.UnpicklingError) for e in found) and _is_pickle(path)
        if refused or any(sign in told.lower() for sign in ("unsupported global", "allow_pickle")):
            reason = (
                "it is a pickle that asks to run code, or may, which is never done; save it as safetensors"
            )
        else:  # torch's own advice would have code run: of its words the cause alone
            last = found[-1] if "weights_only" in told else error
            said = f"{type(last).__name__}: {str(last).strip()}".splitlines()[0]
            reason = f"it is damaged or of another format ({said})"
        raise ValueError(f"cannot read {path}: {reason}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_pickle(path: str) -> bool:
    """By its first byte, PROTO, or as torch.save packs one since 2020, in a zip."""
    with Path(path).open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
