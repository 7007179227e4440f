"""One optimizer step, as a paper's method section would tell it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import loss_head
from .loss import cross_entropy_sum
from .model.dropout_keys import Keys, dropout_keys, key_of, row_ids
from .optim import CurvatureStats, learning_rate, sample_labels
from .optim.curvature import uniform_draws
from .padding import pad_columns, pad_packed, pays
from .processes import all_reduce
from .ranges import named
from .state import IGNORE, Batch, StepReport

if TYPE_CHECKING:
    from .config import RunConfig
    from .data.loader import StepLoader
    from .engine import Engine
    from .penalty import SpectralPenalty


def target_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and labels of the positions that bear loss, and of no others.

    Returns: (n, V) logits in the model's dtype and (n,) int64 labels, documents in the batch's order.
    """
    logits, labels = _logits_and_labels(model, batch)
    return logits[: len(labels)], labels


def _logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(m, V) logits and (n,) labels of the first n <= m of them: to cut the rest off costs their gradient a copy."""
    keep, columns = target_positions(batch)
    labels = batch.labels[:, columns][keep]
    if len(labels) and pays(batch):
        logits = forward_at(model, batch, pad_columns(columns))
        return logits.flatten(0, 1), labels
    logits = forward_at(model, batch, columns)
    return (logits.flatten(0, 1) if keep.all() else logits[keep]), labels


def target_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which positions bear loss, (rows, columns) bool, of the columns in which one does, (columns,) int64."""
    bears_loss = batch.labels != IGNORE
    columns = bears_loss.any(0).nonzero().squeeze(1)
    if not len(columns):  # a validation filler: the forward still runs, for the lockstep of ZeRO-3
        columns = columns.new_zeros(1)
    return bears_loss[:, columns], columns


def forward_at(model: nn.Module, batch: Batch, columns: Tensor) -> Tensor:
    """What the model returns as logits of these columns: (rows, columns, V)."""
    if pays(batch):
        batch = pad_packed(batch)
    layout = (
        {"attention_mask": batch.attention_mask}
        if batch.cu_seqlens is None
        else {"cu_seqlens": batch.cu_seqlens}
    )
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=columns,
        use_cache=False,
        **layout,
    ).logits


def target_loss(
    model: nn.Module, batch: Batch, scale: float = 1.0, draws: Tensor | None = None
) -> Tensor:
    """scale * summed cross-entropy at the targets, a 0-dim tensor; never more than one block of logits.

    Args:
        draws: (n,) uniform numbers, one per target: labels are sampled from the model in place of the batch's.

    Raises:
        ModelError: see `loss_head.loss_of`.
    """
    head = loss_head.find(model)
    if head is not None and batch.num_targets > head.block_rows(head.weight.dtype):
        keep, columns = target_positions(batch)
        labels = batch.labels[:, columns][keep]
        with head.asked(loss_head.Request(keep, labels, draws, scale)):
            output = forward_at(model, batch, columns)
        return loss_head.loss_of(head, output)
    logits, labels = _logits_and_labels(model, batch)
    if draws is not None:
        labels = sample_labels(logits.detach()[: len(labels)], draws)
    return cross_entropy_sum(logits, labels, scale)


def keyed_dropout(
    cfg: RunConfig, batch: Batch, step: int, purpose: str
) -> AbstractContextManager[None]:
    """Adapters' dropout in a forward of this batch and its backward: what is hidden does not depend on the batch."""
    if cfg.lora.dropout == 0:
        return nullcontext()
    whole = pad_packed(batch) if pays(batch) else batch
    return dropout_keys(Keys(key_of(cfg.seed, step, purpose), row_ids(whole)))


def refresh_is_due(cfg: RunConfig, step: int) -> bool:
    """Whether update `step` (0-based) is preceded by a curvature refresh."""
    curvature = cfg.optim.curvature
    return cfg.optim.name == "sophia" and (step % curvature.every == 0 or step < curvature.warmup)


def refresh_curvature(
    cfg: RunConfig, engine: Engine, loader: StepLoader, step: int
) -> CurvatureStats:
    """Gauss-Newton-Bartlett: labels from the model's own softmax; per micro-batch B g^2; their mean into h."""
    for batch, num_targets in loader.refresh_micro_batches(step):
        batch = batch.to(engine.device)
        draws = uniform_draws(
            cfg.seed, step, batch.example_ids.tolist(), batch.targets_per_example()
        )
        with keyed_dropout(cfg, batch, step, "refresh"):
            engine.backward(target_loss(engine.model, batch, engine.world / num_targets, draws))
        engine.add_curvature(num_targets)
    return engine.commit_curvature()


