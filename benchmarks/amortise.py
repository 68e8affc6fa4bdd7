"""What a trained control is worth, next to the training-free twists and to the optimum.

    python benchmarks/amortise.py [--quick]                              the mixture: trains the smoke config, a minute
    python benchmarks/amortise.py --adapter DIR [--pool FILE] [--grid FILE.png]      one unit: an adapter that train.py wrote

gap: path KL + s E_q[E] + log Z, nats above the optimum (0), as the mean of log Z - log w with its standard error. On the
mixture log Z is a closed form; there the chain of few steps costs `Exact` a gap too, which a control of the chain need not pay.
For a unit log Z is that of re-weighted unguided samples (--pool: of the training run, or 512 of its chain), with their ESS.
shift: mean activation against the same seeds unguided, prior standard deviations. kl_lower: the least KL of any law with this mean activation, by the pool, where
its ESS is 30 or more; efficiency: kl_lower / path KL. ESS: of the importance weights, of the samples of a row. Processor
seconds are those of this machine under its present load: compare rows of one run.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from tiltlens.energies import Linear
from tiltlens.guidance import DPS, LGD, MPGD, Amortised, Calibrated, Exact, Guidance, MomentMatched
from tiltlens.guidance.amortised import AdapterConfig
from tiltlens.modules.accelerator import cpu_precision
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.sampling.chain_sampler import Samples
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sample_pool import Pool, run_pool
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank, build_unit

SMOKE = Path(__file__).parent.parent / "configs" / "train" / "amortise-smoke.yaml"
TRUSTED_ESS = 30.0
PILOT = 64


def mixture(samples: int) -> None:
    """The smoke config's prior, unit, chain and strength."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py"]
        start = time.process_time()
        TrainingCLI(["fit", f"--config={SMOKE}", f"--out={folder}", "--trainer.logger=false"])
        seconds = time.process_time() - start
        adapter = Path(folder) / "adapter"
        config = AdapterConfig.read(adapter)
        prior = GaussianMixture([0.7, 0.3], [[-1.0, 0.0], [2.0, 1.0]], [0.5, 0.25])
        unit, s, steps = Projection([1.0, 0.5]), config.strength, config.chain["steps"]
        log_z = float(prior.log_z([1.0, 0.5], s))
        print(f"mixture, s = {s:g}, {steps} steps, {samples} samples a row; log Z = {log_z:.4f}, KL(q_s||p) = "
              f"{prior.kl([1.0, 0.5], s):.4f}; {config.trained['steps']} training steps, {seconds:.0f} s with set-up\n")  # fmt: skip
        print(
            "| guidance | gap | path KL | mean a (optimum %.3f) | E[w]/Z | ESS |"
            % -prior.mean_energy([1.0, 0.5], s)
        )
        print("|---|---|---|---|---|---|")
        for name, guidance in {
            "Exact": Exact(), "DPS": DPS(), "LGD": LGD(), "MPGD": MPGD(), "MomentMatched": MomentMatched(),
            "Calibrated, no memory": Calibrated(memory=0), "Calibrated": Calibrated(), "Amortised": Amortised(str(adapter)),
        }.items():  # fmt: skip
            sampler = Sampler(prior, UnitBank([unit]), Linear(False), guidance, steps)
            sampler.calibrate(sampler.run_pilot(256, 256) if guidance.needs_pilot else None)
            found = sampler.sample([Row(0, s, i) for i in range(samples)])
            w = torch.exp(found.log_w - log_z)
            print(f"| {name} | {pm(log_z - found.log_w, 3)} | {pm(found.path_kl)} | {pm(found.activation)} | {pm(w)} "
                  f"| {ess(found.log_w):.0f} |")  # fmt: skip


