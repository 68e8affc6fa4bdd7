"""The words of the page: its first sentence, and what a reader must know before the numbers."""

import numpy as np

from tiltlens.report.digits import number, plus_minus
from tiltlens.report.unit_run import UnitRun, read_units
from tiltlens.run_folder import RunFolder

ESS_SHARE, ESS_LEAST = 0.1, 5.0  # below either, weights rest on a handful of samples
CLIPPED_SHARE = 0.05  # of a sample's values


def answer(run: UnitRun, strength: float | None = None) -> str:
    """How far the strongest tilt moved the unit, or the one nearest to `strength`, and how many nats from natural
    that is."""
    scale = run.scale
    rows = [row for row in run.curve if row[f"{scale}_mean"] is not None]
    if not rows:
        return "No sample of this unit has a finite activation."
    row = rows[-1] if strength is None else min(rows, key=lambda r: abs(r["strength"] - strength))
    mean, se = row[f"{scale}_mean"], row[f"{scale}_se"]
    start = f"At strength {number(row['strength'], 6)} the unit’s mean activation is "
    if scale == "z":
        side = "above" if mean >= 0 else "below"
        known = f" (a scale known to {run.scale_error:.0%})" if run.scale_error else ""
        start += f"{plus_minus(abs(mean), se)} natural standard deviations{known} {side} the natural mean"
    else:
        natural = run.natural.get("activation", np.empty(0))
        start += plus_minus(mean, se)
        start += f", against {number(float(natural.mean()))} naturally" if len(natural) else ""
    if row["strength"] == 0:
        return f"{start}: samples of the prior alone, without guidance."
    sentence = f"{start}, {_distance(row, 'natural images' if run.has_images else 'the prior')}."
    if row["kl"] is None:
        return sentence
    ideal, at = row["optimum_energy"], f"{plus_minus(row['kl'], row['kl_se'])} nats"
    if not run.linear or ideal is None:
        return f"{sentence} The ideal law at this strength lies at {at}."
    mean = plus_minus(-ideal, row["optimum_energy_se"])
    return f"{sentence} The ideal law at this strength has {'z = ' if scale == 'z' else ''}{mean}, at {at}."


def _distance(row: dict, origin: str) -> str:
    lower, upper = (bound(row[key], row[f"{key}_se"]) for key in ("kl_lower", "path_kl"))
    if lower is None and upper is None:
        return f"at a distance from {origin} that this run did not bound"
    if lower is None:
        return f"at no more than {upper} nats from {origin}"
    if upper is None:
        return f"at no less than {lower} nats from {origin}"
    if lower == upper:
        return f"at {lower} nats from {origin}"
    return f"at between {lower} and {upper} nats from {origin}"


def nats(row: dict) -> str:
    """The two bounds in a label's few characters, of those that their own errors do not leave open."""
    low, high = (
        number(max(row[key], 0.0), 2) if bound(row[key], row[f"{key}_se"]) is not None else None
        for key in ("kl_lower", "path_kl")
    )
    if low is not None and high is not None:
        return f"{low}–{high} nats"
    return f"≥ {low} nats" if low is not None else f"≤ {high} nats" if high is not None else ""


def bound(value: float | None, se: float | None) -> str | None:
    """In words; None for one that its own error leaves open. An estimate may fall below what KL can be."""
    if value is None or (se and se > max(value, 0.0)):
        return None
    told = plus_minus(max(value, 0.0), se) if se else number(max(value, 0.0), 2)
    return f"{told} (error not known)" if se is None else told


def find_warnings(folder: RunFolder, runs: dict[str, UnitRun] | None = None) -> list[str]:
    """A sentence each: unfinished run, rows not finite or clipped, ESS collapse, then those of summary.json.

    Led by the unit's address where the run has several. runs: as `read_units` gave them, to read them once.
    """
    runs = read_units(folder) if runs is None else runs
    found = []
    state = folder.read_manifest().get("state")
    if state is not None and state != "complete":
        found.append(
            f"The run is not complete (its state: {state}): not all that was asked for is on this page."
        )
    told = [str(line) for line in folder.read_summary()["warnings"]]
    for unit, run in runs.items():
        own = " ".join(line for line in told if line.startswith(f"{unit}: "))
        found += [f"{unit}: {line}" for line in _of_unit(run, own)]
    found = list(dict.fromkeys(found + told))
    # One unit needs no name before every line.
    return found if len(runs) > 1 else [line.removeprefix(f"{unit}: ") for line in found for unit in runs]


def _of_unit(run: UnitRun, told: str) -> list[str]:
    """told: what the estimators said of this unit, strength by strength; it is not said twice."""
    lines = []
    finite = run.samples["finite"].to_numpy()
    strengths = run.samples["strength"].to_numpy()
    if not finite.all() and "not finite" not in told:
        lines.append(
            f"{(~finite).sum()} of {len(finite)} rows are not finite (strength {_list(strengths[~finite])}); "
            "they are left out of every mean and figure, which therefore speak of the survivors only."
        )
    clipped = run.samples["clipped"].fill_null(0.0).to_numpy() > CLIPPED_SHARE
    if clipped.any():
        lines.append(
            f"{clipped.sum()} of {len(clipped)} rows had more than {CLIPPED_SHARE:.0%} of their values "
            f"clipped (strength {_list(strengths[clipped])}): there the chain leaves the range of images. Pictures show "
            "them cut, activations are of the values as they are; model.clip = true keeps a chain inside."
        )
    low = [row for row in run.curve if row["strength"] and _collapsed(row["ess"], row["n"])]
    if low and "only bounds" not in told:
        ess = (f"{number(r['ess'], 2)} of {r['n']} at strength {number(r['strength'], 6)}" for r in low)
        lines.append(
            f"The effective sample size collapses ({'; '.join(ess)}): what rests on importance weights is "
            "unreliable there. Read the two bounds, not the single number."
        )
    return lines


def _collapsed(ess: float | None, n: int) -> bool:
    return ess is not None and ess < min(max(ESS_LEAST, ESS_SHARE * n), 0.5 * n)


def _list(strengths: np.ndarray) -> str:
    return ", ".join(number(s, 6) for s in np.unique(strengths).tolist())
