"""Near names: what an error about an unknown name has to offer."""

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str], show: int = 5) -> str:
    """ "near names: a, b" for an unknown name; all names where they are few; "" where there are none.

    A name that contains the unknown one (or the reverse) is near too, whatever its edit distance.
    """
    names = sorted({k for k in known if k})
    if not names:
        return ""
    lower = {n.casefold(): n for n in names}
    found = [lower[m] for m in difflib.get_close_matches(name.casefold(), lower, n=show, cutoff=0.6)]
    if name:
        parts = (n for n in names if name.casefold() in n.casefold() and n not in found)
        found += sorted(parts, key=len)[: show - len(found)]
    if found:
        return "near names: " + ", ".join(found)
    few = names if len(names) <= 12 else [*names[:8], f"… ({len(names)} in all)"]
    return "known names: " + ", ".join(few)
