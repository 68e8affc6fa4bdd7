"""The manifest as a reader meets it: what was asked of what, and with which versions."""

import re

from tiltlens.report.digits import number

FINGERPRINT = re.compile(r"\b[0-9a-f]{40,}\b")
ORDER = (
    "state",
    "prior",
    "encoder",
    "noise_aware",
    "units",
    "energy",
    "guidance",
    "schedule",
    "chain",
    "device",
    "git_revision",
    "versions",
)
HEAD = ("prior", "encoder", "energy", "guidance", "chain")  # what stands under the title


def provenance(manifest: dict) -> list[dict]:
    """Sections of the manifest: {"name", "entries": [{"key", "text", "full"}]}; "full" if text is cut."""
    known = [key for key in ORDER if key in manifest]
    names = [*known, *sorted(key for key in manifest if key not in known and key != "identity")]
    names += ["identity"] if "identity" in manifest else []
    return [{"name": name, "entries": list(_entries(manifest[name]))} for name in names]


def _entries(value, at: str = ""):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _entries(item, f"{at}.{key}" if at else str(key))
        return
    full = _text(value)
    text = FINGERPRINT.sub(lambda match: match[0][:12] + "…", full)
    yield {"key": at, "text": text, "full": full if text != full else None}


def _text(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return "–" if value == {} else str(value)


def brief(manifest: dict) -> list[tuple[str, str]]:
    """The few settings that a reader asks for first, each in a few words."""
    told = []
    for name in HEAD:
        value = manifest.get(name)
        if isinstance(value, dict):
            called = value.get("name") or value.get("class")
            simple = [f"{k} {_text(v)}" for k, v in value.items() if isinstance(v, int | float | str)]
            value = called or ", ".join(text for text in simple if not FINGERPRINT.search(text))
        if value:
            told.append((name, FINGERPRINT.sub(lambda match: match[0][:12] + "…", _text(value))))
    return told
