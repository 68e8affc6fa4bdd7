"""`--constraint`: samples in rounds until a strength meets what was asked, unit by unit.

The first round draws natural samples alone; they and the pilot point to a first sweep of strengths. Every further
round adds the strengths that `tiltlens.estimates.dual` proposes near the solution, until it is met within one standard
error or the cost of three sweeps is spent. What is left of it then goes into more rows at the solution, where these
would let the exact law be certified (with particles, most often). Units have strengths of their own. Nothing is sampled
twice: a folder that was left half-way, or solved for another constraint, is gone on with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from tiltlens.energies import parse_level
from tiltlens.estimates.dual import FIRST, Certificate, certify
from tiltlens.modules.plan_data import PlanData
from tiltlens.report import write_report
from tiltlens.report.digits import number, plus_minus
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import ChainSampler
from tiltlens.sampling.plan import Row, plan
from tiltlens.units.calibration import Natural

FORMS = '"q0.999" (mean activation at this natural quantile), "z=4" (natural standard deviations) or "kl=3" (nats)'
# blocks of n rows. Of three sweeps the guided ones, and the natural one once: a guided row costs several natural ones
BUDGET = 1 + 3 * len(FIRST)
RESERVE = 1  # of them: where the exact law is known, its solution may lie beside that of the sampled law


@dataclass(frozen=True)
class Asked:
    """A constraint as it was typed. kind: q, z or kl; level: its number."""

    text: str
    kind: str
    level: float

    @classmethod
    def parse(cls, text: str) -> "Asked":
        """Raises ValueError for anything but the three forms, a quantile outside (0, 1) or KL that is not positive."""
        text = str(text).strip()
        kind, level = "kl", text.removeprefix("kl").strip().removeprefix("=")
        try:
            if not text.startswith("kl"):
                kind, level = parse_level(text)
            if kind == "value":
                raise ValueError
            level = float(level)
        except ValueError:
            raise ValueError(f"constraint {text!r} is not understood: expected {FORMS}") from None
        if kind == "kl" and not 0 < level < float("inf"):
            raise ValueError(f"constraint {text!r}: expected a finite number of nats above 0")
        return cls(text, kind, level)

    def check(self, pilot: int, natural: str | None, eta: float, method: ChainSampler | None = None) -> None:
        """Raises ValueError where the run will know no natural activations, or no nats, that the constraint speaks of."""
        if self.kind == "kl" and eta == 0 and not (method and method.weighs_deterministic):
            raise ValueError(
                f"constraint {self.text!r} speaks of nats, and a chain with eta = 0 has no path KL and no weights: set "
                "model.eta above 0, or ask for an activation (z=..., q...)"
            )
        if self.kind != "kl" and not pilot and natural is None:
            raise ValueError(
                f"constraint {self.text!r} speaks of natural activations, and model.pilot = 0 gives none: set pilot >= 8, "
                "or model.natural to an image folder"
            )

    def target(self, natural: Natural) -> float:
        """Nats, or a raw activation."""
        if self.kind == "kl":
            return self.level
        return natural.quantile(self.level) if self.kind == "q" else natural.mean + self.level * natural.std

    def certify(self, natural: Natural, table: dict, pilot: dict | None, rows: list[dict]) -> dict:
        """One unit's entry of summary.json: the fields of `Certificate`, what was asked, and a sentence."""
        kind = "kl" if self.kind == "kl" else "activation"
        found = certify(kind, self.target(natural), table, pilot, rows)
        return {
            "asked": self.text,
            "kind": kind,
            **found._asdict(),
            "text": say(self, found, natural, len(rows)),
        }


