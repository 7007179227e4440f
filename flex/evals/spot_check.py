"""Pass@1 of a few tasks while a model is trained: whether it still learns to program, seen early.

A look, not a result: few tasks, the weights of the moment, no interval over tasks that were not run.
`python -m flex eval` on the finished adapter gives a result.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flex.errors import DataError
from flex.evals.benchmarks import load_benchmark
from flex.evals.execute import Runner
from flex.evals.generate import Generator, Request
from flex.evals.sampling import sample_seed
from flex.processes import all_reduce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flex.config import EvalSection
    from flex.engine import Engine

log = logging.getLogger("flex.evals")
BATCH = 16  # completions at once


@dataclass(frozen=True)
class PassRate:
    """How many of the tasks a greedy completion solved."""

    passed: int
    tasks: int


class SpotCheck:
    """The tasks of `eval.benchmark` and the sandbox to run them in; `close` it.

    All processes hold one and generate the same completions in lockstep, since ZeRO-3 gathers the
    weights of each layer from all of them; rank 0 alone runs programs.

    Args:
        cfg: the section `eval`, with `every` above 0.
        tokenizer: of the model.
        rank: of this process.

    Raises:
        DataError: no such benchmark, its data are missing, no sandbox works here, or the tool chain
            of its language is missing.
    """

    def __init__(self, cfg: EvalSection, tokenizer: PreTrainedTokenizerBase, rank: int) -> None:
        path = None if cfg.path is None else Path(cfg.path)
        self.cfg, self.tokenizer = cfg, tokenizer
        self.benchmark = load_benchmark(cfg.benchmark, path, cfg.limit)
        self._runner = Runner(self.benchmark.language) if rank == 0 else None
        if self._runner is not None and self._runner.toolchain is None:
            self._runner.close()
            raise DataError(
                f"eval.benchmark: {self.benchmark.name} cannot be run: {self._runner.missing}",
                "no completion could be judged",
                "install it, choose another benchmark, or set eval.every=0",
            )

    def close(self) -> None:
        """End what the sandbox keeps running."""
        if self._runner is not None:
            self._runner.close()

    def run(self, engine: Engine) -> PassRate:
        """Generate greedily with the weights as they are, and count what passes.

        Every process must call it. Leaves the model in train mode and torch's generators untouched.
        """
        model = engine.peft_model
        model.eval()
        try:
            generator = Generator(
                model,
                self.tokenizer,
                max_new_tokens=self.cfg.max_new_tokens,
                batch_size=BATCH,
            )
            tasks = {task.task_id: task for task in self.benchmark.tasks}
            requests = [
                Request(name, 0, sample_seed(0, name, 0), task.prompt, task.stops)
                for name, task in tasks.items()
            ]
            made = dict(generator.generate(requests))
        finally:
            model.train()
        passed = 0
        if self._runner is not None:
            programs = ((key, tasks[key[0]].program(text.text)) for key, text in made.items())
            passed = sum(end.kind == "passed" for _, end in self._runner.run_many(programs))
        total = all_reduce(torch.tensor(float(passed)))
        return PassRate(int(total), len(tasks))
