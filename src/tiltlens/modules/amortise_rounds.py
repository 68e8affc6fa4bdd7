"""The rounds of an amortisation: paths of the present control, drawn once, and kept in the run's folder by the name of what drew them.

A resumed run goes on with the paths that its checkpoint was trained on, whatever has been drawn since.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.control import Control
from tiltlens.sampling.adjoint import Matches, joined, lean_adjoint, matches, walk
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.writing import whole_file

ROWS = 16  # of a walk, as many as a network is called with
Figures = dict[str, float]


def draw_round(
    chain: Chain, control: Control, rows_of: Callable[[int], RowConstraint], seeds: range, strength: float,
    until: float | None, device: torch.device, dtype: torch.dtype,
) -> tuple[Matches, Figures]:  # fmt: skip
    """A path a seed, and what it is regressed on; means over them: of the objective and path KL, in nats, and of the energy.
    rows_of(count): rows of the unit at this strength. until: the log-SNR up to which steps are controlled."""
    parts, seen = [], []
    size = ROWS if control.kind == "lora" else len(seeds)  # the graphs of a walk of networks fill the memory
    for at in range(0, len(seeds), size):
        some = seeds[at : at + size]
        noise = Noise(some, chain.denoiser.shape, device, dtype, domain="amortise")
        rows = rows_of(len(some))
        path = walk(chain, control, rows, noise, until)
        parts.append(matches(chain, path, lean_adjoint(chain, path, rows), until))
        seen.append(torch.stack([path.objective, path.path_kl, path.energy / strength]))
    objective, path_kl, energy = torch.cat(seen, 1).cpu()
    return joined(parts), {
        "objective": float(objective.mean()), "objective_se": float(objective.std()) / len(seeds)**0.5,
        "path_kl": float(path_kl.mean()), "mean_energy": float(energy.mean()), "strength_of_round": strength,
    }  # fmt: skip


class Rounds:
    """Which round a process is in, whose paths it has, and what came of each; folder: of the run. drawn_by names what drew the present
    paths; figures: a round each, of its paths."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.drawn_by: str | None = None
        self.figures: list[Figures] = []
        # [round, what drew its paths] of the last checkpoint, and of the one that this run was resumed from
        self._stood_in: list | None = None
        self._resumed_in: list | None = None

    def begin(
        self, number: int, drawer: str, folder: Path, rank: int, device: torch.device, kept: bool
    ) -> Matches | None:
        """The paths of a round: those in the folder where the same control, `drawer`, drew them, and those that the checkpoint of a resumed
        run was trained on; None where they are to be drawn. kept: whether rounds keep their paths."""
        resumed = self._resumed_in is not None and self._resumed_in[0] == number
        self.drawn_by = self._resumed_in[1] if resumed else drawer
        file = _file(folder, rank, number, self.drawn_by)
        if not file.is_file():
            if resumed and kept:
                rank_zero_warn(
                    f"round {number} of the checkpoint: {file} is not there, its paths are drawn anew"
                )
            return None
        with safe_open(file, "pt") as stored:
            self._tell(number, json.loads(stored.metadata()["figures"]))
        return Matches(**load_file(file, device=str(device)))

    def drawn(
        self, number: int, paths: Matches, figures: Figures, folder: Path, rank: int, kept: bool
    ) -> None:
        """The round has these paths, new ones. A round that could not be kept (a full disk) has not begun."""
        if kept:
            tensors = {f.name: getattr(paths, f.name).cpu() for f in fields(Matches)}
            with whole_file(_file(folder, rank, number, self.drawn_by)) as part:
                save_file(tensors, part, {"figures": json.dumps(figures)})
        self._tell(number, figures)

    def _tell(self, number: int, figures: Figures) -> None:
        """What came of a round's paths; rounds after it, of a run that was broken off, are forgotten."""
        self.number, self.figures = number, [*self.figures[:number], figures]

    def state(self, folder: Path, rank: int) -> dict:
        """For a checkpoint. Paths of other rounds are not asked for again, and go, but for the one of the checkpoint that this one
        replaces: it may not come to be written."""
        stands_in = None if self.number is None else [self.number, self.drawn_by]
        kept = [_file(folder, rank, *rounds) for rounds in (self._stood_in, stands_in) if rounds]
        for file in folder.glob(f"paths-{rank}-*.safetensors"):
            if file not in kept:
                file.unlink(missing_ok=True)
        self._stood_in = stands_in
        return {"figures": self.figures, "stands_in": stands_in}

    def load(self, state: dict) -> None:
        self.figures = list(state.get("figures", []))
        self._stood_in = self._resumed_in = state.get("stands_in")


def _file(folder: Path, rank: int, number: int, drawn_by: str) -> Path:
    return folder / f"paths-{rank}-{number}-{drawn_by}.safetensors"
