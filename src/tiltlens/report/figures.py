"""The figures of a unit, as matplotlib figures that stand alone and as SVG that follows the page's theme."""

import re
from collections.abc import Callable
from functools import wraps
from io import StringIO

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from tiltlens.report.digits import number
from tiltlens.report.unit_run import UnitRun

# Read on white; in the page each becomes the CSS variable of its name, which the dark theme redefines.
THEME = {"ink": "#23272b", "muted": "#6b7279", "rule": "#d3d7db", "natural": "#c3c9cf"}
# Of one lightness, so that they stand on white and on black alike: cool is weak, warm is strong.
STRENGTHS = LinearSegmentedColormap.from_list("strength", ["#4f8fd0", "#8a74cf", "#c8558f", "#e06a2c"])
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "svg.hashsalt": "tiltlens",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": THEME["muted"],
    "axes.labelcolor": THEME["ink"],
    "axes.linewidth": 0.7,
    "text.color": THEME["ink"],
    "xtick.color": THEME["muted"],
    "ytick.color": THEME["muted"],
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
}
SIZE = (4.7, 3.4)  # inches
RIDGES = 8  # strengths that a histogram shows
TICKS = 200  # samples of a strength that a histogram draws one by one
WIDE = 60.0  # nats, beyond which the frontier's axis turns logarithmic


def colours(strengths: list[float]) -> dict[float, str]:
    """A colour for each strength of a unit, by rank; strength 0 is grey."""
    tilted = sorted(s for s in set(strengths) if s)
    place = np.linspace(0, 1, len(tilted)) if len(tilted) > 1 else np.ones(1)
    return {0.0: THEME["muted"]} | {s: to_hex(STRENGTHS(p)) for s, p in zip(tilted, place)}


def _styled(draw: Callable[..., Figure | None]) -> Callable[..., Figure | None]:
    @wraps(draw)
    def styled(*args):
        with matplotlib.rc_context(STYLE):
            return draw(*args)

    return styled


def _axis(run: UnitRun) -> str:
    return "activation, natural standard deviations" if run.scale == "z" else "activation"


@_styled
def frontier(run: UnitRun) -> Figure | None:
    """Mean activation against nats. None where no strength has a KL.

    A bar a strength from kl_lower to path_kl, within which lies the law that was sampled, a caret where
    there is no upper bound; height: mean ± se. Where E is minus the activation, a dot at kl and minus optimum_energy, each ± se, the
    ideal law of this strength, and a line through the left ends, the frontier: the least nats that reach the same mean
    energy. Its band, and the whisker of a right end, are one standard error.
    """
    name = run.scale
    keys = ("kl_lower", "path_kl", "kl")
    rows = [r for r in run.curve if r[f"{name}_mean"] is not None and any(r[k] is not None for k in keys)]
    if not rows:
        return None
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    colour = colours([r["strength"] for r in rows])
    widest = max(r[k] for r in rows for k in keys if r[k] is not None)
    if widest > WIDE:
        axes.set_xscale("symlog", linthresh=1.0)
    ends = [
        (r["kl_lower"], r[f"{name}_mean"], r["kl_lower_se"] or 0) for r in rows if r["kl_lower"] is not None
    ]
    least, height, error = np.reshape(ends, (-1, 3)).T
    if run.linear:
        axes.plot(least, height, color=THEME["muted"], lw=0.9, zorder=1)
        axes.fill_betweenx(
            height, np.fmax(least - error, 0), least + error, color=THEME["muted"], alpha=0.18, lw=0, zorder=0
        )
    for r in rows:
        y, shade = r[f"{name}_mean"], colour[r["strength"]]
        low, high = r["kl_lower"], r["path_kl"]
        if low is not None and high is None:
            axes.plot(low, y, marker=5, ms=7, color=shade, mew=0, zorder=2)  # a caret to the right: at least
        elif high is not None:
            low = 0.0 if low is None else low
            axes.plot([low, high], [y, y], color=shade, lw=7, alpha=0.3, solid_capstyle="butt", zorder=2)
            axes.plot([low, high], [y, y], "|", color=shade, ms=9, mew=1.2, zorder=2)
            spread = {"xerr": r["path_kl_se"] or 0, "yerr": r[f"{name}_se"] or 0}
            axes.errorbar(high, y, **spread, fmt="none", color=shade, elinewidth=0.8, zorder=2)
        if run.linear and r["kl"] is not None and r["optimum_energy"] is not None:
            errors = {"xerr": r["kl_se"] or 0, "yerr": r["optimum_energy_se"] or 0}
            axes.errorbar(
                r["kl"], -r["optimum_energy"], **errors, fmt="o", ms=5, color=shade, elinewidth=1.1, zorder=3
            )
        label = f"s = {number(r['strength'], 4)}"
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(label, (_right_end(r), y), **place)
    if name == "z" and run.linear:
        _gaussian_frontier(axes, max(r["z_mean"] for r in rows))
    lowest = min(0.0, *(r[k] for r in rows for k in keys if r[k] is not None))
    reach = max(_right_end(r) for r in rows)
    if widest > WIDE:  # a logarithmic axis, linear below one nat
        axes.set_xlim(min(lowest, -0.25), max(widest * 3, reach * 1.5))
    else:
        axes.set_xlim(lowest - 0.02 * reach if reach else -0.1, max(widest * 1.18, reach * 1.12) or 1.0)
    axes.set_xlabel("KL from p, nats")
    axes.set_ylabel(f"mean {_axis(run)}")
    return figure


