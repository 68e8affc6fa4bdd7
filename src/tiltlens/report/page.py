"""DIR/report.html: the pictures, the answer, the figures, the table, and where it all came from."""

from io import BytesIO
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from tiltlens.report import answers, columns, figures, image_grid
from tiltlens.report.digits import number
from tiltlens.report.findings import certificate, learned
from tiltlens.report.provenance import brief, provenance
from tiltlens.report.unit_run import UnitRun, read_units
from tiltlens.run_folder import RunFolder

HERE = Path(__file__).parent
FIRST, MOST = 8, 32  # seeds of a unit that are seen at once, and that the page holds
FRONTIER = (
    " The line through the left ends is the frontier. A dot is the ideal law of a strength: far below its bar, guidance "
    "tilted more than was asked."
)
DOTTED = " Dotted: z²/2, the frontier of a unit whose natural activation is Gaussian."
ATLAS = 4  # units; a page of more holds only the first seeds of each, to stay a few megabytes
STRIP = 4  # images of a unit in the index

FIGURES = (
    (
        figures.frontier,
        "Activation against distance",
        "Mean activation and KL from p, whiskers and band one standard error. The law that was sampled lies within the bar: its "
        "left end is the least that any law pays for the same mean energy, its right end the most that was "
        "paid (a triangle: not known); the shorter the bar, the less was wasted.",
    ),
    (
        figures.histogram,
        "Activation, natural and tilted",
        "Each row is a strength: in colour the activations of its samples, a tick each and a line at their "
        "mean; in grey the natural ones; each shape fills its row.",
    ),
    (
        figures.guidance_norm,
        "Where the guidance acts",
        "How hard each step was steered, and how many nats it spent, from noise (left) to image (right): "
        "median over the samples, shaded from 10 to 90 %.",
    ),
)


def write_report(folder: RunFolder | str | Path) -> Path:
    """Write DIR/report.html, and DIR/grid_{slug}.png for each unit with images; the path of the page.

    Raises ValueError if the folder holds no samples and no curve.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    runs = read_units(folder)
    if not runs:
        raise ValueError(f"{folder.path} holds no samples and no curve: there is nothing to report yet")
    for run in runs.values():
        picture = image_grid.draw(folder, run)
        if picture is not None:
            buffer = BytesIO()
            picture.save(buffer, "PNG")
            folder.write(f"grid_{run.slug}.png", buffer.getvalue())
    return folder.write("report.html", _render(folder, runs))


def _render(folder: RunFolder, runs: dict[str, UnitRun]) -> str:
    manifest = folder.read_manifest()
    config = folder.path / "config.yaml"
    constraints = folder.read_summary().get("constraint", {})
    told = [entry.get("from") for entry in folder.read_summary()["natural"].values()]
    used = {column.key for run in runs.values() for column in columns.split(run)[0]}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((HERE / "page.html").read_text("utf-8")).render(
        css=Markup((HERE / "page.css").read_text("utf-8")),
        folder=folder.path.resolve().name,
        subject=brief(manifest),
        units=[
            _unit(folder, run, MOST if len(runs) <= ATLAS else FIRST, constraints.get(run.unit) or {})
            | {"constraint": constraints.get(run.unit)}
            | {"certificate": certificate(constraints.get(run.unit))}
            | {"learned": learned(manifest.get("learned", {}).get(run.unit))}
            for run in runs.values()
        ],
        warnings=answers.find_warnings(folder, runs),
        standard=sorted({str(source) for source in told if source not in (None, "pilot", "none")}),
        legend=[column for column in columns.COLUMNS if column.key in used],
        provenance=provenance(manifest),
        config=config.read_text("utf-8") if config.exists() else None,
    )


def _unit(folder: RunFolder, run: UnitRun, most: int, constraint: dict) -> dict:
    """What the template shows of a unit, with at most so many seeds. constraint: its entry of summary.json, if any."""
    seeds, rows = image_grid.cells(run)
    parts = [part for part in (seeds[:FIRST], seeds[FIRST:most]) if part]
    blocks = [
        {"seeds": part, "rows": _image_rows(folder, run, rows, part), "particles": run.in_groups}
        for part in parts
    ]
    has, has_not = columns.split(run)
    colour = _colours(run)
    linear = FRONTIER + (DOTTED if run.scale == "z" else "") if run.linear else ""
    drawn = [
        (draw(run), draw.__name__, title, text + (linear if draw is figures.frontier else ""))
        for draw, title, text in FIGURES
    ]
    return {
        "address": run.unit,
        "slug": run.slug,
        "answer": answers.answer(run, constraint.get("strength")),
        "blocks": blocks,
        "strip": [image for image in blocks[0]["rows"][-1]["images"] if image][:STRIP] if blocks else [],
        "particles": run.in_groups,
        "seeds": len(seeds),
        "shown": min(len(seeds), most),
        "figures": [
            {"svg": Markup(figures.svg(figure, f"{run.slug}-{name}", title)), "title": title, "text": text}
            for figure, name, title, text in drawn
            if figure is not None
        ],
        "columns": has,
        "missing": [column.heading for column in has_not if column.key != "z_mean"],
        "rows": [{"colour": colour[row["strength"]], "values": row} for row in run.curve],
    }


def _image_rows(folder: RunFolder, run: UnitRun, rows: dict, seeds: list[int]) -> list[dict]:
    """A row a strength: its label, and its images with what is said of each on hovering."""
    named = zip(*(run.samples[name].to_pylist() for name in ("image", "seed", run.scale)), run.copies)
    of = {name: (seed, value, copies) for name, seed, value, copies in named}
    colour, curve = _colours(run), {row["strength"]: row for row in run.curve}
    unit = "z" if run.scale == "z" else "activation"
    out = []
    for strength, names in rows.items():
        row, label = curve[strength], number(strength, 6)
        images = [
            names[seed]
            and {
                "src": image_grid.data_uri(folder.path / names[seed]),
                "title": _title(label, unit, *of[names[seed]]),
            }
            for seed in seeds
        ]
        mean = f"{unit} {number(row[f'{run.scale}_mean'], 2)}"
        nats = answers.nats(row) if strength else ""
        out.append(
            {"strength": label, "colour": colour[strength], "mean": mean, "nats": nats, "images": images}
        )
    return out


def _title(strength: str, unit: str, seed: int, value: float, copies: int) -> str:
    more = f", {copies} copies" if copies > 1 else ""
    return f"strength {strength}, seed {seed}: {unit} {number(value)}{more}"


def _colours(run: UnitRun) -> dict[float, str]:
    """The figures' colours as CSS."""
    names = {value: f"var(--{name})" for name, value in figures.THEME.items()}
    chosen = figures.colours([row["strength"] for row in run.curve])
    return {strength: names.get(colour, colour) for strength, colour in chosen.items()}
