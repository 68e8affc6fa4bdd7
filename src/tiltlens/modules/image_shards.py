"""WebDataset shards: tar files in which KEY.jpg (png, webp) and KEY.cls lie side by side.

A tar is a list of headers and bytes. The headers are read once, for a table (shard, key, offset, length,
label) that is kept in the cache; from then on an image is one seek and one read. So shards of any size are
shuffled over the whole set and a run resumes at any batch, which a stream read in order cannot do.
"""

import glob
import hashlib
import io
import re
import tarfile
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tiltlens.errors import UserError
from tiltlens.writing import whole_file

BRACES = re.compile(r"\{([^{}]*)\}")


class ShardSource:
    """Tar shards on disk: paths with {000..010}, {a,b}, * and ?, read in the order of their names.

    label: the integer in KEY.cls, -1 where there is none. Raises UserError where a pattern meets no file and
    for a file that is no uncompressed, whole tar.
    """

    def __init__(self, pattern: str, cache: Path):
        self.shards = find_shards(pattern)
        stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.shards]
        self.fingerprint = hashlib.sha256(f"shards 1 {stats}".encode()).hexdigest()
        cached = cache / f"shards-{self.fingerprint[:24]}.parquet"
        if not cached.is_file():
            table = pa.concat_tables([read_index(k, path) for k, path in enumerate(self.shards)])
            with whole_file(cached) as part:
                pq.write_table(table, part)
        table = pq.read_table(cached)
        if not len(table):
            raise UserError(f"no images in {pattern}: expected members KEY.jpg, KEY.png or KEY.webp")
        self.keys = table["key"]
        self.shard, self.offset, self.length = (table[k].to_numpy() for k in ("shard", "offset", "length"))
        self.labels = torch.from_numpy(table["label"].to_numpy().copy())
        self.class_names = [str(k) for k in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"{self.shards[self.shard[i]].name}/{self.keys[i].as_py()}"

    def open(self, i: int) -> Image.Image:
        with self.shards[self.shard[i]].open("rb") as file:
            file.seek(self.offset[i])
            return Image.open(io.BytesIO(file.read(self.length[i])))


def read_index(number: int, path: Path) -> pa.Table:
    """The images of one shard: shard (its number), key, offset and length in bytes, label."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")  # WebDataset's rule: the key ends at the first dot
                key, ending = f"{folder}/{stem}".lstrip("./"), ending.lower()
                if not member.isfile() or not stem:
                    continue
                if ending in ("jpg", "jpeg", "png", "webp", "bmp"):
                    images[key] = member.offset_data, member.size
                elif ending == "cls":
                    labels[key] = int(tar.extractfile(member).read())
                    if abs(labels[key]) >= 1 << 63:
                        raise ValueError(f"{key} has {labels[key]}, beyond 64 bits")
                tar.members = []  # tarfile keeps every header: a shard of a million files would fill memory
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is no whole, uncompressed tar ({error}): unpack .tar.gz, or fetch the shard again"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: a .cls member is no integer ({error})") from error
    rows = [(number, key, *place, labels.get(key, -1)) for key, place in images.items()]
    types = {"shard": pa.int32(), "key": pa.string(), "offset": pa.int64(), "length": pa.int64()}
    columns = list(zip(*rows)) or [()] * 5
    arrays = [pa.array(c, t) for c, t in zip(columns, [*types.values(), pa.int64()])]
    return pa.table(dict(zip([*types, "label"], arrays)))


def find_shards(pattern: str) -> list[Path]:
    """The files that a pattern names, sorted. Raises UserError where a part of it names none."""
    found = [(p, sorted(glob.glob(p)) if glob.has_magic(p) else [p]) for p in expand_braces(pattern)]
    missing = [p for p, paths in found if not paths or not all(Path(x).is_file() for x in paths)]
    if missing:
        raise UserError(
            f"no shard at {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}: expected tar files on "
            "disk, tar:DIR/part-{000..010}.tar or tar:DIR/*.tar"
        )
    if not found:
        raise UserError(f"{pattern} names no shard: expected {{FIRST..LAST}} with FIRST not above LAST")
    return [Path(x) for x in sorted({x for _, paths in found for x in paths})]


def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" -> a-00.tar, a-01.tar, a-02.tar; "{a,b}" -> a, b; as in a shell."""
    choices = []
    for inside in BRACES.findall(pattern):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        width = len(ends[1]) if ends else 0
        choices.append(
            [f"{k:0{width}d}" for k in range(int(ends[1]), int(ends[2]) + 1)] if ends else inside.split(",")
        )
    blank = BRACES.sub("{}", pattern)
    return [blank.format(*chosen) for chosen in product(*choices)]
