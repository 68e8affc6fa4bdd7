"""How many draws a Markov chain is worth: integrated autocorrelation time, by Geyer's initial sequence.

    tau = 1 + 2 sum_{k >= 1} rho_k,   effective draws = all draws / tau,   Var(mean) = Var / effective

The sums Gamma_m = rho_{2m} + rho_{2m+1} of a reversible chain are positive and fall: they are added up to the first that
is not positive, each no larger than the one before (Geyer, Practical Markov Chain Monte Carlo, 1992).
"""

import numpy as np


def autocorrelation_time(traces: np.ndarray) -> tuple[float, float]:
    """(tau in moves, effective draws) of traces (chains, moves) of one law.

    All chains share one mean, so that chains that disagree, because they are stuck, count as correlated to the end: tau
    then comes near twice the number of moves, and effective near half the number of chains. NaN for an empty trace; a
    trace that never changes its value has tau NaN and effective 0.
    """
    chains, n = traces.shape
    if not traces.size:
        return float("nan"), 0.0
    centred = traces - traces.mean()
    variance = float((centred**2).mean())
    if variance <= 1e-24 * float((traces**2).mean()):
        return float("nan"), 0.0
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(centred, size, axis=1)) ** 2
    rho = np.fft.irfft(spectrum, size, axis=1)[:, :n].mean(0) / (n - np.arange(n)) / variance
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(1) if n > 1 else np.ones(1)
    stop = np.flatnonzero(pairs <= 0)
    positive = np.minimum.accumulate(pairs[: stop[0] if len(stop) else None])
    tau = max(2 * float(positive.sum()) - 1, 1.0)  # a chain is never trusted for more than its moves
    return tau, chains * n / tau
