"""What a sweep's own consistency says of it, before anything is reported.

log Z is convex with slope -m(s) and m falls with s; log Z >= -(path_kl + l E) for every run; KL(q_s||p) rises
with s. An integral that breaks these, or whose quadrature is as uncertain as its value, is withheld;
importance weights that break them are reported with a warning. Nothing is clipped: that would turn a bound
into an estimate.
"""

import numpy as np

from tiltlens.estimates.bounds import log_z_floor
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.sweep import SIGNIFICANT, Node, Sweep, quadrature_errors

QUADRATURE = 0.1  # of KL: an integral this uncertain, and more than its standard error, is withheld


def audit(
    nodes: list[Node], samples: list[Samples], sweep: Sweep, se: Sweep
) -> tuple[Sweep, Sweep, list[str], list[str]]:
    """Withhold what contradicts itself, and say so: (values, standard errors, a kl_method each (K,),
    warnings).

    The errors of an integral come back with those of its quadrature and of its biased means.
    """
    log_z, kl, log_z_se, kl_se = (x.copy() for x in (sweep.log_z, sweep.kl, se.log_z, se.kl))
    methods = [n.method for n in nodes]
    quadrature = quadrature_errors(nodes, sweep)
    warnings, last = [], 0.0
    for k, node in enumerate(nodes):
        at = f"strength {node.strength:g}:"
        reason = "no run has importance weights for it that are healthy"
        if node.method == "thermodynamic":
            statistical, bias = float(kl_se[k]), node.strength * node.bias
            log_z_se[k], kl_se[k] = (
                np.sqrt(x[k] ** 2 + bias**2 + quadrature[k] ** 2) for x in (log_z_se, kl_se)
            )
            reason = _flaw(
                methods[k - 1], quadrature[k], statistical, kl[k], log_z[k], log_z_se[k], samples, node
            )
            if reason:
                methods[k] = "bounds"
                log_z[k] = log_z_se[k] = np.nan
            else:
                warnings.append(
                    f"{at} log_z and kl are integrated from means of the guided samples, a biased "
                    f"stand-in for m(s); the bias to expect, {node.bias:.2g} in energy, is in their errors."
                )
        if methods[k] == "bounds":
            kl[k] = kl_se[k] = np.nan
            warnings.append(
                f"{at} no kl, only bounds: {reason}; KL(q_s||p) is at least {last:.3g} nats, the most at a "
                f"smaller strength{'' if np.isfinite(log_z[k]) else '; no log_z and no gap either'}."
            )
            continue
        last = max(last, float(kl[k]))
        if k and sweep.energy[k] - sweep.energy[k - 1] > SIGNIFICANT * np.hypot(
            se.energy[k], se.energy[k - 1]
        ):
            warnings.append(
                f"{at} the mean energy m(s) rises with s, which no exact tilt does: do not trust kl."
            )
        if abs(sweep.drift[k]) > SIGNIFICANT * se.drift[k] + quadrature[k]:
            warnings.append(
                f"{at} log Z from weights and from the integral of m(s) differ by {sweep.drift[k]:+.2g} "
                "nats: a mode may be missed, or the sweep is coarse here."
            )
    values = Sweep(log_z, kl, sweep.energy, sweep.drift)
    return values, Sweep(log_z_se, kl_se, se.energy, se.drift), methods, warnings


def _flaw(
    below: str,
    quadrature: float,
    statistical: float,
    kl: float,
    log_z: float,
    log_z_se: float,
    samples: list[Samples],
    node: Node,
) -> str | None:
    """Why an integrated log Z cannot be given; None where it can."""
    if below == "bounds":
        return "the strength below, from which log Z would be integrated, is not known"
    if quadrature > max(statistical, QUADRATURE * abs(kl)):
        return "the sweep is too coarse to integrate m(s), add strengths in between"
    floor, floor_se = log_z_floor(samples, node.strength)
    if log_z + SIGNIFICANT * np.hypot(log_z_se, floor_se) < floor:
        return "the integral of m(s) contradicts log Z >= -(path_kl + s E)"
    return None
