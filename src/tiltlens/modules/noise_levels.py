"""Running means by noise level."""

import torch
from torch import Tensor, nn

BINS = 12


class LevelMeans(nn.Module):
    """Means of `columns` numbers in BINS bins of equal width of log-SNR between low and high; beyond, those of the outermost. start: before any is followed."""

    def __init__(self, low: float, high: float, columns: int, start: float):
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("mean", torch.full((BINS, columns), start))

    def at(self, log_snr: Tensor) -> Tensor:
        """The means (R, columns) at log-SNR (R,)."""
        return self.mean[self._bins(log_snr)]

    @torch.no_grad()
    def follow(self, values: Tensor, log_snr: Tensor, share: float) -> None:
        """Moves the mean of each bin that has one of the values (R, columns) by this share of the way to theirs; 1 forgets what was before."""
        bins = self._bins(log_snr)
        for b in bins.unique():
            self.mean[b].lerp_(values[bins == b].mean(0), share)

    def _bins(self, log_snr: Tensor) -> Tensor:
        return ((log_snr - self.low) / (self.high - self.low) * BINS).long().clamp(0, BINS - 1)
