"""What training under Lightning costs: PriorModule with all that a run has / a bare loop on the same model and batch.

    python benchmarks/training_throughput.py [--quick] [--batch 64] [--precision bf16-mixed] [--lora RANK]
        [--compile] [--plain-attention]

The run: the bundled prior under a Trainer with the average of the weights, clipping, the watch on loss and gradient, both
logged, batches cut, mirrored and noised. The bare loop: forward, mean squared error, backward and AdamW's step of a
copy of that network on one batch that was noised beforehand. They take turns of a few steps in one process; what counts
is the median over turns of bare seconds / run seconds, in CPU time of the process (wall time on an accelerator), so that
whatever else the machine does meets both. --compile, --plain-attention: of both.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional

from tiltlens.modules.ema import WarmEMA
from tiltlens.modules.image_data import BatchStream
from tiltlens.modules.prior_module import LoRA, PriorModule
from tiltlens.modules.step_monitor import StepMonitor

GOAL = 0.95
IMAGES = 8192  # of noise: an epoch is longer than the benchmark


class TakeTurns(Callback):
    """After `steps` steps of the run as many bare ones; seconds of both, turn by turn. The first turn warms up."""

    def __init__(self, bare: Callable[[], None], steps: int, clock: Callable[[], float]):
        self.bare, self.steps, self.clock = bare, steps, clock
        self.turns: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: PriorModule) -> None:
        self.since = self.clock()

    def on_train_batch_end(self, trainer: Trainer, pl_module: PriorModule, *_: object) -> None:
        if trainer.global_step % self.steps == 0:
            run, start = self.clock() - self.since, self.clock()
            for _ in range(self.steps):
                self.bare()
            self.turns.append((run, self.clock() - start))
            self.since = self.clock()


def bare_loop(module: PriorModule, batch: int, precision: str, device: torch.device) -> Callable[[], None]:
    """One step of a copy of the module's network on one noised batch."""
    network = copy.deepcopy(module.network).to(device)
    learned = [p for p in network.parameters() if p.requires_grad]
    called = torch.compile(network) if module.compile_step else network
    optimizer = torch.optim.AdamW(learned, module.learning_rate, weight_decay=module.weight_decay)
    size = network.config.sample_size
    x_t, target = torch.randn(2, batch, module.channels, size, size).to(device)
    x_t = x_t.to(memory_format=torch.channels_last)
    t = torch.randint(len(module.loss), (batch,)).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            f = called(x_t, t, return_dict=False)[0]
        loss = functional.mse_loss(f.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--lora", type=int, help="rank of adapters; every weight is trained without")
    parser.add_argument("--compile", action="store_true", help="model.compile true")
    parser.add_argument("--plain-attention", action="store_true", help="model.fused_attention false")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of a turn, of each")
    parser.add_argument("--quick", action="store_true", help="does it run: the figure then means nothing")
    asked = parser.parse_args()
    if asked.quick:
        asked.batch, asked.turns, asked.steps = 4, 2, 1
    torch.manual_seed(0)
    lora = LoRA(asked.lora) if asked.lora else None
    how = {"compile": asked.compile, "fused_attention": not asked.plain_attention}
    module = PriorModule("bundled", lora=lora, warmup=0, decay=0, **how)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    turns = TakeTurns(bare_loop(module, asked.batch, asked.precision, device), asked.steps, clock)
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    stream = BatchStream(images, torch.zeros(IMAGES, dtype=torch.long), asked.batch, 0, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=(asked.turns + 1) * asked.steps, accelerator=device.type, devices=1, gradient_clip_val=1.0,
            precision=asked.precision, callbacks=[WarmEMA(0.999), StepMonitor(), turns], logger=CSVLogger(folder),
            log_every_n_steps=asked.steps, enable_checkpointing=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, stream)
    run, bare = (statistics.median(x) / asked.steps for x in zip(*turns.turns[1:]))
    ratio = statistics.median(b / r for r, b in turns.turns[1:])
    what = "CPU time" if device.type == "cpu" else "wall time"
    print(
        f"training throughput under Lightning / bare loop: {ratio:.3f} (goal >= {GOAL}: "
        f"{'PASS' if ratio >= GOAL else 'FAIL'}); {run * 1e3:.0f} ms / {bare * 1e3:.0f} ms a step of {asked.batch} images, "
        f"{what}, {asked.precision}, {'LoRA' if asked.lora else 'every weight'}"
        f"{', compiled' if asked.compile else ''}{', plain attention' if asked.plain_attention else ''}, median of {asked.turns} turns, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
