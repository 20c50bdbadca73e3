"""Many models as one: each parameter and buffer of G models is one tensor, and one step moves all.

`torch.func.vmap` of one model's gradients over the stacks: a linear layer becomes a batched matrix
product, a convolution one with groups. The models themselves are views of the stacks, so that what
is written here is in them.

Shapes: G models, B batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from raymem.training.checkpoint import Training
from raymem.training.history import History
from raymem.training.images import Images, as_input, take
from raymem.training.optimizer import Optimizer
from raymem.training.precision import DTYPES, autocast
from raymem.training.recipe import Recipe
from raymem.training.step import Feed, losses

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
COUNTER = "num_batches_tracked"
# How far the first batch's losses and statistics may be from those of one model by itself.
TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 5e-2}


class NotStackable(Exception):
    """These models cannot be trained in one step."""


class Stack:
    """G models of one kind, stacked."""

    def __init__(self, states: Sequence[Training], recipe: Recipe) -> None:
        models = [state.model for state in states]
        self.one = copy.deepcopy(models[0])
        """A model by itself: what the others are compared with, and then only a form to fill."""
        self._check()
        self._models, self._states, self._recipe = models, states, recipe
        trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
        tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in models]
        stacked = {
            name: _share([own[name] for own in tensors])
            for name in tensors[0]
            if not name.endswith(COUNTER)
        }
        self.parameters = {name: t for name, t in stacked.items() if name in trained}
        """[G, ...] each."""
        self.fixed = {name: t for name, t in stacked.items() if name not in trained}
        """Buffers, and parameters that are not trained; BatchNorm's statistics change in place."""
        self.optimizer = self._optimizer()
        self.history = self._history()
        self._counters = {n: int(b) for n, b in models[0].named_buffers() if n.endswith(COUNTER)}
        self._started = states[0].step
        self._calls = dict.fromkeys(self._counters, 0)

    def _check(self) -> None:
        for name, module in self.one.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
                raise NotStackable(f"{name} averages its statistics over all batches")

    def _optimizer(self) -> Optimizer:
        optimizer = Optimizer(list(self.parameters.values()), self._recipe)
        own = [state.optimizer for state in self._states]
        for k, moments in enumerate(optimizer.moments):
            for i in range(len(moments)):
                moments[i] = _share([one.moments[k][i] for one in own])  # type: ignore[attr-defined]
        return optimizer

    def _history(self) -> History:
        device = next(iter(self.parameters.values())).device
        whole = History(len(self._states), max(state.n for state in self._states), device)
        for g, state in enumerate(self._states):
            for name in History.NAMES:
                values = getattr(whole, name)
                values[g, : state.n] = getattr(state.history, name)[0, : state.n]
            state.history = whole.of(g)
        return whole

    def count_batches(self) -> None:
        """BatchNorm's own counters, which no step needs: brought to where training is."""
        taken = self._states[0].step - self._started
        for model in self._models:
            buffers = dict(model.named_buffers())
            for name, before in self._counters.items():
                buffers[name].fill_(before + self._calls[name] * taken)