class Bench:
    """One unit and chain, those of an adapter."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.config = asked, AdapterConfig.read(asked.adapter)
        self.prior = load_prior(self.config.prior["name"], precision=asked.precision)
        self.bank = UnitBank([build_unit(self.config.unit["name"])])
        sampler = self.sampler(Guidance())
        if asked.pool is not None:
            self.pool = Pool.load(asked.pool)
        else:
            self.pool = run_pool(sampler.chain, self.bank, self.prior.decode, 512, "cpu", torch.float32)
        self.members = [self.pool.members[:, 0, : self.bank.units[0].size]]
        sampler.calibrate(None, self.members)
        n = sampler.constraint.naturals[0]
        self.z = (
            self.bank.units[0].combine((self.members[0] - n.member_mean) / n.member_std) - n.mean
        ) / n.std
        # 64 unguided trajectories for the slopes of Calibrated
        self.pilots = self.sampler(Guidance()).run_pilot(PILOT, PILOT)
        self.seeds = range(asked.seed, asked.seed + asked.samples)
        self.twins = self.run(Guidance(), 0.0)[0]

    def sampler(self, guidance: Guidance) -> Sampler:
        c = self.config.chain
        return Sampler(
            self.prior, self.bank, Linear(), guidance, c["steps"], c["eta"], c["spacing"], c["clip"]
        )

    def run(self, guidance: Guidance, strength: float) -> tuple[Samples, float]:
        """Samples of the seeds, and processor seconds a sample."""
        sampler = self.sampler(guidance)
        sampler.calibrate(self.pilots, self.members)
        start = time.process_time()
        found = sampler.sample([Row(0, strength, i) for i in self.seeds])
        return found, (time.process_time() - start) / len(self.seeds)

    def log_z(self, s: float) -> tuple[float, float]:
        """By the pool, and its ESS."""
        log_w = s * self.z
        return float(log_w.logsumexp(0)) - torch.tensor(float(len(log_w))).log().item(), ess(log_w)

    def kl_lower(self, shift: float) -> tuple[float, bool]:
        """sup_l [l shift - log Z(l)] over trusted l, and whether it lies at the edge of trust."""
        best, edge = 0.0, False
        for l in torch.arange(0.05, 10.0, 0.05).tolist():  # noqa: E741
            log_z, trusted = self.log_z(l)
            if trusted < TRUSTED_ESS:
                break
            value = l * shift - log_z
            best, edge = max(best, value), value > best
        return best, edge

    def row(self, name: str, guidance: Guidance, strength: float) -> Tensor:
        """Prints it; returns the images."""
        found, seconds = self.run(guidance, strength)
        moved = found.z - self.twins.z
        lower, edge = self.kl_lower(float(moved.mean()))
        kl = float(found.path_kl.mean())
        # the twins take the seeds' own luck out of E: the pool's mean of z is 0
        objective = found.path_kl - strength * moved
        log_z, _ = self.log_z(self.config.strength)
        at = self.config.strength
        gap = found.path_kl - at * moved + log_z
        print(f"| {name} | {strength:g} | {pm(moved)} | {pm(found.path_kl)} | {'>= ' if edge else ''}{lower:.2f} "
              f"| {lower / kl:.2f} | {pm(objective)} | {pm(gap)} | {ess(found.log_w):.1f} | {seconds:.2f} |", flush=True)  # fmt: skip
        return found.images


def unit(asked: argparse.Namespace) -> None:
    bench = Bench(asked)
    config, s = bench.config, bench.config.strength
    log_z, trusted = bench.log_z(s)
    c = config.chain
    print(f"{config.unit['name']} ({config.unit['fingerprint'][:12]}), prior {config.prior['name']} "
          f"({config.prior['fingerprint'][:12]}, {asked.precision}); {c['steps']} steps, eta {c['eta']:g}; {len(bench.seeds)} samples a "
          f"row. Pool of {len(bench.z)}: log Z({s:g}) = {log_z:.2f} (ESS {trusted:.0f}). Trained: {config.trained}\n")  # fmt: skip
    print(
        f"| guidance | strength | shift | path KL | kl_lower | efficiency | objective | gap at s = {s:g} | ESS | s/sample |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = [("unguided", bench.twins.images)]
    adapted = Amortised(str(asked.adapter))
    for name, guidance, strengths in [
        ("Amortised", adapted, [s, *asked.scaled]), ("Calibrated", Calibrated(), [s, *asked.calibrated]),
        ("DPS", DPS(), [s, *asked.dps]),
    ]:  # fmt: skip
        for strength in strengths:
            rows.append((f"{name}, s = {strength:g}", bench.row(name, guidance, strength)))
    if asked.grid:
        save_image(torch.cat([x[: asked.columns] for _, x in rows]) / 2 + 0.5, asked.grid, nrow=asked.columns)
        print(f"\n{asked.grid}, rows: {'; '.join(name for name, _ in rows)}")


def pm(x: Tensor, digits: int = 2) -> str:
    return f"{float(x.mean()):.{digits}f} ± {float(x.std()) / len(x) ** 0.5:.{digits}f}"


def ess(log_w: Tensor) -> float:
    return float(1 / log_w.softmax(0).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, help="an adapter folder; without it the mixture")
    parser.add_argument("--pool", type=Path, help="pool-*.safetensors of the training run")
    parser.add_argument("--precision", default=cpu_precision(), help="of the prior's network")
    parser.add_argument(
        "--samples", type=int, default=None, help="a row; default 4096 on the mixture, 64 of a unit"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of a unit's seeds")
    parser.add_argument("--scaled", type=float, nargs="*", default=[], help="further strengths of Amortised")
    parser.add_argument(
        "--calibrated", type=float, nargs="*", default=[], help="further strengths of Calibrated"
    )
    parser.add_argument("--dps", type=float, nargs="*", default=[], help="further strengths of DPS")
    parser.add_argument(
        "--grid", type=Path, help="write a picture: a row of the first seeds for every row of the table"
    )
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument(
        "--quick", action="store_true", help="does it run: few samples; the figures mean nothing"
    )
    asked = parser.parse_args()
    if asked.adapter is None:
        mixture(asked.samples or (256 if asked.quick else 4096))
    else:
        asked.samples = asked.samples or (4 if asked.quick else 64)
        unit(asked)


if __name__ == "__main__":
    main()
