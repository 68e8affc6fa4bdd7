"""The small text grammar under unit addresses: cutting at separators, quoting values, slugs.

A value is written bare where it can be, and as a JSON string in double quotes where it holds a comma, an
equals sign, a bracket, a quote or an operator. Separators inside quotes or [brackets] do not cut.
"""

import hashlib
import json
import re

PROTECTED = r'"(?:\\.|[^"\\])*"|\[[^\]]*\]'
NEEDS_QUOTES = re.compile(r'[,="\\\[\]*]|\s(?:[+-]|versus|and\s+not)\s')
SLUG_LENGTH = 64


def split(text: str, separator: str) -> tuple[list[str], list[str]]:
    """Cut `text` at the regular expression `separator` -> (parts, stripped; the separators found,
    stripped)."""
    parts, found, start = [], [], 0
    for match in re.finditer(f"{PROTECTED}|({separator})", text, re.DOTALL):
        if match.group(1) is not None:
            parts.append(text[start : match.start()].strip())
            found.append(match.group(1).strip())
            start = match.end()
    return [*parts, text[start:].strip()], found


def quote(value: str) -> str:
    """A value as it is written in an address; `unquote` inverts it."""
    bare = value == value.strip() and value.isprintable() and not NEEDS_QUOTES.search(value)
    return value if bare and value else json.dumps(value, ensure_ascii=False)


def unquote(text: str) -> str:
    """Raises ValueError for a quoted value that does not end, or is no JSON string."""
    if not text.startswith('"'):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f'cannot read {text}: expected a value in double quotes, such as "a, b"') from None


def number(value: float) -> str:
    """The shortest decimal that reads back as the same float: 1, 0.7, 1e-05."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """A file name for `text`: "bundled,class=horse" -> "bundled_class-horse". Different texts, different
    slugs.

    Lower-case letters, digits, dots, "_" for commas and "-" for equals signs. Where more than that had to go
    (or the text has "_" or "-" of its own, or is long) eight hex digits of its sha256 follow. Lower case,
    because some file systems do not tell the cases apart.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9.,=]*", text) and len(text) <= SLUG_LENGTH:
        return text.replace(",", "_").replace("=", "-")
    stem = re.sub(r"[^a-z0-9._]+", "-", text.lower().replace(",", "_"))
    if len(stem) > SLUG_LENGTH:  # the ends say most: the encoder, and the unit
        stem = f"{stem[: SLUG_LENGTH // 2]}-{stem[-SLUG_LENGTH // 2 :]}"
    stem = stem.strip("-._")
    return f"{stem}-{short_hash(text)}" if stem else short_hash(text)