def train_step(
    cfg: RunConfig,
    engine: Engine,
    loader: StepLoader,
    penalty: SpectralPenalty | None,
    step: int,
    total_steps: int,
    flags: tuple[float, float] = (0.0, 0.0),
) -> tuple[StepReport, tuple[float, float]]:
    """Update number `step` (0-based).

    `flags` are this process's wishes (stop, save); they ride on the reduction of the loss, and their sums over
    processes come back, so that all processes stop at the same step.
    """
    start = time.perf_counter()
    engine.model.train()
    with named("data"):
        batches = [batch.to(engine.device) for batch in loader.micro_batches(step)]
    num_targets = loader.targets(step)
    lr = learning_rate(cfg.optim, step, total_steps)

    stats = None
    if refresh_is_due(cfg, step):
        with named("refresh"):
            stats = refresh_curvature(cfg, engine, loader, step)

    total = torch.zeros((), dtype=torch.float64)
    last = len(batches) - 1
    in_gradient = penalty if cfg.penalty.coupling == "gradient" else None
    for m, batch in enumerate(batches):
        with keyed_dropout(cfg, batch, step, "train"):
            with named("forward"):
                loss = target_loss(engine.model, batch, engine.world / num_targets)
                total += loss.detach().double().cpu()
            if m == last and in_gradient is not None and not engine.whole_gradients:
                # A term of the loss, so that its gradient is in place before ZeRO reduces: a partition has no FFT.
                with named("penalty"):
                    engine.gather()
                    loss = loss + in_gradient.as_loss(engine.rank, engine.world)
            with named("backward"):
                engine.backward(loss)
    if in_gradient is not None and engine.whole_gradients:
        with named("penalty"):
            in_gradient.add_gradients()

    deltas = {}
    if penalty is not None and cfg.penalty.coupling == "decoupled":
        with named("penalty"):
            engine.gather()
            deltas = penalty.decoupled_deltas(lr)
    with named("optimizer"):
        update = engine.update(lr)
        if deltas and not update.skipped:
            engine.shift(deltas)

    shared = torch.cat(
        [total[None], penalty_sums(penalty, engine.rank), torch.tensor(flags, dtype=torch.float64)]
    )
    with named("all-reduce"):
        loss_total, weighted, grad_square, stop, save = all_reduce(shared).tolist()
    report = StepReport(
        step=step + 1,
        loss=loss_total / engine.world,
        lr=lr,
        grad_norm=update.grad_norm,
        tokens=num_targets,
        positions=loader.positions(step),
        seconds=time.perf_counter() - start,
        penalty=weighted / cfg.penalty.weight if cfg.penalty.weight else 0.0,
        penalty_weighted=weighted,
        penalty_share=grad_square**0.5 / update.grad_norm if update.grad_norm > 0 else 0.0,
        clipped_fraction=None if update.skipped else engine.clipped_fraction(),
        curvature_mean=None if stats is None else stats.mean,
        refreshed=stats is not None,
        skipped=update.skipped,
    )
    return report, (stop, save)


def penalty_sums(penalty: SpectralPenalty | None, rank: int) -> Tensor:
    """[lambda P, |lambda grad P|^2] of this process's share, fp64 on the CPU: they sum up to the whole."""
    if penalty is None or penalty.last_report is None:
        return torch.zeros(2, dtype=torch.float64)
    everywhere_whole = (
        penalty.config.coupling == "decoupled"
    )  # then every process computes all of it
    return penalty.last_report.sums.cpu().double() * (0.0 if everywhere_whole and rank > 0 else 1.0)


@torch.no_grad()
def validation_loss(engine: Engine, batches: list[Batch]) -> float:
    """Mean cross-entropy per target token over all processes' batches, in nats. Leaves the model in train mode."""
    engine.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(engine.device)
        loss = target_loss(engine.model, batch)  # a filler's too, for the lockstep of ZeRO-3
        sums += torch.tensor([loss.item(), batch.num_targets], dtype=torch.float64)
    engine.model.train()
    total, count = all_reduce(sums).tolist()
    return total / count if count else float("nan")
