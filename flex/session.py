"""One session of a run: build the parts, continue where the last session stopped, train, export."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psutil
import torch
from torch import Tensor, nn

from . import processes
from .build import build_update
from .checkpoint import Loaded, load_checkpoint, restore_rng
from .engine import Engine, OptimizerState, build_engine
from .engine_zero import partitioned_config
from .errors import CheckpointError
from .loop import Trainer
from .loss_plot import plot_losses
from .meters import Meter
from .model.adapters import adapter_parameters, add_adapters
from .model.base import base_bytes, is_quantised, load_model, resolve
from .model.export import PROMPT, probe_logits, save_adapter, self_test
from .ranges import Profile
from .sample import sample_completion
from .state import Batch, Example
from .stop import Stop, StopSignal
from .trackers import open_trackers
from .train import STOPPED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import RunConfig
    from .data.loader import StepLoader
    from .evals.spot_check import SpotCheck
    from .penalty import SpectralPenalty
    from .run_folder import RunFolder

log = logging.getLogger("flex.session")


class Session:
    """The parts of a run on this process. All processes hold one; rank 0 writes and talks."""

    def __init__(
        self,
        cfg: RunConfig,
        folder: RunFolder,
        tokenizer: PreTrainedTokenizerBase,
        loader: StepLoader,
        validation: list[Batch],
        examples: list[Example],
        spot_check: SpotCheck | None = None,
    ) -> None:
        self.cfg, self.folder, self.tokenizer, self.loader = cfg, folder, tokenizer, loader
        self.validation, self.spot_check = validation, spot_check
        self.sample = examples[0] if examples and cfg.train.sample_prompt else None
        self.rank = processes.rank()

    def run(self) -> int:
        """Train to the end or to a stop; returns the exit status."""
        resume_from, finished = self._agree_on_start()
        if finished:
            return 0
        loaded = load_checkpoint(Path(resume_from)) if resume_from else None
        engine, penalty = self._build(loaded)
        trainer = Trainer(
            self.cfg,
            engine,
            self.loader,
            self.validation,
            penalty,
            self.folder.checkpoints,
            extra={"config_hash": self.folder.config_hash},
            spot_check=self.spot_check,
        )
        if loaded is not None:
            trainer.state = loaded.state
        self._seed(loaded, engine)
        before = self._sample(engine) if loaded is None else None
        start = time.perf_counter()
        why = self._fit(trainer, None if loaded is None else loaded.state.step)
        if why == Stop.STOP:
            self._say(f"stopped after step {trainer.state.step}; the same command continues")
            engine.close()
            return STOPPED
        after = self._sample(engine)
        self._export(engine, trainer)
        if self.rank == 0:
            self._finish(trainer, before, after, time.perf_counter() - start)
        return 0

    def _agree_on_start(self) -> tuple[str, bool]:
        """Rank 0 alone looked at the run folder; the others learn what it found."""
        found = self.folder.resume_from
        mine = f"{'' if found is None else found.path}\n{int(self.folder.finished)}"
        path, finished = processes.gather_text(mine)[0].split("\n")
        return path, finished == "1"

    def _build(self, loaded: Loaded | None) -> tuple[Engine, SpectralPenalty | None]:
        cfg = self.cfg
        partitioned = partitioned_config(cfg)
        base = load_model(cfg.model, processes.local_device(), ds_config=partitioned)
        model = add_adapters(base, cfg.lora, cfg.seed, cfg.kernels.impl)
        parameters = adapter_parameters(model)
        penalty, optimizer = build_update(cfg, model, parameters)
        if penalty is not None:
            penalty.warnings_at_start()
        if loaded is not None:
            # Before the engine is built: ZeRO clones its fp32 masters from the parameters.
            load_parameters(parameters, loaded.tensors["adapter"])
            if penalty is not None:
                penalty.load_state_dict(loaded.tensors.get("penalty", {}))
        engine = build_engine(cfg, model, optimizer, parameters)
        if loaded is not None:
            counters = loaded.extra["counters"]
            engine.load_optimizer_state(OptimizerState(loaded.tensors["optimizer"], counters))
        return engine, penalty

    def _seed(self, loaded: Loaded | None, engine: Engine) -> None:
        """Torch's generator, for dropout inside the base model: a stream per process, continued exactly on resume."""
        if loaded is not None and restore_rng(loaded.state.rng, engine.device, self.rank):
            return
        step = 0 if loaded is None else loaded.state.step
        if loaded is not None:
            log.warning(
                "the checkpoint was written by fewer processes: the base model's own dropout, if any, is seeded anew"
            )
        torch.manual_seed((self.cfg.seed * 1_000_003 + step) * 1_000_003 + self.rank)

    def _fit(self, trainer: Trainer, resumed: int | None) -> Stop:
        options = self.cfg.model_dump(mode="json")
        trackers = []
        if self.rank == 0:
            trackers = open_trackers(
                self.cfg.track, self.folder.path, options, step=trainer.state.step
            )
        meter = Meter(
            self.folder.metrics,
            self.loader.total_steps,
            rank=self.rank,
            resumed=resumed,
            log_every=self.cfg.train.log_every,
            penalty=self.cfg.penalty.active,
            device=trainer.engine.device,
        )
        trigger_files = self.folder.path if self.rank == 0 else None
        try:
            profile = Profile(self.cfg.profile, self.folder.path, active=self.rank == 0)
            with meter, StopSignal(trigger_files) as stop, profile:
                return trainer.fit(meter, trackers, stop, profile)
        finally:
            for tracker in trackers:
                tracker.finish()

    def _sample(self, engine: Engine) -> str | None:
        if self.sample is None:
            return None
        state = torch.get_rng_state()
        prompt, completion = sample_completion(engine, self.tokenizer, self.sample)
        torch.set_rng_state(state)
        self._prompt = prompt
        return completion

    def _export(self, engine: Engine, trainer: Trainer) -> None:
        """Write the adapter, then load it with stock PEFT onto a fresh base and compare."""
        tensors = engine.full_parameters()
        probe = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        ours = probe_logits(engine.model, probe)
        base = resolve(self.cfg.model)
        if self.rank == 0:
            self.adapter = save_adapter(
                engine.peft_model, self.folder.path / "adapter", base, tensors
            )
        bare = None
        if is_quantised(engine.peft_model) and self.rank == 0:
            # Quantising again would take minutes and prove nothing, and bitsandbytes' own forward may repack a base
            # that was loaded as it is: the adapter is what is tested.
            bare = cast("PreTrainedModel", engine.peft_model.unload())
            bare.set_attn_implementation("sdpa")
        engine.close()
        processes.barrier()  # rank 0 loads the whole base: by now nobody holds a part of the trained one
        if self.rank == 0:
            self._self_test(probe, ours, bare)

    def _self_test(self, probe: Tensor, ours: Tensor, base: PreTrainedModel | None) -> None:
        """Compare stock PEFT on a fresh base, or on the quantised one as it was before the adapters."""
        plain = self.cfg.model.model_copy(update={"attention": "sdpa"})
        if base is None:
            needed, free = base_bytes(plain), psutil.virtual_memory().available
            if needed > free:
                log.warning(
                    "self-test skipped: the whole base takes %.1f GB of memory, %.1f GB are free",
                    needed / 1e9,
                    free / 1e9,
                )
                return
        report = self_test(self.adapter, probe, ours, base or (lambda: load_model(plain)))
        log.info("self-test: %s", report)

    def _finish(
        self, trainer: Trainer, before: str | None, after: str | None, seconds: float
    ) -> None:
        state = trainer.state
        plot_losses(self.folder.metrics, self.folder.path / "loss.png")
        summary = {
            "steps": state.step,
            "target_tokens": state.tokens,
            "skipped_steps": state.skipped,
            "curvature_refreshes": state.refreshes,
            "validation_loss_before": state.first_validation_loss,
            "validation_loss_after": state.last_validation_loss,
        }
        self.folder.finish(summary)
        if after is not None:
            print(f"\n--- prompt\n{self._prompt.rstrip()}")
            if before is not None:
                print(f"--- completion before training\n{before.rstrip()}")
            print(f"--- completion after training\n{after.rstrip()}\n---")
        first, last = state.first_validation_loss, state.last_validation_loss
        if first is not None and last is not None:
            change = (last - first) / first
            print(f"validation loss {first:.4f} -> {last:.4f} ({change:+.1%})")
        print(f"{state.step} steps, {state.tokens:,} target tokens, {seconds:.0f} s")
        print(f"adapter: {self.adapter}", flush=True)

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def load_parameters(parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy whole tensors into parameters. Raises CheckpointError if names or shapes differ."""
    wrong = sorted(parameters.keys() ^ saved.keys())
    wrong += [n for n, p in parameters.items() if n in saved and saved[n].shape != p.shape]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} adapter tensors of the checkpoint do not fit, the first is {wrong[0]}",
            "it was written for other adapters or another model",
            "resume with the configuration it was written with",
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
