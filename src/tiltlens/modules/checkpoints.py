"""Checkpoints that survive: written whole or not at all, at the end of a step, and read by the module they fit.

- `WholeCheckpointIO` writes beside the old file and renames: a full disk or a kill leaves the old checkpoint as it was.
- `StepCheckpoint` saves between optimizer steps alone; within accumulated gradients nothing can be gone on with.
- `CheckResumed` holds a checkpoint's keys and shapes, and what it was trained for, against the module before anything is loaded, and puts
  the data back to where they were.
- `drop_frozen`, `restore_frozen`: frozen weights are those of a prior on disk, and no part of a checkpoint.
"""

import hashlib
import json
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tiltlens.errors import UserError
from tiltlens.modules.batch_stream import BatchStream

STATES = ("state_dict", "current_model_state")  # with an average: the average, the weights to go on from
BASE = "frozen_sha256"
IDENTITY = "identity"
OPTIMIZER = "optimizer"  # a module's, where it may be one of several


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
    """Holds the checkpoint to resume from against the module before it is loaded; ends an epoch that was over; goes on with the very
    next batch, and by the rate and the decay of weights that are asked for now.

    asked: --ckpt_path. Raises UserError where keys or shapes differ, where `module.identity()`, plain values by name that say
    what is trained, is not what the checkpoint's run had, where the optimizer is another, and where an average of the weights would
    be taken for the weights; and names what differs. Checkpoints that know of no identity are held against keys and shapes alone.
    A training begins anew where "last" is not there yet; a validation does not.
    """

    def __init__(self, asked: str | None):
        self.asked = asked
        self.loaded = False
        self.data: list[dict[str, Any]] = []  # where the checkpoint's run was in them
        # by optimizer and group: peak rate, decay of weights
        self.rates: list[list[tuple[float, float]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = self.asked
        if path == "last":
            path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if stage == "validate" and self.asked == "last" and not path.exists():
            raise UserError(
                f"{path.parent} holds no last.ckpt: expected the checkpoint of a training, found none. Give the training's folder as "
                "--out, or a file as --ckpt_path"
            )
        if path is None or not Path(path).is_file():  # Lightning says what else may be wrong with it
            return
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = checkpoint["state_dict"]
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            raise UserError(f"{path} is no whole checkpoint ({_first_line(error)})") from error
        advice = "Resume with the config of its run (config.yaml beside its folder), or leave --ckpt_path out"
        if told := _misfits(pl_module, found):
            raise UserError(
                f"{path} is a checkpoint of another architecture than this {type(pl_module).__name__}. Keys: {told}. {advice}"
            )
        if differing := _differing(checkpoint.get(IDENTITY, {}), identity_of(pl_module)):
            raise UserError(
                f"{path} is a checkpoint of something else than this {type(pl_module).__name__}: {differing}. {advice}"
            )
        if stage == "fit" and (lacking := [k for k in ("loops", "optimizer_states") if k not in checkpoint]):
            raise UserError(
                f"{path} holds weights alone: expected a checkpoint to go on from, found no {' and no '.join(lacking)}. {advice}"
            )
        optimizer = getattr(pl_module, OPTIMIZER, None)
        if stage == "fit" and checkpoint.get(OPTIMIZER, optimizer) != optimizer:
            raise UserError(
                f"{path} holds the state of another optimizer: model.optimizer: expected {checkpoint[OPTIMIZER]}, found {optimizer}. {advice}"
            )
        averages = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)
        if stage == "fit" and STATES[1] in checkpoint and not averages:
            raise UserError(
                f"{path} holds an average of the weights beside them: expected the callback that goes on with it, found none. "
                "Add --trainer.callbacks+=tiltlens.modules.ema.WarmEMA with the decay of its run, or leave --ckpt_path out"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[IDENTITY] = identity_of(pl_module)
        if hasattr(pl_module, OPTIMIZER):
            checkpoint[OPTIMIZER] = pl_module.optimizer

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning resumes a checkpoint of an epoch's end inside that epoch, one batch too long: with accumulated
        # gradients that batch would be a step of its own, and an epoch that counts as one to come would be trained too many.
        if "loops" not in checkpoint:  # weights alone, to be validated
            return
        loop = checkpoint["loops"]["fit_loop"]
        self.loaded, self.data = True, loop["state_dict"].get("combined_loader", [])
        progress, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
        if progress["is_last_batch"] and progress["current"]["completed"] == progress["current"]["ready"]:
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)
            for counts in (epochs["current"], epochs["total"]):
                counts["completed"] = counts["processed"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what is asked for, before the optimizers take up those of the checkpoint
        self.rates = [
            [(_peak(g), g.get("weight_decay", 0.0)) for g in o.param_groups] for o in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.loaded:
            return
        # Lightning forgets the place in the data where the length of the run is in epochs: where the loader was made, to be
        # counted, before the checkpoint was read, and at an epoch's end. A stream reads its position with the first batch.
        for loader, state in zip([trainer.train_dataloader], self.data):
            if isinstance(loader, BatchStream):
                loader.load_state_dict(state)
        for optimizer, rates in zip(trainer.optimizers, self.rates):
            for group, (peak, weight_decay) in zip(optimizer.param_groups, rates):
                if "weight_decay" in group:  # not every optimizer has one
                    group["weight_decay"] = weight_decay
                if _peak(group) != peak:
                    group["lr"] *= peak / _peak(group)
                    group["initial_lr"] = peak
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [_peak(g) for g in config.scheduler.optimizer.param_groups]


def _peak(group: dict[str, Any]) -> float:
    """The rate that a schedule multiplies by its factor."""
    return group.get("initial_lr", group["lr"])


def identity_of(module: LightningModule) -> dict[str, Any]:
    """`module.identity()` as json has it, so that a file gives back what is equal; nothing for modules without one."""
    return json.loads(json.dumps(module.identity())) if hasattr(module, "identity") else {}


def _differing(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Entries that both have: a newer version may know of more."""
    wrong = [k for k in expected if k in found and expected[k] != found[k]]
    return "; ".join(f"{k}: expected {expected[k]}, found {found[k]}" for k in wrong)


def _misfits(module: LightningModule, found: dict[str, torch.Tensor]) -> str:
    """Keys that are missing, unknown or of another shape, in words; '' if none."""
    expected, frozen = module.state_dict(), _frozen(module)
    missing = [n for n in expected if n not in found and n not in frozen]
    unknown = [n for n in found if n not in expected]
    shapes = [
        f"{n} {tuple(found[n].shape)} instead of {tuple(expected[n].shape)}"
        for n in expected
        if n in found and found[n].shape != expected[n].shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds if names)


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def _frozen(module: LightningModule) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _known_digest(module: LightningModule, frozen: dict[str, torch.Tensor]) -> str:
    """The digest, taken anew where a weight was moved or written to since: a large prior is not read at every saving."""
    state = [(n, p.data_ptr(), p._version) for n, p in frozen.items()]
    if getattr(module, "_digested", (None, ""))[0] != state:
        module._digested = state, _digest(frozen)
    return module._digested[1]


def drop_frozen(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Takes the frozen weights out of a checkpoint that is about to be written; their sha256 stays."""
    frozen = _frozen(module)
    if not frozen:
        return
    for key in STATES:
        if key in checkpoint:
            checkpoint[key] = {n: v for n, v in checkpoint[key].items() if n not in frozen}
    checkpoint[BASE] = _known_digest(module, frozen)


def restore_frozen(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Puts the module's own frozen weights into a checkpoint that is about to be loaded.

    Raises UserError where they are not those that the checkpoint was trained on.
    """
    if BASE not in checkpoint:
        return
    frozen = _frozen(module)
    if (digest := _known_digest(module, frozen)) != checkpoint[BASE]:
        raise UserError(
            "this checkpoint holds adapters of another prior than model.init_from, whose weights differ (sha256 "
            f"{digest[:12]}, expected {checkpoint[BASE][:12]}): give the prior that its run began with"
        )
    for key in STATES:
        if key in checkpoint:
            checkpoint[key] = {**checkpoint[key], **frozen}
