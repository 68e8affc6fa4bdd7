"""Teaches a reader what guidance pays for: how it responds to the noise of each step, along the prior's own trajectories.

The step t -> r draws noise z. By the reader r, guidance would shift its mean, in units of the step's noise, by y = v^-1 c sigma_t^2/alpha_t J^T grad r(x0_hat),
J = dx0_hat/dx_t (`tiltlens.sampling.responses`). With d = y.z, a shift kappa y earns to first order in the strength, of Var a,

    2 kappa E[(a(x_0) - r) d] - kappa^2 E[d^2],     at the best kappa:  E[(a - r) d]^2 / E[d^2]

and with both means summed over the steps this is the KL efficiency in linear response, of steering at these levels alone: for the exact reader and short
steps the share of Var a that is decided there. The loss is what is paid less what is earned, kappa held fixed at each level's best. A regression of values alone bounds the error of r; an error that is small but varies from step to step costs little there, and nats here. No gradient of the encoder is
needed, nor that x_0 | x_t be Gaussian.

a(x_0) is news of all the steps from t on, of which this one's is a small part. What the later steps drew is known, and E[d_k | x_k] = 0 at each of
them, of any reader that has not seen these z, so that

    E[(a(x_0) - r - sum_{k later} kappa_k d_k) d] = E[(a(x_0) - r) d]

with the less noise the better the reader is already (a control variate).
"""

from collections.abc import Callable

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from tiltlens.modules.noise_aware_task import UnitTask
from tiltlens.modules.noise_levels import LevelMeans
from tiltlens.modules.own_samples import Paths

Read = Callable[[Tensor], Tensor]

STEP = 0.5  # of a step's own response, to either side: central differences of the reader
KEEP = 0.995  # of a running gain and cost, a training step
LEAST, MOST = 0.1, 1.5  # kappa
LOOK = 4000  # training steps, after which what later steps tell is read anew
ROWS = 128
COLUMNS = 64


class Responses(nn.Module):
    """The loss of the responses of a task's reader along paths, and what it takes: kappa by noise level, a running mean, and what later steps
    tell of each row that is trained on, as the reader had it at the step `looked`. low, high: of log-SNR; units: so many."""

    def __init__(self, low: float, high: float, units: int):
        super().__init__()
        self.gain = LevelMeans(low, high, units, 0.0)
        self.cost = LevelMeans(low, high, units, 1e-4)
        self.later: Tensor | None = None
        self.looked: int | None = None

    def kappa(self, log_snr: Tensor) -> Tensor:
        """The factor of the reader's gradient that earns most at these levels (R, units)."""
        return (self.gain.at(log_snr) / self.cost.at(log_snr).clamp_min(1e-8)).clamp(LEAST, MOST)

    def loss(self, residual: Tensor, d: Tensor, log_snr: Tensor) -> Tensor:
        """`response_loss` (R, units), by the kappa of the batches before; this one is followed."""
        kappa = self.kappa(log_snr)
        self.gain.follow((residual * d).detach(), log_snr, 1 - KEEP)
        self.cost.follow(d.detach().square(), log_snr, 1 - KEEP)
        return response_loss(residual, d, kappa)

    @torch.no_grad()
    def look_ahead(self, step: int, task: UnitTask, paths: Paths, samples: int, log_snr: Tensor) -> None:
        """What later steps tell, of the rows of the first samples, by the reader as it is now; once in LOOK training steps. Of a mirrored row it
        is taken to be the same: it need not be right to be no news. log_snr: of the table's steps."""
        if self.looked == (due := step - step % LOOK):
            return
        rows = range(paths.below(samples))
        rank_zero_info(f"own trajectories: {len(rows)} rows are read for what their later steps tell")
        residual, d, level = responded(task, paths, rows, log_snr)
        self.later = torch.zeros_like(d)
        for _ in range(2):  # kappa, for what is taken off, and kappa of what is left
            self.gain.follow((residual - self.later) * d, level, 1.0)
            self.cost.follow(d.square(), level, 1.0)
            self.later = later(paths, 0, self.kappa(level) * d)
        self.later = self.later.half()  # of a thousand units it is as much as the trajectories
        self.looked = due


def respond(
    task: UnitTask, x0_hat: Tensor, moved: Tensor, log_snr: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """a - r, r the mean of both ends, and d (R, units), in the reader's units. x0_hat, moved (R, *shape), log_snr (R,), targets (R, units) raw."""
    ends = torch.cat([x0_hat + STEP * moved, x0_hat - STEP * moved])
    up, down = task.reader(task.decode(ends), torch.cat([log_snr, log_snr])).float().chunk(2)
    return (targets - task.reader.mean) / task.reader.std - (up + down) / 2, (up - down) / (2 * STEP)


def response_loss(residual: Tensor, d: Tensor, kappa: Tensor) -> Tensor:
    """kappa^2 d^2 - 2 kappa (a - r) d (R, units), the residual as it is: the mean of d given x_t is 0."""
    return kappa.square() * d.square() - 2 * kappa * residual.detach() * d


def later(paths: Paths, first: int, told: Tensor) -> Tensor:
    """(R, units): the sum of `told` (R, units) over the later rows of each row's own sample. Rows first, first + 1, ... of the paths, whole samples."""
    sample = paths.sample[first : first + len(told)]
    last = torch.searchsorted(sample, sample, right=True) - 1
    found = []
    for part in told.split(COLUMNS, 1):  # of many units twice as many bytes as these have
        total = part.double().cumsum(0)
        found.append((total[last.to(told.device)] - total).float())
    return torch.cat(found, 1)


@torch.no_grad()
def responded(task: UnitTask, paths: Paths, rows: range, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`respond` (R, units) twice, of these rows of the paths, and their log-SNR (R,). log_snr: of the table's steps."""
    found = []
    for which in torch.arange(rows.start, rows.stop).split(ROWS):
        plain = torch.zeros(len(which), dtype=torch.bool)
        x0_hat, moved = paths.rows(which, plain, task.reader.mean)
        level = log_snr[paths.t[which]].to(x0_hat)
        targets = task.targets(x0_hat, paths.sample[which], plain)
        found.append((*respond(task, x0_hat, moved, level, targets), level))
    return tuple(torch.cat(x) for x in zip(*found))


def earned(task: UnitTask, paths: Paths, first: int, log_snr: Tensor, kappa: Read) -> Tensor:
    """(units,): the share of Var a that the reader's gradient earns along the paths of samples first.., at one factor for all steps. kappa:
    log-SNR (R,) -> (R, units), of what later steps tell."""
    rows, count = range(paths.below(first), len(paths.t)), len(paths.x_0) - first
    residual, d, level = responded(task, paths, rows, log_snr)
    residual = residual - later(paths, rows.start, kappa(level) * d)
    gain, cost = (residual * d).sum(0) / count, d.square().sum(0) / count
    own = torch.arange(len(paths.x_0))  # of all: one alone may be held out, and has no variance
    a = task.targets(task.reader.mean.new_zeros(len(own), 1), own, torch.zeros_like(own, dtype=torch.bool))
    variance = (a / task.reader.std).var(0, correction=0)
    return gain.clamp_min(0).square() / (cost * variance).clamp_min(1e-12)
