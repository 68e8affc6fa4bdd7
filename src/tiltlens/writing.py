"""Files and folders that appear whole or not at all: written beside their place, then renamed.

A kill leaves what was there before; so does a full disk, and what was begun is taken away again.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tiltlens.errors import UserError

DISK_ERRORS = (OSError, SafetensorError)  # what writing raises
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OS_ERROR = re.compile(r"os error (\d+)")  # safetensors tells it in words alone


def no_room(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on the size of files was full."""
    told = OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    return (int(told[1]) if told else getattr(error, "errno", None)) in NO_ROOM


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; several processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, by one process alone. Raises UserError where it cannot be written."""
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    try:
        if old.exists() and not folder.exists():  # a kill between the two renames below
            old.rename(folder)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except DISK_ERRORS as error:
        kept = "; the one of before is whole" if folder.exists() else ""
        raise UserError(
            f"{folder} could not be written ({error}): make room{kept}. The same command with --ckpt_path last writes it"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