class StackedStep:
    """One step of all models of a stack, over static buffers."""

    def __init__(self, stack: Stack, images: Images, recipe: Recipe, feed: Feed) -> None:
        self.stack, self.images, self.recipe, self.feed = stack, images, recipe, feed
        self._expected: dict[str, Tensor] | None = None
        self._all: Callable[..., Any] | None = None

    def __call__(self, pixels: Tensor | None = None) -> None:
        """One step; the first is compared with that of one model. Raises NotStackable."""
        if self._all is not None:
            self._step()
            return
        at = self.feed.at.clone()
        expected = self._of_one()
        self._all = vmap(grad_and_value(self._objective, has_aux=True))
        self._step()
        self._compare(expected, self.feed.loss.index_select(0, at)[0, 0])

    def _step(self) -> None:
        stack = self.stack
        x, y, rates = self._batch()
        assert self._all is not None
        gradients, (_, (loss, right)) = self._all(stack.parameters, stack.fixed, x, y)
        stack.optimizer.step(rates, [gradients[name] for name in stack.parameters])
        self.feed.show(loss, right)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images [G, B, C, H, W], labels [G, B], rates [3]."""
        rows, draws, rates = self.feed.batch()
        flat = {name: values.flatten(0, 1) for name, values in draws.items()}
        x = take(self.images.x_train, rows.flatten(), flat, self.recipe)
        x = as_input(x, torch.contiguous_format)
        x = x.view(*rows.shape, *x.shape[1:])
        return x, self.images.y_train[rows], rates

    def _objective(
        self, parameters: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Of one model."""
        half = DTYPES.get(self.recipe.precision)
        if half is not None:
            parameters = {
                name: p if name in self._in_float32 else p.to(half)
                for name, p in parameters.items()
            }
        logits = functional_call(self.stack.one, {**parameters, **fixed}, (x,))
        loss, objective = losses(logits, y, self.recipe)
        return objective, (loss.detach(), logits.detach().argmax(1) == y)

    @torch.no_grad()
    def _of_one(self) -> dict[str, Tensor]:
        """The first model's losses and buffers after its first batch, computed by itself."""
        one = self.stack.one
        x, y, _ = self._batch()
        with autocast(x.device, self.recipe):
            logits = one(x[0])
        buffers = {name: value.clone() for name, value in one.named_buffers()}
        for name, before in self.stack._counters.items():
            self.stack._calls[name] = int(buffers.pop(name)) - before
        self._make_form()
        return {**buffers, "": losses(logits, y[0], self.recipe)[0]}

    def _make_form(self) -> None:
        """Leaves of the model that is filled by vmap: no counters, and casts for half precision.

        Autocast is not for vmap: BatchNorm's gradients would come back in another type. As there,
        layers with weights compute in half precision, normalization in float32.
        """
        half = DTYPES.get(self.recipe.precision)
        self._in_float32: set[str] = set()
        for prefix, module in self.stack.one.named_modules():
            if hasattr(module, COUNTER):
                setattr(module, COUNTER, None)
            own = [name for name, _ in module.named_parameters(recurse=False)]
            if isinstance(module, NORMS):
                # cuDNN's gradient asks for the layout of its input; vmap knows one only.
                module.register_forward_pre_hook(_contiguous)
            if half is None:
                continue
            if isinstance(module, NORMS):
                self._in_float32 |= {f"{prefix}.{name}".lstrip(".") for name in own}
                module.register_forward_pre_hook(_casting_to(torch.float32))
                module.register_forward_hook(_output_to(half))
            elif own:
                module.register_forward_pre_hook(_casting_to(half))

    def _compare(self, expected: dict[str, Tensor], loss: Tensor) -> None:
        limit = TOLERANCE[self.recipe.precision]
        found = {name: value[0] for name, value in self.stack.fixed.items()}
        for name, value in expected.items():
            other = loss if name == "" else found[name]
            if value.is_floating_point() and not torch.allclose(
                other.float(), value.float(), rtol=limit, atol=limit, equal_nan=True
            ):
                what = f"its buffer {name}" if name else "its loss"
                raise NotStackable(f"of one model by itself {what} is another")


def _share(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor [G, ...] of G; each becomes a view of it."""
    with torch.no_grad():
        stacked = torch.stack([t.detach() for t in tensors]).contiguous()
    for g, tensor in enumerate(tensors):
        tensor.data = stacked[g]
    return stacked


def _contiguous(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


def _casting_to(
    dtype: torch.dtype,
) -> Callable[[nn.Module, tuple[object, ...]], tuple[object, ...]]:
    def hook(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
        )

    return hook


def _output_to(dtype: torch.dtype) -> Callable[[nn.Module, tuple[object, ...], object], object]:
    def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> object:
        return output.to(dtype) if isinstance(output, Tensor) else output

    return hook
