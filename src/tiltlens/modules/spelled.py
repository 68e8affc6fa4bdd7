"""What `tilt` was asked, as the config.yaml of sample.py: objects spelled as names, addresses and classes with their settings."""

import inspect
from pathlib import Path
from typing import Any

import yaml

from tiltlens.energies import Energy
from tiltlens.guidance import Guidance
from tiltlens.priors import DiffusersPrior, GaussianMixture, Prior
from tiltlens.priors.folder import BUNDLED
from tiltlens.sampling import ChainSampler
from tiltlens.units import Combination, EncoderUnit, Projection, Unit
from tiltlens.units.grammar import number
from tiltlens.units.sources import is_registered

HEAD = "# Written by tiltlens.tilt: sample.py --config with this file repeats the run.\n"
PLAIN = (
    "steps",
    "eta",
    "spacing",
    "order",
    "clip",
    "pilot",
    "natural",
    "precision",
    "prompt",
    "noise_aware",
    "cache",
    "rows",
)


class UnspeakableError(ValueError):
    """An object that lives in memory alone: a file has no words for it."""


def config_text(module: Any, data: dict[str, Any], accelerator: str, constraint: str | None) -> str:
    """config.yaml in the form that sample.py takes. module: a SamplingModule; data: the arguments of PlanData.

    Where an object has no such form (a network in memory, a profile that is a function), a comment says so, and what stands in
    its place is refused by sample.py: the file never asks for another run.
    """
    prior = module.prior_spec
    asked: dict[str, Any] = {
        "prior": prior, "unit": module.units, "energy": module.energy, "guidance": module.guidance, "sampler": module.method,
        **{name: getattr(module, name) for name in PLAIN},
    }  # fmt: skip
    if isinstance(prior, DiffusersPrior):
        asked |= {"prompt": prior.prompt, "precision": prior.precision}
    model, missing = {}, []
    for key, value in asked.items():
        try:
            model[key] = spell(value)
        except UnspeakableError as error:
            missing.append(f"# model.{key} is an object in memory, and no file can name it: {error}\n")
            model[key] = f"in memory: {type(value).__name__}"
    if len(module.units) == 1 and isinstance(model["unit"], list):
        (model["unit"],) = model["unit"]
    head = HEAD if not missing else "# Written by tiltlens.tilt; it does not repeat the run by itself.\n"
    whole = {
        "model": {k: v for k, v in model.items() if v not in (None, [])}, "data": spell(data),
        "trainer": {"accelerator": accelerator, "logger": False},
        **({} if constraint is None else {"constraint": constraint}),
    }  # fmt: skip
    return head + "".join(missing) + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=110)


def spell(value: Any) -> Any:
    """Plain YAML. Raises UnspeakableError."""
    if isinstance(value, DiffusersPrior):
        if value.name == BUNDLED or Path(value.name).is_dir() or "/" in value.name:
            return value.name
        raise UnspeakableError(f"{value.name} is no folder and no name on the hub")
    if isinstance(value, EncoderUnit):
        if is_registered(value.address.encoder):
            raise UnspeakableError(f"the encoder {value.address.encoder} was registered in this process")
        return value.name
    if isinstance(value, Projection):  # its name is short where the direction is long
        return f"projection[{','.join(map(number, value.direction))}]"
    if isinstance(value, Combination):
        weights = {"weights": value.weights} if value.rule == "sum" else {}
        return {"units": [spell(u) for u in value.units], **weights, "rule": value.rule}
    if isinstance(value, Prior | Unit | Energy | Guidance | ChainSampler):
        return _by_class(value)
    if isinstance(value, dict):
        return {str(k): spell(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [spell(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnspeakableError(f"{value!r}")


def _by_class(thing: Any) -> dict[str, Any]:
    """{class_path, init_args}: every constructor argument is kept under its own name."""
    cls = type(thing)
    path = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__ == "__main__" or "<locals>" in path:
        raise UnspeakableError(f"{path} cannot be imported")
    given = thing.asked if isinstance(thing, GaussianMixture) else vars(thing)
    names = [n for n in inspect.signature(cls).parameters if n != "self"]
    if lost := [n for n in names if n not in given]:
        raise UnspeakableError(f"{path} does not keep its {', '.join(lost)}")
    arguments = {n: spell(given[n]) for n in names}
    return {"class_path": path, "init_args": {n: v for n, v in arguments.items() if v is not None}}
