"""Laws of stopping: killed, out of disk or out of numbers, a run goes on from its last whole checkpoint as if nothing had been."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from prior_folders import ddpm, write_pixel

from tiltlens.errors import UserError
from tiltlens.modules import checkpoints
from tiltlens.modules.command_line import run
from tiltlens.modules.image_data import BatchStream, ImageFolderData
from tiltlens.modules.prior_module import LoRA, PriorModule
from tiltlens.modules.sharding import is_sharded
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import load_prior

TRAIN = Path(__file__).parents[1] / "train.py"
SIZE, BATCH, EPOCH = 8, 8, 5  # steps of an epoch


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny prior, images to go on with, and the arguments that both need."""
    root, rng = tmp_path_factory.mktemp("start"), np.random.default_rng(0)
    write_pixel(root / "prior", ddpm("v_prediction"))
    (root / "images").mkdir()
    for k in range(BATCH * EPOCH):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(
            root / "images" / f"{k}.png"
        )
    return root


def arguments(start, out, steps, *more):
    return [
        "fit",
        f"--out={out}",
        "--model=tiltlens.modules.prior_module.PriorModule",
        f"--model.init_from={start / 'prior'}",
        "--model.learning_rate=1e-3",
        "--model.warmup=0",
        "--model.decay=0",
        f"--data.train={start / 'images'}",
        f"--data.val={start / 'images'}",
        f"--data.cache={start / 'cache'}",
        f"--data.size={SIZE}",
        f"--data.batch_size={BATCH}",
        "--trainer.callbacks+=tiltlens.modules.ema.WarmEMA",
        "--trainer.callbacks.decay=0.9",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.max_steps={steps}",
        *more,
    ]


def checkpoint(out):
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


