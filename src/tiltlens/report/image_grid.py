"""Samples as a picture: seeds are columns, strengths are rows, and a column starts from the same noise."""

from base64 import b64encode
from collections.abc import Hashable, Sequence
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

    Particles that left the output are not shown; the others are dealt (`dealt`) and numbered from 0, for a column of
    theirs has no noise in common.
    """
    by_strength: dict[float, dict[int, str | None]] = {}
    columns = (run.samples[name].to_pylist() for name in ("strength", "seed", "image"))
    groups = run.samples["group"].to_pylist() if run.in_groups else [None] * run.samples.num_rows
    survivors: dict[float, list[tuple[int | None, str]]] = {}
    for strength, seed, name, copies, group in zip(*columns, run.copies, groups):
        if name is None or not copies:
            continue
        if run.in_groups:
            survivors.setdefault(strength, []).append((group, name))
        else:
            by_strength.setdefault(strength, {})[seed] = name
    for strength, members in survivors.items():
        order = dealt([group for group, _ in members])
        by_strength[strength] = {k: members[i][1] for k, i in enumerate(order)}
    seeds = sorted({seed for row in by_strength.values() for seed in row})
    return seeds, {s: {seed: by_strength[s].get(seed) for seed in seeds} for s in sorted(by_strength)}


def dealt(groups: Sequence[Hashable]) -> list[int]:
    """An order of particles in which the first k, for any k, come from all groups alike and from far apart in each.

    groups: of each particle. Neighbours in a group are often copies of one ancestor (systematic resampling keeps the
    order), and a row of the first few would show one family of one group; so a group is read in the bit-reversed order
    of van der Corput, and the groups take turns.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    turns = []
    for place, rows in enumerate(members.values()):
        bits = max(1, (len(rows) - 1).bit_length())
        spread = sorted(range(len(rows)), key=lambda k, bits=bits: int(f"{k:0{bits}b}"[::-1], 2))
        turns += [(turn, place, rows[k]) for turn, k in enumerate(spread)]
    return [row for _, _, row in sorted(turns)]


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
