"""The spectral penalty over all adapters of a model, for any training loop: two lines.

    penalty = SpectralPenalty.from_model(peft_model, weight=0.02)
    ...
    loss.backward()
    penalty.add_gradients()  # before optimizer.step()

P is the sum (or mean) over matrices of sum_k rho(k) |F(w)_k|^2; the formula is in
flex/kernels/spectral_penalty/reference.py. `add_gradients` works in place over matrices of all
shapes, so that on Triton a step costs a handful of launches whatever their number; the loss form
that ZeRO needs, and delta_w, stack matrices of one shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from flex.config import PenaltyConfig
from flex.errors import CheckpointError, ConfigError, ModelError
from flex.kernels.spectral_penalty import (
    Spectrum,
    curvature_constant,
    high_band_energy,
    spectral_penalty_into,
)

from .penalty_stacks import LoraPair, require_whole, stack_equal_shapes

log = logging.getLogger("flex.penalty")

# (parameters, lambda * gradient stacked over them), per group of equal matrices
Gradients = list[tuple[tuple[nn.Parameter, ...], Tensor]]


@dataclass(frozen=True)
class PenaltyReport:
    """What the penalty was, over the share of the matrices it was computed for.

    `sums` (2,) = [lambda P, |lambda grad P|^2] on the device. They are partial sums: all-reduce them
    with SUM and pass the result to `PenaltyReport(sums, weight)`. The properties wait for the device.
    """

    sums: Tensor
    weight: float

    @property
    def value(self) -> float:
        """P; 0 when the weight is 0, because then nothing is computed."""
        return self.weighted / self.weight if self.weight else 0.0

    @property
    def weighted(self) -> float:
        """lambda * P."""
        return float(self.sums[0])

    @property
    def grad_norm(self) -> float:
        """|lambda * grad P|; 0 when the penalty is detached."""
        return float(self.sums[1]) ** 0.5


def find_pairs(model: nn.Module) -> list[LoraPair]:
    """Every LoRA linear of a PEFT model with a trainable factor, in module order.

    LoRA on embeddings and convolutions has no matrix pair of this form: counted in one logged line.

    Raises:
        ModelError: ZeRO-3 has partitioned a factor.
    """
    from peft.tuners.lora import LoraLayer

    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    pairs, left_out = [], 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        left_out += len(module.lora_embedding_A)
        for adapter in module.lora_A:
            a = cast(nn.Parameter, module.lora_A[adapter].weight)
            b = cast(nn.Parameter, module.lora_B[adapter].weight)
            for p in (a, b):
                require_whole(names[id(p)], p)
            if not (a.requires_grad or b.requires_grad):
                continue
            if a.ndim == 2 and b.ndim == 2:
                scale = module.scaling[adapter]
                pairs.append(LoraPair(names[id(a)], a, names[id(b)], b, scale))
            else:
                left_out += 1
    if left_out:
        log.warning("%d LoRA layers are not linear and stay outside the spectral penalty", left_out)
    return pairs


class SpectralPenalty:
    """lambda * P over LoRA pairs, with its exact gradient. A0, B0 are the weights at construction.

    Args:
        pairs: the adapters; `from_model` finds those of a PEFT model.
        config: a PenaltyConfig, or none and its fields as keyword arguments.
        impl: which implementation of the kernel: "auto", "torch" or "triton".

    Raises:
        ConfigError: both a config and options.
        ModelError: no trainable LoRA matrix, or one that ZeRO-3 has partitioned.
    """

    def __init__(
        self,
        pairs: Iterable[LoraPair],
        config: PenaltyConfig | None = None,
        *,
        impl: str = "auto",
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ConfigError(
                f"SpectralPenalty got a config and also {', '.join(options)}",
                "one of the two would be ignored",
                "pass the fields either in PenaltyConfig(...) or as keyword arguments",
            )
        self.config = config if config is not None else PenaltyConfig(**options)
        self.impl = impl
        self.pairs = tuple(pairs)
        self.last_report: PenaltyReport | None = None
        if not any(p.a.requires_grad or p.b.requires_grad for p in self.pairs):
            raise ModelError(
                "no trainable LoRA matrix found",
                "the spectral penalty acts on the lora_A and lora_B weights of linear layers",
                "wrap the model with peft.get_peft_model first; check lora.targets",
            )
        fields = Spectrum.__dataclass_fields__
        self.spectrum = Spectrum(**{name: getattr(self.config, name) for name in fields})
        self._groups = stack_equal_shapes(self.pairs, self.config.target)
        # what a rank takes whole: a matrix, or for delta_w a pair
        self._units = [(g, i) for g, group in enumerate(self._groups) for i in range(len(group))]
        mean = self.config.reduce == "mean"
        self._factor = self.config.weight / (len(self._units) if mean else 1)
        self._spans = lru_cache(maxsize=8)(self._find_spans)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        config: PenaltyConfig | None = None,
        *,
        impl: str = "auto",
        **options: Any,
    ) -> SpectralPenalty:
        """Over every trainable LoRA linear of a PEFT model, stock layers included."""
        return cls(find_pairs(model), config, impl=impl, **options)

    @torch.no_grad()
    def add_gradients(self) -> PenaltyReport:
        """Add lambda * grad P into p.grad in place: once per optimizer step, before clipping.

        Gradients must be whole and in this process. Matrices are not copied, but for delta_w.
        """
        self._check_coupling("gradient")
        acts = self.config.active and not self.config.detached
        if acts and self.config.target != "delta_w":
            self.last_report = self._add_in_place()
            return self.last_report
        gradients, self.last_report = self._compute(0, 1)
        for params, stacked in gradients:
            for param, grad in zip(params, stacked.unbind(), strict=True):
                _gradient_of(param).add_(grad)
        return self.last_report

    def _add_in_place(self) -> PenaltyReport:
        """All matrices of a device in one call, whatever their shapes."""
        sums: list[Tensor] = []
        for members in self._by_device().values():
            names, params, roles, starts = zip(*members, strict=True)
            for name, param in zip(names, params, strict=True):
                require_whole(name, param)
            grads = [_gradient_of(param) for param in params]
            found = spectral_penalty_into(
                params, grads, self.spectrum, roles, self._factor, starts, self.impl
            )
            sums.append(found.sum(1))
        total = sums[0]
        for other in sums[1:]:
            total = total + other.to(total.device)
        return PenaltyReport(total, self.config.weight)

    def as_loss(self, rank: int = 0, world: int = 1) -> Tensor:
        """A 0-dim tensor of value 0 to add to the loss; its backward adds the penalty's gradient.

        Backward gives (incoming gradient) * world * lambda * grad P for this rank's share of the
        matrices and nothing for the others, so that a mean over ranks is lambda * grad P once.
        Where the engine divides the loss (accumulation), multiply by that number. Shares are runs
        of whole matrices, known without communication, equal in elements up to one matrix.
        `last_report` holds the figures of the share.
        """
        gradients = self._step("gradient", rank, world)
        if self.config.detached or not self.config.active:
            return torch.zeros((), device=self.pairs[0].a.device)
        inputs = [p for group in self._groups for p in group.trainable]
        places = {id(p): i for i, p in enumerate(inputs)}
        return _PenaltyLoss.apply(gradients, float(world), places, *inputs)

    def decoupled_deltas(self, lr: float) -> dict[nn.Parameter, Tensor]:
        """-lr * lambda * grad P per matrix, to add to the weights beside the optimizer's update."""
        return {
            param: delta
            for params, stacked in self._step("decoupled")
            for param, delta in zip(params, (stacked * -lr).unbind(), strict=True)
        }

    def measure(self, rank: int = 0, world: int = 1) -> PenaltyReport:
        """The figures of a share, without touching any gradient."""
        return self._compute(rank, world)[1]

    def curvature_constants(self) -> dict[str, float]:
        """Diagonal of lambda * P's Hessian by parameter name: one exact constant per matrix.

        Empty when the penalty has no gradient (weight 0, detached).

        Raises:
            ConfigError: target=delta_w, whose diagonal moves with the other factor.
        """
        if not self.config.active or self.config.detached:
            return {}
        if self.config.target == "delta_w":
            raise ConfigError(
                "penalty.target=delta_w has no constant curvature",
                "the diagonal moves with the other factor; Sophia would divide by a wrong number",
                "set penalty.coupling=decoupled, or penalty.target=factor_updates",
            )
        return {
            name: self._factor * curvature_constant(stack.shape, self.spectrum, role=stack.role)
            for group in self._groups
            for stack in group.stacks
            for name in stack.names
        }

    def high_band_share(self) -> dict[str, float]:
        """Share of the energy above the threshold in the A's and in the B's, 0 to 1.

        Of the updates w - w0, or of the raw matrices for target=factors; 0.0 while there is no
        energy (the first step). Works at weight 0 too: a control's spectrum.
        """
        sums = {role: torch.zeros(2, dtype=torch.float64) for role in ("A", "B")}
        for group in self._groups:
            for stack in group.stacks:
                energies = high_band_energy(stack.update(), self.spectrum, role=stack.role)
                sums[stack.role] += torch.stack([e.double().sum() for e in energies]).cpu()
        return {role: float(s[0] / s[1]) if s[1] > 0 else 0.0 for role, s in sums.items()}

    def warnings_at_start(self, task_loss_guess: float = 1.0) -> list[str]:
        """What is suspicious about this penalty on these weights; each line is logged as well."""
        if not self.config.active:
            return []
        found = []
        weighted = self.measure().weighted
        if self.config.detached:
            found.append(
                f"the penalty is detached (preset {self.config.preset}): lambda*P = {weighted:.4g} "
                "is logged but has no gradient; drop penalty.detached for a penalty that acts"
            )
        elif weighted > task_loss_guess:
            found.append(
                f"lambda*P = {weighted:.4g} dwarfs a task loss of about {task_loss_guess:.3g}: the "
                "adapter will shrink rather than learn; use preset flex or a smaller penalty.weight"
            )
        stacks = [stack for group in self._groups for stack in group.stacks]
        if not any(curvature_constant(s.shape, self.spectrum, role=s.role) for s in stacks):
            found.append(
                "rho is 0 at every frequency, so the penalty is inert: lower penalty.phi_high or "
                "penalty.threshold"
            )
        for message in found:
            log.warning(message)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The starting values A0, B0 by parameter name (copies); empty for target=factors."""
        return {name: start.clone() for name, start in self._starts().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore A0, B0, so that a resumed run measures its updates from the same point.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape differs; nothing is changed.
        """
        starts = self._starts()
        wrong = sorted(starts.keys() ^ state.keys())
        wrong += [n for n in starts if n in state and state[n].shape != starts[n].shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} starting weights of the penalty do not fit, the first is {wrong[0]}",
                "updates would be measured from another point than in the run that was saved",
                "resume with the lora section and penalty.target of that run, or set resume=never",
            )
        for name, start in starts.items():
            start.copy_(state[name])
        for group in self._groups:
            group.note_start()

    def _starts(self) -> dict[str, Tensor]:
        return {
            name: stack.start[i]
            for group in self._groups
            for stack in group.stacks
            if stack.start is not None
            for i, name in enumerate(stack.names)
        }

    def _by_device(self) -> dict[torch.device, list[tuple]]:
        """(name, parameter, role, w0 or None) of every matrix; the starts are views."""
        found: dict[torch.device, list[tuple]] = {}
        for stack in (stack for group in self._groups for stack in group.stacks):
            starts = [None] * len(stack.params) if stack.start is None else stack.start.unbind()
            members = zip(
                stack.names, stack.params, [stack.role] * len(starts), starts, strict=True
            )
            found.setdefault(stack.params[0].device, []).extend(members)
        return found

    def _find_spans(self, rank: int, world: int) -> list[tuple[int, slice]]:
        """Runs (group, members) of `rank`: the units whose middle lies in its 1/world of all."""
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}, world={world}; allowed: 0 <= rank < world")
        sizes = [self._groups[g].unit_elements for g, _ in self._units]
        total, before = sum(sizes), 0
        mine: dict[int, list[int]] = {}
        for (group, index), size in zip(self._units, sizes, strict=True):
            if (2 * before + size) * world // (2 * total) == rank:
                mine.setdefault(group, []).append(index)
            before += size
        return [(group, slice(run[0], run[-1] + 1)) for group, run in mine.items()]

    def _step(self, coupling: str, rank: int = 0, world: int = 1) -> Gradients:
        """What a step applies, checked to be applied as configured; fills `last_report`."""
        self._check_coupling(coupling)
        gradients, self.last_report = self._compute(rank, world)
        return gradients

    def _check_coupling(self, coupling: str) -> None:
        acts = self.config.active and not self.config.detached
        if acts and self.config.coupling != coupling:
            raise ConfigError(
                f"penalty.coupling={self.config.coupling}, but the {coupling} form was called",
                "the penalty would be applied in another way than configured",
                "gradient: add_gradients() or as_loss(); decoupled: decoupled_deltas()",
            )

    def _compute(self, rank: int, world: int) -> tuple[Gradients, PenaltyReport]:
        """lambda * grad P of a share (frozen matrices left out) and its figures."""
        zero = torch.zeros((), device=self.pairs[0].a.device)
        weighted, square = zero, zero
        gradients: Gradients = []
        for index, span in self._spans(rank, world) if self.config.active else ():
            group = self._groups[index]
            values, grads = group.gradients(span, self.spectrum, self._factor, self.impl)
            weighted = weighted + values.sum().to(zero.device)
            for stack, grad in zip(group.stacks, grads, strict=True):
                if stack.trainable and not self.config.detached:
                    gradients.append((stack.params[span], grad))
                    square = square + torch.linalg.vector_norm(grad).square().to(zero.device)
        return gradients, PenaltyReport(torch.stack([weighted, square]), self.config.weight)


class _PenaltyLoss(torch.autograd.Function):
    """0 forward; backward hands out gradients that are already known. Keeps no parameter in ctx."""

    @staticmethod
    def forward(
        ctx: Any, gradients: Gradients, world: float, places: dict, *params: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.world, ctx.places = gradients, world, places
        return torch.zeros((), device=params[0].device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        found: list[Tensor | None] = [None] * len(ctx.places)
        for params, stacked in ctx.gradients:
            scaled = stacked * (upstream * ctx.world).to(stacked.device, stacked.dtype)
            for param, grad in zip(params, scaled.unbind(), strict=True):
                found[ctx.places[id(param)]] = grad
        return None, None, None, *found


def _gradient_of(param: nn.Parameter) -> Tensor:
    """The gradient to add to; zeros where there is none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad
