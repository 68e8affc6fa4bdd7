"""What a run found out besides its curve, in words: the certificate of a constraint, and what guidance learned."""

from tiltlens.report.digits import number, plus_minus

FIELDS = (
    "kind",
    "status",
    "law",
    "target",
    "strength",
    "value",
    "value_se",
    "kl",
    "kl_se",
    "kl_least",
    "kl_most",
)
LAWS = {"q_s": "the ideal law q_s", "sampled": "the sampled law, not q_s"}


def certificate(found: dict | None) -> list[tuple[str, str]]:
    """(name, value) of all that is known of a constraint, as in summary.json; nothing without one."""
    if not found:
        return []
    found = dict.fromkeys(FIELDS) | {"reach": (None, None)} | found
    unit = "nats" if found["kind"] == "kl" else "mean activation"
    low, high = found["reach"]
    told = [
        ("status", found["status"]),
        ("certified", LAWS.get(found["law"], "–")),
        (f"target, {unit}", number(found["target"])),
        (f"reached, {unit}", plus_minus(found["value"], found["value_se"])),
        ("strength", number(found["strength"], 6)),
        ("KL(q_s‖p), nats", plus_minus(found["kl"], found["kl_se"])),
        ("least KL of any law with that mean", number(found["kl_least"])),
        ("KL at most", number(found["kl_most"])),
        (f"reachable, {unit}", "–" if low is None else f"{number(low)} to {number(high)}"),
    ]
    return [(name, value) for name, value in told if value != "–"]


def learned(found: dict | None) -> str | None:
    """What `Learned` guidance took from its pilot: efficiency and gap of linear response, before and after; what the
    control of `Amortised` was trained for."""
    if not found:
        return None
    if "adapter" in found:
        control = found["adapter"]
        return (
            f"Guided by a control ({control['kind']}) that was trained at strength {number(control['strength'])} on a chain of "
            f"{control['chain']['steps']} steps; at other strengths it is scaled."
        )
    start = f"Guidance learned from {found['pilot']} pilot trajectories"
    if found["gap_before"][0] is None:
        return f"{start}: none was run again, so it is the default."
    kept = {
        "default": "nothing better than the default",
        "multipliers": "multipliers",
        "head": "multipliers and a head",
    }
    gap, efficiency = (
        " → ".join(plus_minus(*found[f"{name}_{when}"]) for when in ("before", "after"))
        for name in ("gap", "efficiency")
    )
    return (
        f"{start} ({found['shadows']} run again): {kept.get(found['learned'], found['learned'])}. Gap, as a share of the tilt’s own "
        f"KL, before → after: {gap}; KL efficiency {efficiency} (both of linear response, on the pilot)."
    )
