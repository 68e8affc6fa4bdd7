"""The table of a page: which numbers of a row it shows, and what each says in one plain sentence."""

from dataclasses import dataclass

from markupsafe import Markup

from tiltlens.report.digits import number, plus_minus
from tiltlens.report.unit_run import UnitRun


@dataclass(frozen=True)
class Column:
    """key, error: where a row of summary.json holds the value and its standard error. meaning: HTML."""

    key: str
    heading: str
    error: str | None
    digits: int
    meaning: Markup

    def cell(self, row: dict) -> str:
        return (
            plus_minus(row[self.key], row[self.error]) if self.error else number(row[self.key], self.digits)
        )


def _column(key: str, heading: str, meaning: str, error: str | None = None, digits: int = 2) -> Column:
    return Column(key, heading, error, digits, Markup(meaning))


COLUMNS = (
    _column(
        "strength",
        "strength",
        "<i>s</i> in <i>q<sub>s</sub></i>(<i>x</i>) ∝ <i>p</i>(<i>x</i>) exp(−<i>s E</i>(<i>x</i>)), "
        "the ideal law that the chain is steered towards. At strength 0 that is <i>p</i> itself.",
        digits=6,
    ),
    _column("n", "n", "Finite samples of this strength; at 0, those of the pilot are among them.", digits=9),
    _column(
        "z_mean",
        "activation, z",
        "Mean activation of the samples, in natural standard deviations above the natural mean; the error is that of the "
        "samples, on the scale of this run’s reference (how well that is known: <code>std_se</code> in summary.json).",
        "z_se",
    ),
    _column("activation_mean", "activation", "Mean activation in the unit’s own scale.", "activation_se"),
    _column(
        "energy_mean",
        "energy",
        "Mean of <i>E</i>, the soft constraint on the activation: low where the constraint is met.",
        "energy_se",
    ),
    _column(
        "kl_lower",
        "KL at least",
        "Lower bound, in nats, for the law that was really sampled: no law that reaches this mean energy is "
        "nearer to <i>p</i>.",
        "kl_lower_se",
    ),
    _column(
        "path_kl",
        "KL at most",
        "Upper bound for the same law: what the guidance spent along the whole trajectories, noise to image.",
        "path_kl_se",
    ),
    _column(
        "efficiency",
        "efficiency",
        "Lower bound over upper bound. 1: every nat went into the activation; 0.1: nine of ten may have gone "
        "elsewhere.",
    ),
    _column(
        "kl",
        "KL of ideal",
        "Best estimate of KL(<i>q<sub>s</sub></i>‖<i>p</i>), what the ideal law at this strength costs. "
        "It is no property of the samples. The small word names the estimator.",
        "kl_se",
    ),
    _column(
        "log_z",
        "log Z",
        "Logarithm of E<sub><i>p</i></sub>[exp(−<i>s E</i>)], the normaliser of <i>q<sub>s</sub></i>. No law "
        "makes KL + <i>s</i>·energy smaller than −log Z.",
        "log_z_se",
    ),
    _column(
        "gap",
        "gap",
        "KL at most + <i>s</i>·energy + log Z, in nats: how far the guided chain stays behind the ideal law. "
        "Zero is perfect; between methods, the smaller is the better.",
        "gap_se",
    ),
    _column(
        "ess",
        "ESS",
        "Effective sample size: how many of the <i>n</i> samples still count when they are re-weighted to "
        "<i>q<sub>s</sub></i>. Near 1, everything rests on one sample.",
    ),
    _column("seconds", "seconds", "Time spent on this strength."),
)


def split(run: UnitRun) -> tuple[list[Column], list[Column]]:
    """The columns in which this unit has any number, and those in which it has none."""
    has = [column for column in COLUMNS if any(row[column.key] is not None for row in run.curve)]
    return has, [column for column in COLUMNS if column not in has]
