"""The tuning of the benchmarks: a strength of a shift near the one that is asked for, whatever the law between them."""

import runpy
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

GUIDANCE = Path(__file__).parents[1] / "benchmarks" / "guidance.py"


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.3])
def test_a_strength_is_found_from_nothing(scale, power):
    """shift = scale s^power: within 15 % of the shift, from a strength to begin with; and from points that are there."""
    bench_of = runpy.run_path(str(GUIDANCE), run_name="loaded")["Bench"]

    class Bench(bench_of):
        def __init__(self):
            self.asked = Namespace(tuning=4)

        def run(self, sampler, unit, strength, first, n, what):
            return {"z": np.full(n, scale * strength**power), "finite": np.ones(n, bool)}

        def twins(self, sampler, unit, first, n):
            return {"z": np.zeros(n)}

    for begin in (0.3, 1.0):
        found = Bench().tune(None, 0, 1.0, [], "it", begin)
        assert scale * found**power == pytest.approx(1.0, rel=0.15)
    known = [(0.0, np.log(scale))]
    assert scale * Bench().tune(None, 0, 2.0, known, "it") ** power == pytest.approx(2.0, rel=0.15)
