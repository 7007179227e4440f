"""What is raced, and by which rules. All of it is fixed before the first run.

Rules: every entrant gets the same number of trials and the same tuning seed; seeds of the evaluation
are disjoint from it and paired; every budget is a run of its own, decayed to its end; the target is
the mean final loss of tuned AdamW at the full budget.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from flex.config import RunConfig, Section
from flex.config_io import load_config, read_mapping
from flex.errors import ConfigError

TUNING_SEED, FIRST_SEED = 0, 100  # of the evaluation: 100, 101, ...


@dataclass(frozen=True)
class Range:
    """A searched option; `complement`: log-uniform in 1 - value, for decay rates near 1."""

    low: float
    high: float
    log: bool = False
    complement: bool = False

    def at(self, place: float) -> float:
        """The value at `place` in [0, 1]."""
        low, high = (1 - self.low, 1 - self.high) if self.complement else (self.low, self.high)
        if self.log or self.complement:
            value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        else:
            value = low + place * (high - low)
        return 1 - value if self.complement else value

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high end."""
        low, high = (1 - self.low, 1 - self.high) if self.complement else (self.low, self.high)
        value = 1 - value if self.complement else value
        if self.log or self.complement:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


# Searched for every entrant; the learning rate's box is the entrant's own.
WARMUP = Range(0.02, 0.2)


@dataclass(frozen=True)
class Entrant:
    """A way to update.

    Attributes:
        optimizer: `optim.name`.
        box: dotted option -> range. `beta1`, `beta2` stand for the two of `optim.betas`.
        permuted: Sophia's curvature with its coordinates shuffled: the same values at wrong places.
    """

    optimizer: str
    box: Mapping[str, Range]
    permuted: bool = False


def _box(lr: tuple[float, float], **more: Range) -> dict[str, Range]:
    return {"optim.lr": Range(*lr, log=True), **more, "optim.warmup": WARMUP}


_BETA1 = Range(0.5, 0.97, complement=True)
_SOPHIA = _box(
    (1e-4, 2e-2),
    beta1=_BETA1,
    beta2=Range(0.8, 0.99, complement=True),
    # A factor on the default, which depends on the penalty. The best of a first race lay at 24, the edge of a
    # range up to 30.
    gamma=Range(0.1, 1000, log=True),
)
_ADAMW = _box((2e-4, 4e-2), beta1=_BETA1, beta2=Range(0.9, 0.999, complement=True))

ENTRANTS: dict[str, Entrant] = {
    "adamw": Entrant("adamw", _ADAMW),
    "sophia": Entrant("sophia", _SOPHIA),
    "sophia-permuted": Entrant("sophia", _SOPHIA, permuted=True),
    "lion": Entrant("lion", _box((2e-5, 1e-2), beta1=_BETA1, beta2=Range(0.9, 0.999, complement=True))),
    "signum": Entrant("signum", _box((5e-5, 1e-2), beta1=_BETA1)),
    "adamw-lora-plus": Entrant("adamw", _ADAMW | {"optim.lr_ratio_b": Range(1, 32, log=True)}),
}  # fmt: skip
BASELINE, CHALLENGER = "adamw", "sophia"


class RunSection(Section):
    config: str | None = Field(None, description="recipe that all entrants share; none: defaults")
    set: tuple[str, ...] = Field((), description="overrides of it, key=value")