def _right_end(row: dict) -> float:
    """Where a row's bar ends, whisker included, in nats."""
    high = row["path_kl"] if row["path_kl"] is not None else row["kl_lower"]
    if high is None:
        return row["kl"] + (row["kl_se"] or 0)
    return high + (row["path_kl_se"] or 0 if row["path_kl"] is not None else 0)


def _gaussian_frontier(axes, top: float) -> None:
    """KL = z^2 / 2: the least that a shift of z costs if the natural activation is Gaussian."""
    if top > 0:
        z = np.linspace(0, top * 1.05, 60)
        axes.plot(z**2 / 2, z, ":", color=THEME["muted"], lw=1.1, zorder=0, scalex=False, scaley=False)


@_styled
def histogram(run: UnitRun) -> Figure | None:
    """The activations at each strength, a row each, over the natural ones; each shape as high as its row, for one narrow law would
    flatten all others. None without finite values."""
    drawn = {s: v for s, v in run.values(run.scale).items() if len(v)}
    natural = run.natural.get(run.scale, np.empty(0))
    if not drawn:
        return None
    strengths = list(drawn)
    if len(strengths) > RIDGES:
        strengths = [strengths[i] for i in np.linspace(0, len(strengths) - 1, RIDGES).round().astype(int)]
    colour = colours(list(drawn))
    figure = Figure((SIZE[0], max(SIZE[1], 0.9 + 0.5 * len(strengths))), layout="constrained")
    axes = figure.add_subplot()
    shape = _density(natural) if len(natural) > 1 else None
    for k, s in enumerate(strengths):
        base, values = len(strengths) - 1 - k, drawn[s]
        if shape is not None:
            tops = base + 0.8 * shape[0] / shape[0].max()
            axes.stairs(tops, shape[1], baseline=base, fill=True, color=THEME["natural"])
        heights, edges = _density(values)
        heights = base + 0.8 * heights / heights.max()
        axes.stairs(heights, edges, baseline=base, fill=True, color=colour[s], alpha=0.35)
        axes.stairs(heights, edges, baseline=base, color=colour[s], lw=1.1)
        ticks = _spread(values, TICKS)
        axes.plot(ticks, np.full(len(ticks), base - 0.07), "|", color=colour[s], ms=4, mew=0.7, alpha=0.7)
        axes.plot([values.mean()] * 2, [base - 0.14, base + 0.82], color=colour[s], lw=1.4)
    axes.set_yticks(range(len(strengths)), [f"s = {number(s, 4)}" for s in reversed(strengths)])
    axes.tick_params(axis="y", length=0, labelcolor=THEME["ink"])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.25, len(strengths))
    axes.set_xlabel(_axis(run))
    return figure


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """The values, of more than `most` so many, evenly spaced in their order from the least to the greatest."""
    if len(values) <= most:
        return values
    return np.sort(values)[np.linspace(0, len(values) - 1, most).round().astype(int)]


def _density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights and edges; bins grow with the cube root of n, as a histogram's error asks."""
    bins = int(np.clip(2.5 * len(values) ** (1 / 3), 4, 40))
    middle, reach = values.mean(), np.ptp(values) or 1.0
    span = (values.min(), values.max()) if np.ptp(values) else (middle - reach / 20, middle + reach / 20)
    return np.histogram(values, bins=bins, range=span, density=True)


@_styled
def guidance_norm(run: UnitRun) -> Figure | None:
    """Above, the norm of the guidance and, below, nats a step, against log-SNR: median and 10 to 90 %.

    The chain runs from left (noise) to right (image). None where no step of a strength above 0 was recorded.
    """
    steps = run.steps.filter(pa.compute.not_equal(run.steps["strength"], 0.0))
    if not steps.num_rows:
        return None
    nats = steps["path_kl_step"].null_count < steps.num_rows
    figure = Figure(SIZE, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1 + nats, 1, sharex=True))
    columns = {
        name: steps[name].cast(pa.float64()).to_numpy()
        for name in ("strength", "step", "log_snr", "guidance_norm", "path_kl_step")
    }
    colour = colours(run.samples["strength"].to_pylist())
    for s in np.unique(columns["strength"]):
        of = columns["strength"] == s
        for axes, name in zip(panels, ("guidance_norm", "path_kl_step")):
            x, low, middle, high = _quantiles(*(columns[c][of] for c in ("step", "log_snr", name)))
            axes.fill_between(x, low, high, color=colour[s], alpha=0.18, lw=0)
            axes.plot(x, middle, color=colour[s], lw=1.3, label=f"s = {number(s, 4)}")
    for axes, label in zip(panels, ("guidance norm", "nats a step")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    panels[0].legend(loc="best", fontsize=8, handlelength=1.2, labelspacing=0.25)
    panels[-1].set_xlabel("log-SNR: noise to image")
    return figure


def _quantiles(step: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(4, steps): log-SNR and the 10, 50 and 90 % quantiles of y over the samples, by step."""
    keep = np.isfinite(x) & np.isfinite(y)
    step, x, y = step[keep], x[keep], y[keep]
    rows = [(x[step == k][0], *np.quantile(y[step == k], (0.1, 0.5, 0.9))) for k in np.unique(step)]
    return np.array(rows).reshape(-1, 4).T


def svg(figure: Figure, name: str, label: str) -> str:
    """An <svg> element for a page: colours are CSS variables, ids begin with `name`, text is text."""
    buffer = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'xlink:href="#', 'href="#', text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head = rf'<svg \1 role="img" aria-label="{label}">'
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', head, text, count=1)
    for variable, colour in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text
