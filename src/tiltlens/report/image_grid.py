"""Samples as a picture: seeds are columns, strengths are rows, and a column starts from the same noise."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tiltlens.report.digits import number
from tiltlens.report.unit_run import UnitRun, read_units
from tiltlens.run_folder import RunFolder

COLUMNS = 16  # of the PNG; what a README shows
CELL = 128  # pixels, the most: small images are enlarged by a whole factor, large ones reduced to it
SHOWN = 192  # pixels: what the page embeds of a larger image
GAP, MARGIN, LABEL, FONT = 4, 14, 76, 16
PAPER, INK, FAINT = "#ffffff", "#23272b", "#eceef0"


def cells(run: UnitRun) -> tuple[list[int], dict[float, dict[int, str | None]]]:
    """The seeds that have an image, and by strength (0 first, ascending) and seed the name of that image.

    Particles that left the output are not shown; the others are numbered from 0, for a column of theirs has no noise in
    common.
    """
    by_strength: dict[float, dict[int, str]] = {}
    columns = (run.samples[name].to_pylist() for name in ("strength", "seed", "image"))
    for strength, seed, name, copies in zip(*columns, run.copies):
        if name is not None and copies:
            row = by_strength.setdefault(strength, {})
            row[len(row) if run.in_groups else seed] = name
    seeds = sorted({seed for row in by_strength.values() for seed in row})
    return seeds, {s: {seed: by_strength[s].get(seed) for seed in seeds} for s in sorted(by_strength)}


def grid(folder: RunFolder | str | Path, unit: str) -> Image.Image | None:
    """The first 16 seeds of a unit at all strengths, labelled; None if the run has no images.

    Raises ValueError if the folder holds no samples of this unit.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    runs = read_units(folder)
    if unit not in runs:
        raise ValueError(
            f"{folder.path} has no unit {unit!r}; it holds {', '.join(map(repr, runs)) or 'none'}"
        )
    return draw(folder, runs[unit])


def draw(folder: RunFolder, run: UnitRun) -> Image.Image | None:
    """`grid` of a unit that was already read."""
    seeds, rows = cells(run)
    if not seeds:
        return None
    seeds = seeds[:COLUMNS]
    images = {
        (s, seed): _fit(folder.path / row[seed]) for s, row in rows.items() for seed in seeds if row[seed]
    }
    cell = max(max(image.size) for image in images.values())
    font = ImageFont.load_default(FONT)
    left, top, pitch = MARGIN + LABEL, MARGIN + FONT + 10, cell + GAP
    size = (left + len(seeds) * pitch - GAP + MARGIN, top + len(rows) * pitch - GAP + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for i, seed in enumerate(seeds):
        label = f"seed {seed}" if i == 0 and not run.in_groups else str(seed)
        pen.text((left + i * pitch + cell // 2, MARGIN), label, INK, font, anchor="ma")
    for j, strength in enumerate(rows):
        y = top + j * pitch
        label = f"s = {number(strength, 6)}".replace("−", "-")
        pen.text((left - 12, y + cell // 2), label, INK, font, anchor="rm")
        for i, seed in enumerate(seeds):
            x, image = left + i * pitch, images.get((strength, seed))
            if image is None:
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), FAINT)
            else:
                picture.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    return picture


def _fit(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    longest = max(image.size)
    scale = CELL // longest if longest <= CELL else CELL / longest
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def data_uri(path: Path) -> str:
    """An image as the page embeds it: the file itself if it is small, else a JPEG of at most 192 pixels."""
    with Image.open(path) as image:
        if max(image.size) <= SHOWN:
            return f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
        image = image.convert("RGB")
        image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