def refused(args, capsys):
    """The one message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: TrainingCLI(args))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error: ") :]


def assert_same(one, two, exactly=True):
    assert one["global_step"] == two["global_step"]
    for key in ("state_dict", "current_model_state"):
        for name, value in one[key].items():
            torch.testing.assert_close(
                two[key][name], value, rtol=0, atol=0 if exactly else 1e-6, msg=f"{key} {name}"
            )
    for a, b in zip(
        one["optimizer_states"][0]["state"].values(), two["optimizer_states"][0]["state"].values()
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(start, tmp_path):
    # A suite that runs in the background of a script ignores SIGINT, and its children would, too.
    victim = subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments(start, tmp_path / "out", 100_000)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        limit = time.monotonic() + 200
        while not (tmp_path / "out" / "checkpoints" / "last.ckpt").exists():
            assert victim.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        victim.send_signal(signal.SIGINT)
        said = victim.communicate(timeout=100)[1]
    finally:
        victim.kill()
    assert victim.returncode == 130, said
    assert "--ckpt_path last goes on" in said
    assert not (tmp_path / "out" / "prior").exists()


def test_killed_and_resumed_is_uninterrupted(start, tmp_path):
    """kill -9 at any moment after the first checkpoint; the same command with --ckpt_path last ends with the same bits."""
    lora = ("--model.lora.rank=2", "--trainer.accumulate_grad_batches=2")
    steps = 9 * 3  # nine epochs of 2 + 2 + 1 batches
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    TrainingCLI(arguments(start, whole, steps, *lora))
    victim = subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments(start, killed, steps, *lora)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 400
        while not (killed / "checkpoints" / "last.ckpt").exists():
            assert victim.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.005)
        time.sleep(0.05)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert victim.returncode == -signal.SIGKILL
    assert 0 < checkpoint(killed)["global_step"] < steps
    TrainingCLI(arguments(start, killed, steps, *lora, "--ckpt_path=last"))
    assert_same(checkpoint(whole), checkpoint(killed))
    kept = checkpoint(killed)["state_dict"]
    assert all(".lora_" in name for name in kept)  # the prior's own weights are not in the checkpoint
    assert load_prior(str(whole / "prior")).fingerprint == load_prior(str(killed / "prior")).fingerprint


def test_a_full_disk_leaves_the_old_checkpoint(start, tmp_path, capsys):
    TrainingCLI(arguments(start, tmp_path, EPOCH))
    before = checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoints" / "last.ckpt").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        message = refused(arguments(start, tmp_path, 3 * EPOCH, "--ckpt_path=last"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in message
    assert "File too large" in message
    assert "is whole" in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert_same(before, checkpoint(tmp_path))
    TrainingCLI(arguments(start, tmp_path, 2 * EPOCH, "--ckpt_path=last"))
    assert checkpoint(tmp_path)["global_step"] == 2 * EPOCH


def test_a_loss_that_is_no_number_names_its_batch(start, tmp_path, capsys, monkeypatch):
    seeds, names, batches = [], [], BatchStream.__iter__
    data = ImageFolderData(str(start / "images"), str(start / "images"), SIZE, BATCH, cache=start / "cache")
    data.setup()

    def poisoned(self):
        for batch in batches(self):
            if self.position == EPOCH + 3:  # counted from 1: the third of the second epoch
                batch["image"][0, 0, 0, 0] = float("nan")
                seeds.append(batch["seed"])
                names.extend(data.names(batch["rows"].tolist()))
                shown = (data.train_set[0][batch["rows"]].float() / 127.5 - 1)[1:]
                torch.testing.assert_close(batch["image"][1:], shown)
            yield batch

    monkeypatch.setattr(BatchStream, "__iter__", poisoned)
    message = refused(arguments(start, tmp_path, 4 * EPOCH), capsys)
    assert (
        f"loss = nan at batch 2 of epoch 1, seed {seeds[0]} (step {EPOCH + 2}), images {', '.join(names)}: "
        in message
    )
    assert all((start / "images" / name).is_file() for name in names)
    assert "last.ckpt is the last good checkpoint" in message
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == EPOCH
    assert all(torch.isfinite(v).all() for v in saved["current_model_state"].values())


def test_checkpoints_of_something_else_are_refused(start, tmp_path, capsys):
    first = tmp_path / "first"
    TrainingCLI(arguments(start, first, 1, "--model.lora.rank=2"))
    path = f"--ckpt_path={first / 'checkpoints' / 'last.ckpt'}"
    message = refused(arguments(start, tmp_path / "rank", 2, "--model.lora.rank=3", path), capsys)
    assert "another architecture than this PriorModule" in message
    assert "lora_A.default.weight (2, " in message
    assert "instead of (3, " in message
    message = refused(arguments(start, tmp_path / "full", 2, path), capsys)
    assert "missing (network.conv_in.weight" in message
    assert "unknown (network.conv_in.lora_A.default.weight" in message
    other = tmp_path / "other"
    write_pixel(other / "prior", ddpm("v_prediction"))
    prior = load_prior(str(other / "prior")).denoiser.network.network
    prior.conv_in.weight.data.mul_(1.01)
    prior.save_pretrained(other / "prior" / "unet")
    args = [
        a.replace(f"init_from={start}", f"init_from={other}") for a in arguments(start, tmp_path / "o", 2)
    ]
    assert "adapters of another prior" in refused([*args, "--model.lora.rank=2", path], capsys)
    (tmp_path / "torn.ckpt").write_bytes((first / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    args = arguments(start, tmp_path / "t", 2, f"--ckpt_path={tmp_path / 'torn.ckpt'}")
    assert "is no whole checkpoint" in refused(args, capsys)


def test_frozen_weights_are_hashed_once_while_they_are_the_same(start, monkeypatch):
    module, hashed, digest = PriorModule(str(start / "prior"), lora=LoRA(rank=2)), [], checkpoints._digest
    monkeypatch.setattr(checkpoints, "_digest", lambda weights: hashed.append(1) or digest(weights))

    def saved():
        written = {"state_dict": module.state_dict()}
        checkpoints.drop_frozen(module, written)
        return written[checkpoints.BASE]

    first = saved()
    assert saved() == first
    assert len(hashed) == 1
    with torch.no_grad():
        next(p for p in module.parameters() if not p.requires_grad).add_(1)
    assert saved() != first


def test_a_run_is_resumed_as_what_it_was(start, tmp_path, capsys):
    """What shapes do not tell: another schedule, another scale of adapters, an average without what goes on with it."""
    out = tmp_path / "out"
    lora = "--model.lora.rank=2"
    TrainingCLI(arguments(start, out, 1, lora))
    write_pixel(tmp_path / "prior", ddpm("epsilon"))
    args = [a.replace(f"init_from={start}", f"init_from={tmp_path}") for a in arguments(start, out, 2)]
    message = refused([*args, lora, "--ckpt_path=last"], capsys)
    assert "prediction: expected v_prediction (variance-preserving), found epsilon" in message
    message = refused(arguments(start, out, 2, lora, "--model.lora.alpha=8", "--ckpt_path=last"), capsys)
    assert "model.lora.alpha / rank: expected 1.0, found 4.0" in message
    args = [a for a in arguments(start, out, 2) if "callbacks" not in a]
    assert "tiltlens.modules.ema.WarmEMA" in refused([*args, lora, "--ckpt_path=last"], capsys)
    # an older one, which does not say what it is of, and weights alone
    path = out / "checkpoints" / "last.ckpt"
    older = checkpoint(out)
    del older["identity"]
    torch.save(older, path)
    TrainingCLI(arguments(start, out, 2, lora, "--ckpt_path=last"))
    assert checkpoint(out)["global_step"] == 2
    torch.save({k: older[k] for k in ("state_dict", "pytorch-lightning_version")}, path)
    message = refused(arguments(start, out, 2, lora, "--ckpt_path=last"), capsys)
    assert "weights alone: expected a checkpoint to go on from, found no loops" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val = -1"),
        ("--trainer.gradient_clip_val=.inf", "gradient_clip_val = inf"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches = 0"),
        ("--model.lora.targets=[atention]", "did you mean attention"),
    ],
)
def test_settings_under_which_nothing_is_learned(change, words, start, tmp_path, capsys):
    assert words in refused(arguments(start, tmp_path, 1, change), capsys)


SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
STRATEGIES = {
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "shards": [
        "--trainer.devices=2", f"--trainer.strategy={SHARDED}", "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1", "--trainer.strategy.save_distributed_checkpoint=false",
    ],
}  # fmt: skip
two_processes = [
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors"),
]


def of_two(start, out, steps, strategy, *more):
    args = arguments(start, out, steps, *STRATEGIES[strategy], f"--data.batch_size={BATCH // 2}", *more)
    done = subprocess.run([sys.executable, str(TRAIN), *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=two_processes) for s in STRATEGIES])
def test_two_processes_take_the_mean_of_their_gradients(strategy, start, tmp_path):
    steps, batch = 3, BATCH // 2
    of_two(start, tmp_path, steps, strategy)
    from lightning import Trainer

    module = PriorModule(str(start / "prior"), learning_rate=1e-3, warmup=0, decay=0)
    data = ImageFolderData(str(start / "images"), str(start / "images"), SIZE, batch, cache=start / "cache")
    data.setup()
    streams = [iter(BatchStream(*data.train_set, batch, 0, shuffle=True, rank=r, ranks=2)) for r in (0, 1)]
    module.trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False)
    module.log = lambda *_, **__: None
    optimizer = torch.optim.AdamW(module.network.parameters(), 1e-3, weight_decay=0)
    module.optimizers = lambda: optimizer
    for _ in range(steps):
        losses = [module.training_step(next(s), 0) for s in streams]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    found = checkpoint(tmp_path)["current_model_state"]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_weights_in_shards_are_those_of_ddp_and_resume(start, tmp_path):
    """The average as well, in the checkpoint and in the export; a run of 2 + 2 steps is that of 4."""
    of_two(start, tmp_path / "ddp", 4, "ddp")
    of_two(start, tmp_path / "whole", 4, "shards")
    of_two(start, tmp_path / "parts", 2, "shards")
    of_two(start, tmp_path / "parts", 4, "shards", "--ckpt_path=last")
    ddp, whole, parts = (checkpoint(tmp_path / name) for name in ("ddp", "whole", "parts"))
    for key in ("state_dict", "current_model_state"):
        for name, value in ddp[key].items():
            if not name.endswith(
                "to_k.bias"
            ):  # softmax ignores it: its gradient is rounding, which Adam scales up
                torch.testing.assert_close(whole[key][name], value, atol=2e-5, rtol=1e-4)
            assert torch.equal(parts[key][name], whole[key][name]), name
    of_two(start, tmp_path / "parts", 4, "shards", "--ckpt_path=last")  # at its end: no step, the same export
    prints = [load_prior(str(tmp_path / name / "prior")).fingerprint for name in ("whole", "parts")]
    assert prints[0] == prints[1]
    exported = load_prior(str(tmp_path / "whole" / "prior")).denoiser.network
    for name, value in exported.state_dict().items():
        assert torch.equal(value, whole["state_dict"][name]), name


def test_shards_that_are_not_to_be_had(start):
    """Before any long work: another way of sharding, checkpoints in pieces, adapters."""
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(UserError, match=r"sharded\.yaml"):
            is_sharded(SimpleNamespace(strategy=strategy))
    module = PriorModule(str(start / "prior"), lora=LoRA(rank=2, targets=("convolution",)))
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy(save_distributed_checkpoint=False))
    with pytest.raises(UserError, match="strategy ddp"):
        module.configure_model()


@pytest.mark.parametrize(("epochs", "steps"), [(3, -1), (3, 100), (4, 13), (-1, 13)])
@pytest.mark.parametrize("at", [EPOCH + 2, EPOCH])
def test_the_data_go_on_whatever_ends_the_run(epochs, steps, at, start, tmp_path, monkeypatch):
    """Broken off inside an epoch and at its end: the same batches, as many steps, the same bits."""
    seen, step = [], PriorModule.training_step

    def broken_off(self, batch, number, limit=None):
        if self.global_step == limit:
            raise RuntimeError("broken off")
        seen.append((batch["seed"], self.current_epoch))
        return step(self, batch, number)

    def fit(out, *more, limit=None):
        monkeypatch.setattr(PriorModule, "training_step", lambda *args: broken_off(*args, limit=limit))
        more = (f"--trainer.max_epochs={epochs}", "--save_minutes=0", "--model.decay=0.4", *more)
        TrainingCLI(arguments(start, out, steps, *more))

    fit(tmp_path / "whole")
    whole = list(seen)
    seen.clear()
    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path / "parts", limit=at)
    fit(tmp_path / "parts", "--ckpt_path=last")
    assert seen == whole
    assert len(whole) == (13 if steps == 13 else 3 * EPOCH)
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


def test_a_run_goes_on_by_the_rates_that_are_asked_for_now(start, tmp_path):
    TrainingCLI(arguments(start, tmp_path, 2))
    rates = ("--model.learning_rate=1e-6", "--model.weight_decay=0.5")
    TrainingCLI(arguments(start, tmp_path, 4, *rates, "--ckpt_path=last"))
    kept = checkpoint(tmp_path)
    found = kept["optimizer_states"][0]["param_groups"][0]
    assert (found["lr"], found["initial_lr"], found["weight_decay"]) == (1e-6, 1e-6, 0.5)
    assert kept["lr_schedulers"][0]["base_lrs"] == [1e-6]


def test_a_validation_needs_its_checkpoint(start, tmp_path, capsys):
    args = ["validate", *arguments(start, tmp_path, 1)[1:], "--ckpt_path=last"]
    message = refused(args, capsys)
    assert f"{tmp_path / 'checkpoints'} holds no last.ckpt" in message


def test_a_run_of_no_time_ends(start, tmp_path):
    TrainingCLI(arguments(start, tmp_path, 2, "--trainer.max_time=00:00:00:00"))
    assert (tmp_path / "prior").is_dir()
