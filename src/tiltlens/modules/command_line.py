"""What the two command lines share: exit status 2 and one clear message for a user's error.

`run(main)` is the outermost call of train.py and sample.py. An error that can be put right by whoever typed
the command (a wrong key, a missing folder, a value out of range) is told in one message; anything else is a
fault of this program and keeps its traceback.
"""

import difflib
import re
import sys
from collections.abc import Callable

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ArgumentError,
    MisconfigurationException,  # Lightning's word for trainer settings that cannot be met
)


def run(main: Callable[[], object]) -> None:
    """Calls main; exits with 2 and one message on stderr for a user's error, with 130 for an interrupt."""
    try:
        main()
    except USER_ERRORS as error:
        print(f"error: {_text(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
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
    return "\n".join(line.strip().removeprefix("- ") for line in lines if not line.strip().startswith(NOISE))


def near_names(name: str, known: list[str], n: int = 3) -> str:
    """A sentence for error messages: the known names nearest to a name, or all of a short list, or ''."""
    near = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if not near:  # too few letters of "learning" are in "learning_rate": the start of a last part counts too
        near = [k for k in known if k.split(".")[-1].startswith(name.split(".")[-1])][:n]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(known)}." if 0 < len(known) <= 12 else ""


UNKNOWN_KEY = re.compile(r"(?:unrecognized arguments: --|does not accept option '|Option ')([\w.]+)")


def explain(message: str, known: list[str]) -> str:
    """Adds near names to jsonargparse's words about an unknown key; known: every key of the parser."""
    message = plain(message).rstrip()
    found = UNKNOWN_KEY.search(message)
    return f"{message}. {near_names(found[1], known)}".rstrip() if found else message
