"""A learned twist: a linear head on the denoiser's own features, step by step.

Where the clean estimate cannot be read, x_t itself may tell more of a(x_0): the residual of the pilot's regression is
regressed, by ridge, on features phi(x_t) that the same forward of the denoiser makes (see `Denoiser.with_features`),

    a(x_0) - c_t - rho_t u_t  =  w_t.phi(x_t) + o_t + residual,     log psi_t = log tilt of N(c_t + rho_t u_t + w_t.phi + o_t, r_t^2).

What is left over is not equally wide everywhere. Asked for, a second head regresses the square of the cross-validated residual
on the same features: r_t^2 (1 + v_t.phi + q_t), within a factor of 4 of r_t^2.

phi is standardised step by step and rows are pooled with two steps on either side. The penalty is chosen by
cross-validation over trajectories, and a step whose residual does not fall by it has no head: w_t = 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

POOLED_STEPS = 2
FOLDS = 4
PENALTIES = torch.logspace(-2, 2, 9, dtype=torch.float64)  # in units of the number of rows
PAYS = 0.01  # the share of the residual variance that a head must take
KEPT_ABOVE = 2.0  # standard errors of that share
WIDEST = 4.0  # times r_t^2, or a part of it: a line knows no bounds


@dataclass(frozen=True)
class Heads:
    """weight (units, steps, F), offset (units, steps); gain (units, steps): the share of the residual's variance that the
    head takes, cross-validated, 0 where there is none. fold_weight, fold_offset: the same, a fold first, each fitted
    without the trajectories of `fold_of`."""

    weight: Tensor
    offset: Tensor
    gain: Tensor
    fold_weight: Tensor
    fold_offset: Tensor

    def without(self, steps: Tensor) -> "Heads":
        """No head at these steps (steps,) bool."""
        keep = (~steps).double()
        along = keep[:, None]
        return Heads(
            self.weight * along, self.offset * keep, self.gain * keep,
            self.fold_weight * along, self.fold_offset * keep,
        )  # fmt: skip


def fit_spread(features: Tensor, residual: Tensor, fold: Tensor, heads: Heads | None) -> Heads:
    """The heads of the residual's square, in units of its mean and less 1; arguments as of `fit_heads`. heads: of the mean, those of
    a fold for its trajectories."""
    left = residual.double()
    if heads is not None:
        told = torch.einsum("tpf,putf->utp", features.double(), heads.fold_weight[fold])
        left = left - told - heads.fold_offset[fold].permute(1, 2, 0)
    square = left.square()
    return fit_heads(features, square / square.mean(2, keepdim=True).clamp_min(1e-30) - 1, fold)


def fold_of(trajectories: int) -> Tensor:
    """(P,): the fold of each trajectory."""
    return torch.arange(trajectories) % FOLDS


def fit_heads(features: Tensor, residual: Tensor, fold: Tensor) -> Heads:
    """features (steps, P, F), residual (units, steps, P) of the pilot, its last step left out; fold (P,)."""
    units, steps, count = residual.shape
    width = features.shape[2]
    whole = torch.zeros(FOLDS + 1, units, steps, width, dtype=torch.float64)  # the last: of all trajectories
    offset = torch.zeros(FOLDS + 1, units, steps, dtype=torch.float64)
    gain = torch.zeros(units, steps, dtype=torch.float64)
    grams: dict[int, list[tuple[Tensor, Tensor]]] = {}
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for t in range(steps):
        window = range(max(0, t - POOLED_STEPS), min(steps, t + POOLED_STEPS + 1))
        for s in window:
            if s not in rows:
                x = _standardised(features[s])[0]
                rows[s] = x, residual[:, s].double().T
                grams[s] = [_normal(x[fold == f], rows[s][1][fold == f]) for f in range(FOLDS)]
        for s in [s for s in rows if s < window[0]]:
            del rows[s], grams[s]

        def path(without: int | None, window: range = window) -> Tensor:
            """(penalties, F, units), fitted to the window without one fold."""
            folds = [f for f in range(FOLDS) if f != without]
            gram, moment = (sum(grams[s][f][k] for s in window for f in folds) for k in (0, 1))
            used = count if without is None else int((fold != without).sum())
            return _path(gram, moment, len(window) * used)

        fits = [path(f) for f in range(FOLDS)]
        before = sum(rows[s][1].square() for s in window) / len(window)
        after = torch.zeros(len(PENALTIES), count, units, dtype=torch.float64)
        for x, y in (rows[s] for s in window):
            for f in range(FOLDS):
                mine = fold == f
                after[:, mine] += (y[mine] - x[mine] @ fits[f]).square() / len(window)
        best = after.mean(1).argmin(0)  # (units,)
        fall = before - after[best, :, range(units)].T
        gain[:, t] = fall.mean(0) / before.mean(0).clamp_min(1e-30)
        kept = (gain[:, t] >= PAYS) & (fall.mean(0) > KEPT_ABOVE * fall.std(0) / count**0.5)
        gain[~kept, t] = 0.0
        if not bool(kept.any()):
            continue
        _, mean, std = _standardised(features[t])
        for k, fit in enumerate([*fits, path(None)]):
            w = torch.where(kept, fit[best, :, range(units)].T, 0.0) / std[:, None]
            whole[k, :, t], offset[k, :, t] = w.T, -(mean @ w)
    return Heads(whole[-1], offset[-1], gain, whole[:-1], offset[:-1])


def _standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (P, F) -> standardised, mean, standard deviation (never 0: a feature that does not vary is 0)."""
    x = x.double()
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)
    return (x - mean) / std, mean, std


def _normal(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x, x.T @ y


def _path(gram: Tensor, moment: Tensor, rows: int) -> Tensor:
    """Ridge at every penalty: (penalties, F, units)."""
    values, vectors = torch.linalg.eigh(gram)
    along = vectors.T @ moment
    return torch.stack([vectors @ (along / (values.clamp_min(0) + p * rows)[:, None]) for p in PENALTIES])
