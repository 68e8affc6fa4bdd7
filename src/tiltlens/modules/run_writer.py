"""The run-folder writer: what sampling makes goes to disk batch by batch, and a run that stops can go on.

Images are written before the part that lists them; every file under a temporary name first. At the end, rank 0 merges
the parts, estimates the curve and writes the report.
"""

import datetime
import time
from contextlib import suppress
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tiltlens.errors import UserError
from tiltlens.modules.provenance import device_name, provenance
from tiltlens.modules.results import estimate_run
from tiltlens.modules.run_stores import PilotStore, RecordStore
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.report import write_report
from tiltlens.run_folder import RunFolder
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Samples

STEP_SEEDS = 64  # seeds of each (unit, strength) whose single steps are kept: enough for a mean, and no flood; of groups,
# the first rows of so many besides
MADE_BY = ("versions", "git_revision")  # what made the rows, and not what they are


class RunFolderWriter(Callback):
    """Writes a run folder. out: its path. config: the text of config.yaml; report: write report.html at the end.

    A folder that holds a different run raises ValueError before anything is sampled; a folder that holds part of this
    run is finished. Strengths and n may grow from one call to the next; nothing that is there is computed again.
    """

    def __init__(self, out: str, config: str = "", report: bool = True):
        self.folder = RunFolder(out)
        self.config, self.report = config, report
        self._began, self._open = time.time(), False
        self._claimed, self._locked = False, False
        self.whole = False  # whether all that is asked was here before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SamplingModule):
            raise ValueError(
                f"RunFolderWriter writes what SamplingModule samples; found {type(pl_module).__name__}"
            )
        if trainer.is_global_zero:
            self.folder.lock()  # once more where the caller has it already, for a run of several predictions
            self._locked = True
            self.open(pl_module, trainer.datamodule)
        trainer.strategy.barrier("claimed")
        pl_module.load()
        data = trainer.datamodule
        data.units = len(pl_module.units)
        index = {u.name: i for i, u in enumerate(pl_module.units)}
        data.skip = {Row(index[u], s, k) for u, s, k in self.folder.done() if u in index}
        data.set_groups(pl_module.method.group_size)
        self.reused = len(data.rows()) - len(data.remaining())
        if (
            trainer.is_global_zero and self.whole and data.remaining()
        ):  # another constraint wants more strengths
            self.whole = False
            self.folder.write_manifest(self._source(pl_module))
        pl_module.pilot_store = PilotStore(self.folder, pl_module)
        self.records = RecordStore(self.folder)

    def open(self, module: SamplingModule, data: Any) -> None:
        """Load what the run needs and claim the folder for it, once, before anything else is written there (a logger's
        files, say). Raises every error that the user can put right."""
        if self._open:
            return
        module.load()
        data.set_groups(module.method.group_size)
        self._open = True
        identity = {**module.describe(), "seed": data.seed}
        plan = self._grown_plan(data)
        module.check_plan(data)
        self.whole = self._is_whole(module, data)
        self.folder.claim(identity)
        self._claimed = True
        if self.config:
            self.folder.write_config(self.config)
        self.folder.write_manifest({**self._source(module), "plan": plan, "state": "running"})

    def _source(self, module: SamplingModule) -> dict:
        """Of the manifest: where everything comes from. With a session of its own, where there are rows to sample; where there are
        none it goes on saying what made those that are there."""
        source = provenance(module)
        if self.whole:
            return {k: v for k, v in source.items() if k not in MADE_BY}
        mine = {"started": _now(), **{k: source[k] for k in MADE_BY}}
        return {**source, "started": mine["started"], "sessions": [*self._sessions(), mine]}

    def _sessions(self) -> list[dict]:
        """The calls that had rows of this folder to sample, in order."""
        return self.folder.read_manifest().get("sessions", [])

    def _is_whole(self, module: SamplingModule, data: Any) -> bool:
        index = {u.name: i for i, u in enumerate(module.units)}
        data.units = len(module.units)
        done = {Row(index[u], s, k) for u, s, k in self.folder.done() if u in index}
        return self.folder.read_manifest().get("state") == "complete" and done >= set(data.rows())

    def _grown_plan(self, data: Any) -> dict:
        """Raises ValueError where the stored plan holds what the asked one does not."""
        asked = {"strengths": data.strengths, "n": data.n, "seed": data.seed}
        stored = self.folder.read_manifest().get("plan")
        if stored:
            lost = sorted(set(stored["strengths"]) - set(data.strengths))
            if lost or stored["n"] > data.n:
                raise ValueError(
                    f"{self.folder.path} holds a larger plan: data.strengths stored {stored['strengths']}, asked "
                    f"{data.strengths}; data.n stored {stored['n']}, asked {data.n}. A plan may grow, not shrink: "
                    "give another --out"
                )
        return asked

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: SamplingModule,
        outputs: Samples | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:
            return
        seconds = time.time() - self._batch_began
        names = [u.name for u in pl_module.units]
        slugs = [u.slug for u in pl_module.units]
        chain = pl_module.sampler.chain
        levels = list(enumerate(zip(chain.indices, chain.log_snr.tolist())))
        first, group_size = trainer.datamodule.seed, trainer.datamodule.group_size
        rows, steps = [], []
        for i, row in enumerate(outputs.rows):
            image = None
            if pl_module.prior.images:
                image = self.folder.image_name(slugs[row.unit], row.strength, row.seed)
                self.folder.save_image(image, to_uint8(outputs.images[i]).permute(1, 2, 0).numpy())
            rows.append({
                "unit": names[row.unit], "strength": row.strength, "seed": row.seed,
                "activation": float(outputs.activation[i]), "z": float(outputs.z[i]), "energy": float(outputs.energy[i]),
                "log_w": None if outputs.log_w is None else float(outputs.log_w[i]),
                "path_kl": None if outputs.path_kl is None else float(outputs.path_kl[i]),
                "clipped": float(outputs.clipped[i]), "finite": bool(outputs.finite[i]), "image": image,
                "group": None if outputs.group is None else int(outputs.group[i]),
                "weight": None if outputs.weight is None else float(outputs.weight[i]),
                "copies": None if outputs.copies is None else int(outputs.copies[i]),
                "ancestor": None if outputs.ancestor is None else int(outputs.ancestor[i]),
                "seconds": seconds / len(outputs.rows),
            })  # fmt: skip
            if not _keeps_steps(row.seed - first, group_size):
                continue
            steps += [
                {
                    "unit": names[row.unit], "strength": row.strength, "seed": row.seed, "step": k, "t": t,
                    "log_snr": level, "guidance_norm": float(outputs.guidance_norm[i, k]),
                    "path_kl_step": float(outputs.step_kl[i, k]),
                    "ess": None if outputs.ess is None else _number(outputs.ess[i, k]),
                    "ancestors": None if outputs.ancestors is None else float(outputs.ancestors[i, k]),
                }
                for k, (t, level) in levels
            ]  # fmt: skip
        self.records.save(pl_module.method.recorded() if any(r.strength > 0 for r in outputs.rows) else None)
        self.folder.write_part(rows, steps)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in open: before this hook the module lies on the CPU, wherever it will run
        if trainer.is_global_zero and trainer.datamodule.remaining():
            self.folder.write_manifest({"device": device_name(trainer.strategy.root_device)})

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        self._batch_began = time.time()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # the user's to put right: with other settings, perhaps
        if self._claimed and isinstance(exception, ValueError | OSError):
            # of a folder that takes no files: the error that is told is the first
            with suppress(OSError, UserError):
                self.folder.release()
        self._unlock()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._locked:
            self._locked = False
            self.folder.unlock()

    def on_predict_end(self, trainer: Trainer, pl_module: SamplingModule) -> None:
        trainer.strategy.barrier("sampled")
        if trainer.is_global_zero:
            self.finish(pl_module, trainer.datamodule)
        trainer.strategy.barrier("written")

    def finish(self, module: SamplingModule, data: Any) -> None:
        """Merge, estimate, report. Raises RuntimeError if a row of the plan is missing."""
        self.folder.consolidate()
        done = self.folder.done()
        names = [u.name for u in module.units]
        missing = [r for r in data.rows() if (names[r.unit], r.strength, r.seed) not in done]
        sessions = self._sessions()
        if not self.whole:
            sessions[-1] |= {"finished": _now(), "seconds": time.time() - self._began, "rows": len(done)}
        if (note := _mixed(sessions)) and note not in module.notes:
            module.notes = [*module.notes, note]
        estimate_run(self.folder, module, data)
        told = [
            {**d, "unit": module.units[d["unit"]].name}
            for d in module.method.diagnostics(self.records.load())
        ]
        learned = dict(zip(names, module.sampler.guidance.outcome()))
        self.folder.write_manifest({
            **({"diagnostics": told} if told else {}), **({"learned": learned} if learned else {}),
            "state": "incomplete" if missing else "complete", "finished": _now(), "sessions": sessions,
            "timings": {
                "seconds": time.time() - self._began, "pilot_seconds": module.pilot_seconds,
                "rows_reused": self.reused, "rows_sampled": len(data.rows()) - self.reused,
            },
        })  # fmt: skip
        if self.report:
            write_report(self.folder)
        if missing:
            raise RuntimeError(
                f"{len(missing)} rows of the plan are missing from {self.folder.path}; run the same command again"
            )


def _mixed(sessions: list[dict]) -> str | None:
    """What to say of rows that are not all of one revision and one set of packages."""
    differing = [
        f"{name} {' and '.join(dict.fromkeys(map(str, told)))}"
        for name in ("git_revision", *dict.fromkeys(k for s in sessions for k in s["versions"]))
        if len(set(told := [s["versions"].get(name, s.get(name)) for s in sessions])) > 1
    ]
    return (
        f"the rows were sampled by different versions ({', '.join(differing)}): see sessions in manifest.json"
        if differing
        else None
    )


def _number(x: torch.Tensor) -> float | None:
    return float(x) if torch.isfinite(x) else None


def _keeps_steps(number: int, group_size: int) -> bool:
    """number: of the row among its (unit, strength)."""
    return number < STEP_SEEDS or (number % group_size == 0 and number // group_size < STEP_SEEDS)


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8 0..255, by rounding; NaN becomes black."""
    return (image.nan_to_num(-1.0).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
