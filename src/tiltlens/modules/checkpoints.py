"""Checkpoints that survive: written whole or not at all, at the end of a step, and read by the module they fit.

- `WholeCheckpointIO` writes beside the old file and renames: a full disk or a kill leaves the old checkpoint as it was.
- `StepCheckpoint` saves between optimizer steps alone; within accumulated gradients nothing can be gone on with.
- `CheckResumed` holds a checkpoint's keys and shapes against the module before anything is loaded.
- `drop_frozen`, `restore_frozen`: frozen weights are those of a prior on disk, and no part of a checkpoint.
"""

import hashlib
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tiltlens.errors import UserError

STATES = ("state_dict", "current_model_state")  # with an average: the average, the weights to go on from
BASE = "frozen_sha256"


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear under their name only when all their bytes are on the disk.

    Raises UserError where they cannot be written; the file that was there before is as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            part.unlink(missing_ok=True)
            kept = f"; the one of before, {path}, is whole" if path.is_file() else ""
            raise UserError(
                f"a checkpoint could not be written to {path.parent} ({_first_line(error)}): make room{kept}. "
                "--ckpt_path last goes on from there"
            ) from error


def _first_line(error: BaseException) -> str:
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return str(error).strip().split("\n")[0]


class StepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that waits, in accumulated gradients, for the optimizer's step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class CheckResumed(Callback):
    """Holds the checkpoint to resume from against the module before it is loaded; and ends an epoch that was over.

    asked: --ckpt_path. Raises UserError where keys or shapes differ, and names them.
    """

    def __init__(self, asked: str | None):
        self.asked = asked

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = self.asked
        if path == "last":
            path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if path is None or not Path(path).is_file():  # Lightning says what else may be wrong with it
            return
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            raise UserError(f"{path} is no whole checkpoint ({_first_line(error)})") from error
        expected, frozen = pl_module.state_dict(), _frozen(pl_module)
        missing = [n for n in expected if n not in found and n not in frozen]
        unknown = [n for n in found if n not in expected]
        shapes = [
            f"{n} {tuple(found[n].shape)} instead of {tuple(expected[n].shape)}"
            for n in expected
            if n in found and found[n].shape != expected[n].shape
        ]
        if missing or unknown or shapes:
            kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            told = "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds if names)
            raise UserError(
                f"{path} is a checkpoint of another architecture than this {type(pl_module).__name__}. Keys: {told}. "
                "Resume with the config of its run (config.yaml beside its folder), or leave --ckpt_path out"
            )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning resumes a checkpoint of an epoch's end inside that epoch, one batch too long: with accumulated
        # gradients that batch would be a step of its own.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["is_last_batch"] and progress["current"]["completed"] == progress["current"]["ready"]:
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def _frozen(module: LightningModule) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def drop_frozen(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Takes the frozen weights out of a checkpoint that is about to be written; their sha256 stays."""
    frozen = _frozen(module)
    if not frozen:
        return
    for key in STATES:
        if key in checkpoint:
            checkpoint[key] = {n: v for n, v in checkpoint[key].items() if n not in frozen}
    checkpoint[BASE] = _digest(frozen)


def restore_frozen(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Puts the module's own frozen weights into a checkpoint that is about to be loaded.

    Raises UserError where they are not those that the checkpoint was trained on.
    """
    if BASE not in checkpoint:
        return
    frozen = _frozen(module)
    if _digest(frozen) != checkpoint[BASE]:
        raise UserError(
            "this checkpoint holds adapters of another prior than model.init_from, whose weights differ (sha256 "
            f"{_digest(frozen)[:12]}, expected {checkpoint[BASE][:12]}): give the prior that its run began with"
        )
    for key in STATES:
        if key in checkpoint:
            checkpoint[key] = {**checkpoint[key], **frozen}
