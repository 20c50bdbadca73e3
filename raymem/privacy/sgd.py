"""DP-SGD's step with opacus: per-example gradients, clipped; noise; an update; all of it counted.

Shapes: n examples in the subset, B physical batch, C x H x W images, K classes.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymem.errors import FleetError, PrivacyError, first_line
from raymem.privacy.mechanism import Mechanism

PerExample = Literal["none", "expanded-weights", "ghost", "hooks", "vmap"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Layers whose per-example gradients torch's expanded weights know.
EXPANDABLE = (*CONVOLUTIONS, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
# Per-example gradients of a physical batch take at most this many bytes.
BYTES_FOR_GRADIENTS = 1 << 30


def poisson_batch(n: int, sample_rate: float, draws: torch.Generator) -> Tensor:
    """Which of n examples are in one step's batch: each with probability `sample_rate`, by itself.

    Places in the subset, int64, rising; there may be none. What is outside the subset has no place.

    >>> poisson_batch(5, 1.0, torch.Generator().manual_seed(0)).tolist()
    [0, 1, 2, 3, 4]
    """
    drawn = torch.rand(n, generator=draws, dtype=torch.float64) < sample_rate
    return drawn.nonzero()[:, 0]


def check_layers(model: nn.Module) -> None:
    """Raises PrivacyError for batch normalization over the batch, without running the model.

    `model` is in the mode it is trained in: batch normalization that stays in eval mode, as of a
    frozen backbone, mixes nothing.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or module.running_mean is None:
            raise PrivacyError(
                f"layer {name} is a {type(module).__name__}: it mixes the examples of a batch, so "
                "that no gradient is one example's; take the model's name with -gn, which has "
                "GroupNorm instead"
            )


def modes_of(model: nn.Module) -> tuple[PerExample, ...]:
    """The ways to per-example gradients that may be exact for `model`, cheapest first.

    `expanded-weights` for nets with convolutions, `ghost` for those without, `hooks` for layers
    that neither knows, `vmap` for what goes beyond layers (weights that layers share, nn.RNN);
    see docs/decisions.md.
    """
    named = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if len(set(named)) < len(named):
        # Opacus would count a layer with two names twice, and clip tied weights layer by layer.
        return ("vmap",)
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    if not all(isinstance(module, EXPANDABLE) for module in owners):
        return ("hooks", "vmap")
    convolutional = any(isinstance(module, CONVOLUTIONS) for module in owners)
    return ("expanded-weights" if convolutional else "ghost", "hooks", "vmap")


