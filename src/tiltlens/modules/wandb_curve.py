"""The curve on W&B, read back from the run folder when sampling is done.

For each (unit, schedule), under the prefix UNIT/SCHEDULE: one history row a strength, in order of strength, with exact
metric names that have the strength as their x axis; grids of images on fixed seeds, strength 0 first; histograms; the
norm of the guidance at each step against log-SNR, with particles their ESS and unique ancestors, and with walks in
noise space the acceptance on their ladder; the certificate of a constraint, as summary keys; and one sortable table of samples. Of particles, pictures and histograms
show the equally weighted output.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import wandb
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from tiltlens.errors import UserError
from tiltlens.modules.results import columns
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.report import grid
from tiltlens.report.image_grid import dealt
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import Independent

CURVE = (
    "activation_mean", "activation_se", "z_mean", "z_se", "energy_mean", "energy_se", "path_kl", "path_kl_se", "kl_lower",
    "kl_lower_se", "kl", "kl_se", "log_z", "log_z_se", "optimum_energy", "optimum_energy_se", "ess", "gap", "gap_se", "efficiency", "n", "nonfinite", "seconds",
)  # fmt: skip
# Every row brings its own x. With step_sync, its default, W&B adds x once more to a row, now and then as 0.
QUANTILES = (0.05, 0.5, 0.95)
TABLE = ("unit", "strength", "seed", "activation", "z", "energy", "log_w", "path_kl", "clipped", "finite")
IMAGES_A_KEY = 108  # more are dropped by W&B without a word
TABLE_ROWS = 10_000  # likewise, of what is shown of a table


class WandbCurve(Callback):
    """Logs a finished run folder; does nothing without a WandbLogger. Comes after RunFolderWriter in the callbacks."""

    def on_predict_end(self, trainer: Trainer, pl_module: SamplingModule) -> None:
        loggers = [x for x in trainer.loggers if isinstance(x, WandbLogger)]
        writers = [c for c in trainer.callbacks if hasattr(c, "folder")]
        if not trainer.is_global_zero or not loggers or not writers:
            return
        run, folder = loggers[0].experiment, writers[0].folder
        run.config.update({"tiltlens": folder.read_manifest()}, allow_val_change=True)
        samples = columns(folder.samples())
        for unit in pl_module.units:
            prefix = f"{unit.slug}/{schedule_name(pl_module)}"
            mine = {k: v[samples["unit"] == unit.name] for k, v in samples.items()}
            rows = [r for r in folder.read_summary()["rows"] if r["unit"] == unit.name]
            log_curve(run, prefix, rows, mine, folder)
            log_steps(run, prefix, folder, unit.name, mine["group"])
            log_walks(run, prefix, folder, unit.name)
            log_certificate(run, prefix, folder.read_summary().get("constraint", {}).get(unit.name))
            if pl_module.prior.images:
                run.log(
                    {
                        f"{prefix}/grid": wandb.Image(
                            grid(folder, unit.name), caption="rows: strength, columns: seed"
                        )
                    }
                )
        log_table(run, samples, folder)
        run.finish()


def place_wandb(logger: WandbLogger, out: Path) -> None:
    """Its files go under OUT/wandb, quietly; online with no login is an error now and not a prompt later."""
    if not logger._offline and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "W&B is asked for online, but there is no login: set WANDB_API_KEY or run `wandb login`, or stay offline"
        )
    init = logger._wandb_init
    if logger._offline:  # Lightning says it in the environment, which W&B may have read already
        init["mode"] = "offline"
    init.pop("anonymous", None)  # Lightning passes it always; W&B warns of it always
    init["dir"] = logger._save_dir = str(out)
    init["name"] = init.get("name") or out.name
    # the run folder says where it comes from: neither the console nor this machine is recorded
    quiet = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
    bare = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
    init["settings"] = init.get("settings") or wandb.Settings(**quiet, **bare)


def schedule_name(module: SamplingModule) -> str:
    """Guidance and chain, in a word: what tells two schedules of one unit apart."""
    name = f"{type(module.guidance).__name__.lower()}-{module.steps}-eta{module.eta:g}"
    name += f"-order{module.order}" if module.order != 1 else ""
    if isinstance(module.method, Independent):
        return name
    group = module.method.group_size
    return f"{name}-{type(module.method).__name__.lower()}{group if group > 1 else ''}"


def log_curve(
    run: Any, prefix: str, rows: list[dict], samples: dict[str, np.ndarray], folder: RunFolder
) -> None:
    """One history row a strength. rows: of summary.json; samples: the unit's, as columns. As in the rows, the pilot's
    activations are of strength 0."""
    x = f"{prefix}/strength"
    run.define_metric(x)
    names = [*CURVE, *(f"activation_q{q:g}" for q in QUANTILES)]
    for name in names:
        run.define_metric(f"{prefix}/{name}", step_metric=x, step_sync=False)
    copies = np.nan_to_num(np.asarray(samples["copies"], float), nan=1).astype(int)
    pilot = _pilot(folder, rows[0]["unit"]) if rows else np.empty(0)
    for row in sorted(rows, key=lambda r: r["strength"]):
        entry: dict[str, Any] = {x: row["strength"]}
        entry |= {f"{prefix}/{k}": row[k] for k in CURVE if row.get(k) is not None}
        here = (samples["strength"] == row["strength"]) & samples["finite"]
        a = np.repeat(samples["activation"][here], copies[here])
        if row["strength"] == 0:
            a = np.concatenate([a, pilot])
        if len(a):
            entry |= {f"{prefix}/activation_q{q:g}": float(np.quantile(a, q)) for q in QUANTILES}
            entry[f"{prefix}/activation"] = wandb.Histogram(a)
        run.log(entry)
    images = [
        wandb.Image(
            str(folder.path / samples["image"][i]),
            caption=f"strength {samples['strength'][i]:g}, seed {samples['seed'][i]}"
            + (f", {copies[i]} copies" if copies[i] > 1 else ""),
        )
        for i in _shown(
            samples, copies, max(1, min(16, IMAGES_A_KEY // len(rows)))
        )  # every strength is shown
    ]
    if images:
        run.log({f"{prefix}/images": images})


def _pilot(folder: RunFolder, unit: str) -> np.ndarray:
    """The finite activations (n,) of a unit's pilot; none without one."""
    kept = folder.path / "pilot" / "samples.parquet"
    if not kept.exists():
        return np.empty(0)
    table = columns(pq.read_table(kept))
    a = np.asarray(table["activation"][table["unit"] == unit], float)
    return a[np.isfinite(a)]


