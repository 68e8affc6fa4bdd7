"""One run at a time in a folder: a lock of the system's, on DIR/.lock, which ends with the process, however that ends."""

import errno
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from tiltlens.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not kept apart there
    fcntl = None

LOCK = ".lock"
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def writing(folder: Path):
    """Raises UserError for a folder that does not take files."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"the run folder {folder} cannot be written: {error.strerror} ({error.filename}). Choose another --out"
        ) from error


class RunLock:
    """Of one folder. Where a file system has no locks, there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held, self._descriptor, self._made = 0, None, False

    def take(self) -> None:
        """Keep every other run out until it is given up; may be nested. Raises UserError where another run has the folder, or
        where it cannot be written."""
        self._held += 1
        if self._held > 1 or fcntl is None:
            return
        try:
            self._descriptor = self._locked()
        except BaseException:
            self.give_up()
            raise

    def _locked(self) -> int:
        """The descriptor of DIR/.lock."""
        name = self.folder / LOCK
        while True:
            with writing(self.folder):
                self._made = self._made or not self.folder.exists()
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                self._made = False
                raise UserError(
                    f"another run is writing {self.folder}: expected a folder that no run is writing. Wait until it ends, or "
                    "choose another --out"
                ) from None
            except OSError:  # a file system without locks
                return descriptor
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)  # the run that had it took it away between the two calls above

    def give_up(self) -> None:
        """Let other runs in; a folder that was made for the lock alone is taken away."""
        self._held = max(self._held - 1, 0)
        if self._held:
            return
        if self._descriptor is not None:
            with suppress(OSError):  # before it is given up: nobody else's is taken away
                (self.folder / LOCK).unlink()
            os.close(self._descriptor)
        if self._made:
            with suppress(OSError):  # it holds something by now
                self.folder.rmdir()
        self._descriptor, self._made = None, False