class ConstraintPlan(PlanData):
    """A plan whose strengths are found. asked: the constraint; n, seed, batch_size as in PlanData.

    strengths: all of them; `of` holds those of each unit, by its index, and how many blocks of n rows each has.
    """

    def __init__(self, asked: Asked, n: int, seed: int, batch_size: int):
        super().__init__([0.0], n, seed, batch_size)
        self.asked = asked
        self.of: dict[int, dict[float, int]] = {}

    def adopt(self, folder: RunFolder, units: list[str]) -> None:
        """Start from natural samples, and from what a folder has planned before."""
        manifest = folder.read_manifest()
        told = manifest.get("constraint", {})
        solved = told.get("strengths", {})
        everyone = set(manifest.get("plan", {}).get("strengths", [])) - set().union(
            *solved.values()
        )  # of a plain run
        for i, name in enumerate(units):
            blocks = told.get("blocks", {}).get(name, [])
            self.of[i] = {
                0.0: 1,
                **dict.fromkeys(sorted(everyone), 1),
                **dict(zip(solved.get(name, []), blocks)),
            }
        self._union()

    def grow(self, found: list[dict], allowed: Callable[[float], bool] = lambda s: True) -> bool:
        """Add what the certificates propose, of strengths that are allowed; False where there is nothing to add, or no budget
        for it."""
        before = {i: dict(s) for i, s in self.of.items()}
        for i, entry in enumerate(found):
            mine = self.of[i]
            entry = entry | {"propose": [s for s in entry.get("propose", ()) if allowed(s)]}
            left = BUDGET - sum(mine.values())
            if entry["status"] == "open" and left > 0:
                mine |= {s: 1 for s in entry["propose"][:left] if s not in mine}
                if not entry["propose"] and entry["enlarge"] > 1:  # an error too large to mean anything
                    at = entry["strength"]
                    # at most twice as many: with more rows the mean may move, and another strength be wanted
                    mine[at] = min(math.ceil(entry["enlarge"] * mine[at]), 2 * mine[at], mine[at] + left)
            elif (
                entry["status"] == "reached" and entry["propose"]
            ):  # as good as met: closer, while it may cost more
                mine |= {s: 1 for s in entry["propose"][:left] if s not in mine}
            elif entry["status"] == "reached" and entry["enlarge"] > 1:
                blocks = math.ceil(entry["enlarge"] * mine[entry["strength"]])
                if blocks - mine[entry["strength"]] <= left - RESERVE:  # less would not do
                    mine[entry["strength"]] = blocks
        self._union()
        return before != self.of

    def describe(self, units: list[str]) -> dict:
        """The manifest's entries on the plan."""
        by_unit = {name: sorted(self.of[i]) for i, name in enumerate(units)}
        blocks = {name: [self.of[i][s] for s in by_unit[name]] for i, name in enumerate(units)}
        return {
            "plan": {"strengths": self.strengths, "n": self.n, "seed": self.seed},
            "constraint": {"asked": self.asked.text, "strengths": by_unit, "blocks": blocks},
        }

    def _union(self) -> None:
        self.strengths = sorted(set().union(*self.of.values()))

    def rows(self) -> list[Row]:
        most = max([1, *(b for s in self.of.values() for b in s.values())])
        rows, none = plan(self.units, self.strengths, self.n * most, self.seed), {0.0: 1}
        return [r for r in rows if r.seed - self.seed < self.n * self.of.get(r.unit, none).get(r.strength, 0)]


def solve(trainer: Trainer, module: Any, data: ConstraintPlan, writer: Any) -> list[dict]:
    """Sample round after round; the certificates, unit by unit. writer: the trainer's RunFolderWriter.

    The report and what other callbacks make of a finished run come once, at the end.
    """
    names, folder = [u.name for u in module.units], writer.folder
    last: list[Callback] = [c for c in trainer.callbacks if type(c).__name__ == "WandbCurve"]
    callbacks, report, reused = list(trainer.callbacks), writer.report, None
    data.adopt(folder, names)
    if trainer.is_global_zero:
        before = folder.read_manifest().get("constraint", {}).get("asked")
        writer.open(module, data)
        if writer.whole and before == data.asked.text:
            trainer.loggers = []  # nothing to do: no second W&B run that says the same
    trainer.callbacks, writer.report = [c for c in callbacks if c not in last], False
    try:
        while True:
            if trainer.is_global_zero:
                folder.write_manifest({**data.describe(names), "state": "running"})
            trainer.predict(module, datamodule=data, return_predictions=False)
            reused = writer.reused if reused is None else reused
            entries = folder.read_summary()["constraint"]
            if not data.grow([entries[name] for name in names], lambda s: _can(module, s)):
                break
    finally:
        trainer.callbacks, writer.report = callbacks, report
    if last:
        writer.report = False
        trainer.predict(module, datamodule=data, return_predictions=False)
        writer.report = report
    if trainer.is_global_zero:
        rows = {"rows_reused": reused, "rows_sampled": len(data.rows()) - reused}
        folder.write_manifest({"timings": {**folder.read_manifest()["timings"], **rows}})
        if report:
            write_report(folder)
    return [entries[name] for name in names]