def _shown(samples: dict[str, np.ndarray], copies: np.ndarray, each: int) -> list[int]:
    """Rows in order of strength: of each the first by seed (of particles: by `dealt`) that have a picture and a copy."""
    shown: dict[float, list[int]] = {}
    for i in np.lexsort((samples["seed"], samples["strength"])):
        if samples["image"][i] is not None and copies[i] > 0:
            shown.setdefault(samples["strength"][i], []).append(i)
    if "group" in samples and not np.isnan(np.asarray(samples["group"], float)).all():
        shown = {
            s: [rows[k] for k in dealt([samples["group"][i] for i in rows])] for s, rows in shown.items()
        }
    few = np.linspace(0, len(shown) - 1, min(len(shown), IMAGES_A_KEY)).round().astype(int)
    return [i for k in few for i in list(shown.values())[k][:each]]


def log_steps(run: Any, prefix: str, folder: RunFolder, unit: str, groups: np.ndarray) -> None:
    """At each step, a metric a strength, against log-SNR: the mean norm of the guidance, its KL and, of groups of
    particles (groups: their seeds), the mean ESS and number of unique ancestors; the norm against t, too."""
    steps = columns(folder.steps())
    mine = {k: v[steps["unit"] == unit] for k, v in steps.items()}
    strengths = [s for s in sorted(set(mine["strength"].tolist())) if s > 0]
    x = f"{prefix}/log_snr"
    run.define_metric(x)
    run.define_metric(f"{prefix}/t", step_metric=x, step_sync=False)
    of = dict.fromkeys(("guidance_norm", "path_kl_step"), np.ones(len(mine["step"]), bool))
    first = np.isin(mine["seed"], groups)
    of |= {name: first for name in ("ess", "ancestors") if first.any()}
    for s in strengths:
        for name in of:
            run.define_metric(f"{prefix}/{name}/strength {s:g}", step_metric=x, step_sync=False)
        run.define_metric(
            f"{prefix}/guidance_norm_by_t/strength {s:g}", step_metric=f"{prefix}/t", step_sync=False
        )
    for k in sorted(set(mine["step"].tolist())):
        at = mine["step"] == k
        entry: dict[str, Any] = {x: float(mine["log_snr"][at][0]), f"{prefix}/t": int(mine["t"][at][0])}
        for s in strengths:
            here = at & (mine["strength"] == s)
            for name, rows in of.items():
                told = mine[name][here & rows]
                if np.isfinite(told).any():
                    entry[f"{prefix}/{name}/strength {s:g}"] = float(np.nanmean(told))
            if (norm := entry.get(f"{prefix}/guidance_norm/strength {s:g}")) is not None:
                entry[f"{prefix}/guidance_norm_by_t/strength {s:g}"] = norm
        run.log(entry)


def log_walks(run: Any, prefix: str, folder: RunFolder, unit: str) -> None:
    """Of walks in noise space: acceptance and step size on the ladder of each strength, against the ladder's strength;
    autocorrelation and effective samples of the moves at the strength itself."""
    told = [d for d in folder.read_manifest().get("diagnostics", []) if d["unit"] == unit and "ladder" in d]
    for d in told:
        at = f"strength {d['strength']:g}"
        x = f"{prefix}/ladder/{at}"
        run.define_metric(x)
        for name in ("acceptance", "beta"):
            run.define_metric(f"{prefix}/{name}/{at}", step_metric=x, step_sync=False)
        for s, acceptance, beta in zip(d["ladder"], d["acceptance"], d["beta"]):
            run.log({x: s, f"{prefix}/acceptance/{at}": acceptance, f"{prefix}/beta/{at}": beta})
        run.summary.update(
            {f"{prefix}/{name}/{at}": d[name] for name in ("autocorrelation", "effective", "lost")}
        )


def log_certificate(run: Any, prefix: str, found: dict | None) -> None:
    """Of a constraint: what was asked and what is certified, as summary keys PREFIX/constraint/...; the reachable range as
    two."""
    told = {
        k: v for k, v in (found or {}).items() if k not in ("propose", "reach", "enlarge") and v is not None
    }
    if found:
        told |= dict(zip(("reach_low", "reach_high"), found["reach"]))
    run.summary.update({f"{prefix}/constraint/{k}": v for k, v in told.items()})


def _rows_of_table(samples: dict[str, np.ndarray], most: int) -> np.ndarray:
    """Indices of the rows, as they are; of more than `most` the first seeds of each unit and strength, as many of each."""
    rows = np.arange(len(samples["seed"]))
    if len(rows) <= most:
        return rows
    order = np.lexsort((samples["seed"], samples["strength"], samples["unit"]))
    _, first = np.unique(
        np.stack([np.unique(samples["unit"], return_inverse=True)[1], samples["strength"]])[:, order], axis=1, return_index=True
    )  # fmt: skip
    place = np.concatenate([np.arange(n) for n in np.diff([*np.sort(first), len(rows)])])
    return order[place < most // len(first)]


def log_table(run: Any, samples: dict[str, np.ndarray], folder: RunFolder) -> None:
    """Every sample, sortable, with its picture; of very many the first seeds of every unit and strength."""
    table = wandb.Table(columns=[*TABLE, "image"])
    for i in _rows_of_table(samples, TABLE_ROWS):
        image = samples["image"][i]
        cells = [samples[k][i].item() if hasattr(samples[k][i], "item") else samples[k][i] for k in TABLE]
        table.add_data(*cells, None if image is None else wandb.Image(str(folder.path / image)))
    run.log({"samples": table})
