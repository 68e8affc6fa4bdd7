"""What the two command lines share: `--out`, near names, and exit status 2 with one clear message for a user's error.

`run(main)` is the outermost call of train.py and sample.py. An error that can be put right by whoever typed
the command (a wrong key, a missing folder, a value out of range, a full disk) is told in one message; anything else is a
fault of this program and keeps its traceback.
"""

import difflib
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from tiltlens.errors import UserError
from tiltlens.writing import DISK_ERRORS, no_room

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ArgumentError,
    MisconfigurationException,  # Lightning's word for trainer settings that cannot be met
)

# What is wrong with a place, and what to do.
PLACE = {
    errno.EROFS: "Nothing can be written there: choose another place, --out for what the run writes",
    errno.EACCES: "Give yourself leave, or choose another place, --out for what the run writes",
    errno.EPERM: "Give yourself leave, or choose another place, --out for what the run writes",
    errno.ENAMETOOLONG: "Choose a shorter name, --out for what the run writes",
    errno.ELOOP: "A link leads to itself: choose another place",
}


def run(main: Callable[[], object]) -> None:
    """Calls main; exits with 2 and one message on stderr for a user's error, with 130 for an interrupt."""
    try:
        main()
    except USER_ERRORS as error:
        print(f"error: {_text(error)}", file=sys.stderr)
        sys.exit(2)
    except DISK_ERRORS as error:
        if not (no_room(error) or getattr(error, "errno", None) in PLACE):
            raise
        told = ": a disk is full, make room" if no_room(error) else ""
        print(f"error: {_text(error)}{told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        advice = PLACE.get(error.errno)
        return f"{error.strerror}: {error.filename}" + (f". {advice}" if advice else "")
    return plain(str(error)) or type(error).__name__


NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a <class 'NoneType'>",
)


def plain(message: str) -> str:
    """jsonargparse's report on a value of several possible types, without the types that were never meant."""
    lines = message.splitlines()
    if not any(line.strip().startswith(NOISE[0]) for line in lines):
        return message
    lines = [line.strip().removeprefix("- ") for line in lines if not line.strip().startswith(NOISE)]
    # a name would have done as well: that is told where nothing better is
    told = [line for line in lines if not line.startswith("Expected a <class 'str'>")]
    return "\n".join(told if any(not line.startswith("Parser key") for line in told) else lines)


def near_names(name: str, known: list[str], n: int = 3) -> str:
    """A sentence for error messages: the known names nearest to a name, or all of a short list, or ''."""
    near = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if not near:  # too few letters of "learning" are in "learning_rate": the start of a last part counts too
        near = [k for k in known if k.split(".")[-1].startswith(name.split(".")[-1])][:n]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(known)}." if 0 < len(known) <= 12 else ""


UNKNOWN_KEY = re.compile(
    r"(?:unrecognized arguments: --|does not accept option '|Option '|ambiguous option: --)([\w.]+)"
)
AT_KEY = re.compile(r'Parser key "([\w.]+)"')
WRONG_CLASS = re.compile(
    r"(?:dot import path string|Unexpected import path format): (\S+)|class_path '([^']+)'"
)


def explain(message: str, known: list[str], families: dict[str, type] | None = None) -> str:
    """jsonargparse's words about a wrong key or class name, in short and with near names.

    known: every key of the parser. families: the base class of each key that names a class.
    """
    at, bases = AT_KEY.search(message), families or {}
    if at and at[1] in bases and (said := _wrong_class(message, at[1], bases[at[1]])):
        return said
    message = plain(message).rstrip()
    found = UNKNOWN_KEY.search(message)
    if not found:
        return message
    if "ambiguous" in message:
        message = f"unknown key --{found[1]}"
    return f"{message.rstrip('.')}. {near_names(found[1], known)}".rstrip()


def _wrong_class(message: str, key: str, base: type) -> str | None:
    """What is wrong with the class at `key`: its name, or one of its arguments; None if neither."""
    classes = {c.__name__: c for c in _subclasses(base)}
    found = WRONG_CLASS.search(message)
    if not found:
        return None
    name = (found[1] or found[2]).split(".")[-1]
    if name not in classes:
        known = f"Known: {', '.join(sorted(classes))}."
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        return f"{key}: unknown class {name!r}. " + (f"Did you mean {near[0]}? {known}" if near else known)
    option = re.search(r"Option '([\w.]+)' is not accepted", message)
    if option:
        arguments = list(inspect.signature(classes[name]).parameters)
        return f"{key}: {name} has no argument {option[1]!r}. {near_names(option[1], arguments)}".rstrip()
    missing = re.search(r"the following arguments are required: ([\w, ]+)", message)
    return f"{key}: {name} needs {missing[1]}: give --{key}.{missing[1].split(',')[0]}" if missing else None


def _subclasses(base: type) -> list[type]:
    """Every public class below `base` that is imported by now."""
    below = [c for cls in base.__subclasses__() for c in (cls, *_subclasses(cls))]
    return [c for c in below if not c.__name__.startswith("_") and c.__module__.startswith("tiltlens.")]


def check_devices(devices: Any) -> None:
    """Raises UserError for more devices than processors: on a CPU each would be a process of its own."""
    if str(devices).isdigit() and int(devices) > (os.cpu_count() or 1):
        raise UserError(f"trainer.devices = {devices}: this machine has {os.cpu_count()} processors")


class CommandLine(LightningCLI):
    """`--out DIR` (default runs/NAME, NAME the config's stem), and near names for what is unknown.

    modules: by first part of a key, the classes whose constructor arguments are keys; families: as in `explain`.
    """

    modules: ClassVar[dict[str, tuple[type, ...]]] = {}
    families: ClassVar[dict[str, type]] = {}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=Path | None, default=None, help="folder of the run; default runs/NAME"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(explain(str(error), self.known_keys(parser), self.families)) from error

    def known_keys(self, parser: LightningArgumentParser) -> list[str]:
        parsers = list(getattr(self, "_subcommand_parsers", {}).values()) or [parser]
        keys = list(parsers[0].get_defaults().keys())
        keys += [
            f"{k}.{name}"
            for k, all_ in self.modules.items()
            for c in all_
            for name in inspect.signature(c).parameters
        ]
        return sorted(set(keys))

    @property
    def out(self) -> Path:
        """A config.yaml that a run left behind is named by its folder."""
        if asked := self._get(self.config, "out"):
            return Path(asked)
        configs = self._get(self.config, "config") or []
        if not configs:
            return Path("runs") / Path(sys.argv[0] or "run").stem
        path = Path(os.path.abspath(str(configs[0])))
        return Path("runs") / (path.parent.name if path.name == "config.yaml" else path.stem)