def _can(module: Any, strength: float) -> bool:
    """Whether the guidance was made for this strength."""
    try:
        module.guidance.check_target(module.prior, module.units, module.energy, [strength])
    except ValueError:
        return False
    return True


def say(asked: Asked, found: Certificate, natural: Natural, strengths: int) -> str:
    """The certificate in a sentence or two."""
    kl = asked.kind == "kl"
    what = f"a mean activation of {number(found.target)}{_z(found.target, natural)}"
    if kl:
        what = f"{number(found.target)} nats"
    elif asked.kind == "q" and natural.beyond(asked.level):
        count, enough = len(natural.activations), math.ceil(1 / min(asked.level, 1 - asked.level) - 1e-6)
        what += f" (a Gaussian tail's: that takes {enough} natural activations, and there are {count})"
    start = f"Asked for {asked.text}" + ("" if kl else f", {what}")
    name = "KL" if kl else "the mean activation"
    reached = plus_minus(found.value, found.value_se) if found.value is not None else ""
    reached += "" if kl or not reached else _z(found.value, natural, found.value_se)
    low, high = (number(x) for x in found.reach)
    if found.status == "natural":
        return f"{start}: natural samples meet it already, with {reached}."
    at = f"at strength {number(found.strength, 6)}" if found.strength is not None else ""
    if found.status == "reached" and found.law == "q_s":
        if kl:
            return f"{start}: met {at}, where KL(q_s‖p) is {reached} nats."
        own = f"{start}: met {at}, where {name} is {reached}, {plus_minus(found.kl, found.kl_se)} nats from p"
        if found.kl_least == found.kl:
            return f"{own}: no law with that mean is nearer."
        return f"{own}; no law with that mean is nearer than {number(found.kl_least)} nats."
    if found.status == "lost":
        return (
            f"{start}: cannot be told, for no guided row is finite. Expected finite activations above strength 0: try "
            "model.precision=float32, another guidance, or a smaller target."
        )
    bounds = f"between {number(found.kl_least)} and {number(found.kl_most)} nats from p"
    if found.kl_most is None:
        bounds = f"at least {number(found.kl_least)} nats from p"
    if found.status == "reached":
        spent = f"they spent {reached} nats at most" if kl else f"{name} is {reached}"
        return (
            f"{start}: met by the guided samples {at}: {spent}, {bounds}. Weights do not reach so far: this says nothing "
            "of q_s itself. More samples, or larger groups of particles, would."
        )
    nearest = f"; nearest is {reached} {at}" if at else ""
    if found.status == "infeasible":
        return (
            f"{start}: beyond reach. {name[0].upper()}{name[1:]} goes from {low} to {high}{nearest}, and harder "
            "steering adds nothing. Ask for less, take more samples, or another guidance or unit."
        )
    short = "not met within one standard error"
    if found.enlarge > 1:
        short = "met only within an error that is too large to tell"
    return (
        f"{start}: {short} after {strengths} strengths{nearest}. This run reaches {low} to {high}: ask for less, or take a "
        "larger n."
    )


def _z(activation: float, natural: Natural, se: float | None = None) -> str:
    if natural.std == 1.0 and natural.mean == 0.0:
        return ""
    return f" (z = {plus_minus((activation - natural.mean) / natural.std, se and se / natural.std)})"