def physical_batch(model: nn.Module, mechanism: Mechanism) -> int:
    """How many per-example gradients are in memory at once: of about a gigabyte, at most 512."""
    n_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return max(1, min(512, BYTES_FOR_GRADIENTS // max(1, n_bytes), 2 * mechanism.expected_batch))


class PrivateSteps:
    """The steps of one model's training under a mechanism.

    `add` the physical batches of a logical one, none or several, then `step`. A logical batch ends
    with its step, and with nothing else: noise is added once to the sum of all, also to that of an
    empty batch.

    At epsilon inf the same sums are divided and stepped with, without clipping and noise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        noise_seed: int,
        *,
        mode: PerExample | None = None,
    ) -> None:
        self.mechanism = mechanism
        self.batch = physical_batch(model, mechanism)
        """Largest physical batch."""
        self.mode: PerExample = (mode or modes_of(model)[0]) if mechanism.clips else "none"
        self.steps = 0
        """Steps taken."""
        device = next(model.parameters()).device
        if mechanism.secure_mode:
            noise_seed = secrets.randbits(63)
        self.noise = torch.Generator(device).manual_seed(noise_seed)
        self._model, self._inner = model, optimizer
        self._optimizer: Any = optimizer
        self._account: Any = None
        self._wrapped: Any = model
        if mechanism.clips:
            check_layers(model)
            self._make_private()

    def _make_private(self) -> None:
        from opacus.accountants import create_accountant
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        m = self.mechanism
        ghost = self.mode == "ghost"
        try:
            if ghost:
                self._wrapped = GradSampleModuleFastGradientClipping(
                    self._model, strict=False, max_grad_norm=m.max_grad_norm
                )
            elif self.mode == "expanded-weights":
                self._wrapped = GradSampleModuleExpandedWeights(self._model, loss_reduction="sum")
            elif self.mode == "hooks":
                self._wrapped = GradSampleModule(self._model, loss_reduction="sum", strict=False)
        except NotImplementedError as error:
            raise PrivacyError(
                f"opacus has no per-example gradients of this model ({first_line(error)}); take "
                "another model"
            ) from error
        kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
        self._optimizer = kind(
            self._inner,
            noise_multiplier=m.noise_multiplier,
            max_grad_norm=m.max_grad_norm,
            expected_batch_size=m.expected_batch,
            generator=self.noise,
            secure_mode=m.secure_mode,
        )
        self._account = create_accountant("rdp" if m.accountant == "none" else m.accountant)
        self._optimizer.attach_step_hook(
            # Once for every noise that is added, whatever the loop around it believes.
            lambda optimizer: self._account.step(
                noise_multiplier=optimizer.noise_multiplier, sample_rate=m.sample_rate
            )
        )

    def add(self, x: Tensor, y: Tensor, *, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Add the gradients of a physical batch to the sum, each clipped by itself.

        x: float [B, C, H, W], y: int64 [B]. Returns the loss [B] (without smoothing), and if the
        model was right [B], before the step.
        """
        if self.mechanism.clips:
            self._optimizer.signal_skip_step(True)
            self._optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hooks whose input needs no gradient
            if self.mode == "vmap":
                logits = self._vmapped_gradients(x, y, smoothing)
            else:
                logits = self._wrapped(x).float()
            loss = F.cross_entropy(logits, y, reduction="none")
            objective = loss
            if smoothing:
                objective = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
            if self.mode == "ghost":
                self._ghost_backward(objective)
            elif self.mode != "vmap":
                # Of a mean, every gradient would have to be multiplied by B again.
                objective.sum().backward()  # type: ignore[no-untyped-call]
        if self.mechanism.clips:
            self._check_rows(len(x))
            self._optimizer.step()
        return loss.detach(), logits.detach().argmax(1) == y

    def _ghost_backward(self, objective: Tensor) -> None:
        """Two passes: norms of gradients, then the gradient of the sum with clipping's weights."""
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        DPTensorFastGradientClipping(self._wrapped, self._optimizer, objective).backward()

    def _vmapped_gradients(self, x: Tensor, y: Tensor, smoothing: float) -> Tensor:
        """The logits [B, K]; per-example gradients of the model as a function of one image."""
        trained = {p: p.detach() for p in self._model.parameters() if p.requires_grad}
        # Every layer once, with all weights it has: torch's own tie_weights leaves a layer that
        # has two names without its parameters.
        owned = [
            (f"{prefix}.{name}".lstrip("."), p)
            for prefix, module in self._model.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if p in trained
        ]

        def loss_of(
            weights: dict[nn.Parameter, Tensor], x: Tensor, y: Tensor
        ) -> tuple[Tensor, Tensor]:
            of_layers = {name: weights[p] for name, p in owned}
            logits = torch.func.functional_call(
                self._model, of_layers, (x[None],), tie_weights=False
            ).float()
            return F.cross_entropy(logits, y[None], label_smoothing=smoothing), logits[0]

        of_each = torch.func.vmap(
            torch.func.grad(loss_of, has_aux=True), in_dims=(None, 0, 0), randomness="different"
        )
        gradients, logits = of_each(trained, x, y)
        for p, gradient in gradients.items():
            p.grad_sample = gradient
        return logits  # type: ignore[no-any-return]

    def _check_rows(self, B: int) -> None:
        """A model that cuts its batch into chunks has the gradients of several examples in one."""
        if self.mode == "ghost":
            return  # norms of fewer examples than losses are an error there
        for name, p in self._model.named_parameters():
            rows = getattr(p, "grad_sample", None)
            if isinstance(rows, Tensor) and len(rows) != B:
                raise PrivacyError(
                    f"{name} has {len(rows)} per-example gradients of {B} examples: the model cuts "
                    "a batch into chunks; remove the chunks, physical batches are cut to fit the "
                    "memory anyway"
                )

    def step(self) -> None:
        """Noise, the division, and one update; ends the logical batch."""
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if not self.mechanism.clips:
            for p in parameters:
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = gradient / self.mechanism.expected_batch
            self._inner.step()
            self._inner.zero_grad()
        else:
            # A last physical batch of nobody: with it the optimizer ends the sum.
            self._optimizer.signal_skip_step(False)
            self._optimizer.zero_grad()
            for p in parameters:
                if self.mode == "ghost":
                    p.grad = torch.zeros_like(p)
                else:
                    p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.steps += 1

    def state(self) -> dict[str, object]:
        """What a checkpoint holds of the mechanism, between two steps."""
        history = [] if self._account is None else self._account.history
        return {
            "steps": self.steps,
            "account": [list(entry) for entry in history],
            "noise": self.noise.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; in secure mode with new randomness."""
        self.steps = state["steps"]
        if self._account is not None:
            self._account.history = [tuple(entry) for entry in state["account"]]
        if not self.mechanism.secure_mode:
            self.noise.set_state(state["noise"])

    def close(self) -> None:
        """Check that what was done is what is accounted for, and leave the model as it was.

        Raises FleetError if not: then no number of the trial may be believed.
        """
        m = self.mechanism
        if self._account is not None:
            counted = self._account.history
            if counted != [(m.noise_multiplier, m.sample_rate, m.steps)] or self.steps != m.steps:
                raise FleetError(
                    f"{self.steps} steps were taken and {counted} accounted for, of {m.steps} "
                    "planned; this is a fault of raymem or opacus: report it with the command"
                )
            if self.mode in ("ghost", "hooks"):
                self._wrapped.remove_hooks()
        for p in self._model.parameters():
            for name in ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter"):
                if hasattr(p, name):
                    delattr(p, name)
            p.grad = None


def physical_batches(places: Tensor, largest: int) -> Iterator[slice]:
    """A logical batch in equal parts of at most `largest`; none for an empty one."""
    B = len(places)
    parts = -(-B // largest)
    for k in range(parts):
        yield slice(B * k // parts, B * (k + 1) // parts)