class RaceConfig(Section):
    """A race. Read by `load_race`."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="folder below `dir`")
    dir: str = Field("races", description="where race folders live")
    run: RunSection = RunSection()
    steps: Annotated[int, Field(ge=4)] = Field(description="optimizer steps of the full budget")
    budgets: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 0.7, 0.85, 1.0, 1.3), description="shares of `steps`; each is a run of its own"
    )
    trials: Annotated[int, Field(ge=1)] = Field(
        24, description="quasi-random settings tried for each entrant at the full budget"
    )
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 1.0, 2.0), description="factors on the best rate, tried at each budget"
    )
    seeds: Annotated[int, Field(ge=2)] = Field(10, description="paired evaluation runs")
    entrants: tuple[str, ...] = Field(tuple(ENTRANTS), description="names of ENTRANTS")

    def shared(self) -> RunConfig:
        """What all entrants share. Raises ConfigError."""
        return load_config(self.run.config, list(self.run.set))

    def steps_of(self, budget: float) -> int:
        """Optimizer steps of a budget."""
        return max(2, round(budget * self.steps))

    def digest(self) -> str:
        """sha256 of the protocol, resolved: results of another protocol do not belong to it."""
        shared = self.shared().model_dump(mode="json")
        boxes = {name: repr(ENTRANTS[name]) for name in self.entrants}
        content = {"race": self.model_dump(mode="json"), "shared": shared, "boxes": boxes}
        content["race"].pop("dir")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_race(path: Path, overrides: Sequence[str] = ()) -> RaceConfig:
    """Read a race from a YAML file. Raises ConfigError for anything wrong with it.

    Args:
        overrides: key=value, for all runs; one in the file's `run.set` with the same key gives way.
    """
    content = read_mapping(str(path))
    try:
        race = RaceConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {key}: {first['msg']}",
            f"the options of a race are {', '.join(RaceConfig.model_fields)}",
            "correct that line",
        ) from None
    unknown = sorted(set(race.entrants) - set(ENTRANTS))
    missing = sorted({BASELINE, CHALLENGER} - set(race.entrants))
    if unknown or missing:
        what = f"no entrant {unknown[0]}" if unknown else f"{missing[0]} does not take part"
        raise ConfigError(
            f"{path}: {what}",
            f"{CHALLENGER} is raced against {BASELINE}",
            f"entrants are {', '.join(ENTRANTS)}",
        )
    if 1.0 not in race.budgets:
        raise ConfigError(
            f"{path}: budgets {list(race.budgets)} lack 1.0",
            "the target is AdamW's loss at the full budget",
            "add 1.0 to budgets",
        )
    given = {text.partition("=")[0] for text in overrides}
    kept = (text for text in race.run.set if text.partition("=")[0] not in given)
    run = race.run.model_copy(update={"set": (*kept, *overrides)})
    race = race.model_copy(update={"run": run})
    race.shared()
    return race


def trials(race: RaceConfig, entrant: str) -> Iterator[dict[str, float]]:
    """The settings tried for an entrant, dotted option -> value: a scrambled Sobol sequence.

    The first n of a longer list are those of a shorter one. The seed is the entrant's box alone, so
    entrants with equal boxes (Sophia and its placebo) try the same settings.
    """
    box = ENTRANTS[entrant].box
    engine = torch.quasirandom.SobolEngine(len(box), scramble=True, seed=17)
    for places in engine.draw(race.trials).double().tolist():
        yield {
            key: float(f"{r.at(place):.4g}")
            for (key, r), place in zip(box.items(), places, strict=True)
        }


def configure(
    race: RaceConfig, entrant: str, settings: Mapping[str, float], steps: int, seed: int
) -> RunConfig:
    """The configuration of one run: the shared one with an entrant's settings."""
    shared = race.shared()
    optim: dict[str, Any] = {
        "name": ENTRANTS[entrant].optimizer,
        "weight_decay": shared.optim.weight_decay,
        "clip_norm": shared.optim.clip_norm,
        "schedule": shared.optim.schedule,
        "min_lr_ratio": shared.optim.min_lr_ratio,
    }
    betas = [settings.get("beta1", 0.0), settings.get("beta2", 0.0)]
    optim["betas"] = tuple(betas)
    curvature = shared.optim.curvature.model_dump()
    if "gamma" in settings:
        curvature["gamma"] *= settings["gamma"]
    optim["curvature"] = curvature
    for key, value in settings.items():
        section, dot, option = key.rpartition(".")
        if dot and section == "optim":
            optim[option] = value
    tree = shared.model_dump()
    tree["optim"] = optim
    tree["seed"] = seed
    tree["train"] = {**tree["train"], "steps": steps}
    return RunConfig.model_validate(tree)
