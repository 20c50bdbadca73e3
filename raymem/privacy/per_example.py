"""Is each gradient one example's own? Models are tested as functions, before private training.

DP-SGD bounds what one example does to the sum of clipped gradients only if an example's gradient
depends on no other example. No list of layers can promise that: a model may mix the examples of a
batch in a line of its own code. So the function itself is tested, on random images: what moves when
one of them is replaced, taken away, or repeated.

Shapes: B batch, C x H x W images, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymem.errors import PrivacyError, first_line
from raymem.privacy.mechanism import Mechanism
from raymem.privacy.sgd import PerExample, PrivateSteps, check_layers, modes_of

SEED = 0
BATCH_SIZES = (2, 5)
# Of a model that draws random numbers: mixup in one of ten batches is missed by 0.5% of the checks.
DRAWS = 32
# Relative to the largest logit: equal batch sizes take equal kernels and round equally, others may
# not.
SAME_SIZE, OTHER_SIZE = 1e-6, 1e-4
# Relative to the longest gradient: opacus takes losses in float32 and adds 1e-6 to norms. With
# float32 weights, rounding at a ReLU's kink was seen to move a gradient by 0.4%.
GRADIENT = {torch.float64: 1e-5, torch.float32: 2e-2}
# Weights that start at zero (a residual branch's last scale) would hide what is behind them.
LEAST_JITTER = 0.1
CURE = "take a model that treats each image by itself"


def check_private(model: nn.Module, image_shape: tuple[int, int, int]) -> PerExample:
    """Test that `model` (float images [B, C, H, W] in [0, 1] -> logits [B, K]) can train privately.

    In train mode, with the weights as they are and with random ones: a forward pass changes no
    buffer and remembers no earlier batch; replacing, adding or removing an image moves no other
    image's logits, nor do gradients flow between them; random numbers (dropout) are each image's
    own; and the sum of clipped gradients is that of each example's gradient taken alone.
    `image_shape` is (H, W, C).

    The test runs on a copy on the CPU, with random images, and leaves torch's random state as it
    was. Returns the cheapest way to per-example gradients for which all of this holds.

    Raises PrivacyError that names the layer where it can be found.

    >>> check_private(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (2, 2, 1))
    'ghost'
    """
    check_function(model, image_shape)
    with _copy_on_cpu(model, SEED + 1) as net:
        _jitter(net)
        _check_passes(_copied(net), image_shape)
        # A head or a residual branch that starts at zero hides the gradients behind it.
        return next(exact_modes(net, image_shape))


def check_function(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """The cheap part of `check_private`, with the weights as they are: no image moves another's.

    Raises PrivacyError.
    """
    with _copy_on_cpu(model) as net:
        check_layers(net)
        _check_passes(net, image_shape)


def _check_passes(net: nn.Module, image_shape: tuple[int, int, int]) -> None:
    for B in BATCH_SIZES:
        x = torch.rand(B, *_channels_first(image_shape))
        logits = _check_state(net, x)
        if not bool(torch.isfinite(logits).any(1).all()):
            raise PrivacyError(
                "the logits of random images are not finite, so that the model cannot be tested; "
                "check its initial weights"
            )
        is_random = BATCH_SIZES[-1] == B and _is_random(net, x)
        seeds = [int(seed) for seed in torch.randint(1 << 31, (DRAWS if is_random else 1,))]
        _check_replaced(net, x, seeds)
        _check_backward(net, x)
        if is_random:
            _check_draws(net, x, seeds)
        _check_removed(net, x)


@contextlib.contextmanager
def _copy_on_cpu(model: nn.Module, seed: int = SEED) -> Iterator[nn.Module]:
    """A copy in train mode; random numbers outside are left alone."""
    with _seeded(seed):
        try:
            net = _copied(model).to("cpu").train()
            yield net.to(memory_format=torch.contiguous_format)
        except PrivacyError:
            raise
        except Exception as error:  # a user's model can raise anything
            raise PrivacyError(
                "cannot check that the model treats each image independently: it does not run "
                f"on random images, 1 to 5 of them, on the CPU ({first_line(error)}); make "
                "`model(torch.rand(B, C, H, W))` return logits [B, K] for every B"
            ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All that a model may draw from starts at `seed`, and is put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; what modules keep of their last pass (attention maps) loses its graph."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for kept in vars(module).values():
            values = kept.values() if isinstance(kept, dict) else kept
            for t in values if isinstance(values, Iterable) else (values,):
                if isinstance(t, Tensor) and not t.is_leaf:
                    memo[id(t)] = t.detach().clone()
    return copy.deepcopy(model, memo)


def _channels_first(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    H, W, C = image_shape
    return C, H, W


def _jitter(net: nn.Module) -> None:
    """Random weights of the size they have, and none that is zero."""
    with torch.no_grad():
        for p in net.parameters():
            spread = float(p.std()) if p.numel() > 1 else 0.0
            p.add_(torch.randn_like(p) * (spread or LEAST_JITTER))


def _logits(net: nn.Module, x: Tensor, seed: int = SEED) -> Tensor:
    """Of a forward pass in train mode that draws from `seed`."""
    with _seeded(seed), torch.no_grad():
        logits: Tensor = net(x.clone()).float()  # a model may normalize its images in place
    return logits


def _is_random(net: nn.Module, x: Tensor) -> bool:
    """Whether a forward pass draws random numbers: seen from the generators, not from logits."""
    with _seeded(SEED):
        unused = _next_draws()
    with _seeded(SEED), torch.no_grad():
        net(x.clone())
        return _next_draws() != unused


def _next_draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def _moved(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Which rows differ, bool [B]; all that is not finite in the same way is equal."""
    a, b = a.flatten(1), b.flatten(1)
    finite = torch.isfinite(a) & torch.isfinite(b)
    scale = float(a[torch.isfinite(a)].abs().max()) if bool(torch.isfinite(a).any()) else 1.0
    far = (a - b).abs() > tolerance * max(scale, 1e-30)
    return (torch.where(finite, far, torch.isfinite(a) != torch.isfinite(b))).any(1)


def _check_state(net: nn.Module, x: Tensor) -> Tensor:
    """A forward pass leaves nothing of its images behind, in a buffer or elsewhere. The logits.

    What a first pass makes for all images alike (a grid of positions) may stay.
    """
    other = _copied(net)
    _logits(other, torch.rand_like(x))
    first = _logits(net, x)
    _check_unchanged(net, _state_of(other))
    before = {name: t.clone() for name, t in _state_of(net).items()}
    _logits(net, torch.rand_like(x))
    _check_unchanged(net, before)
    for seen in (net, other):
        if bool(_moved(first, _logits(seen, x), SAME_SIZE).any()):
            raise PrivacyError(
                "the model gives other logits for the same images after it has seen others: it "
                "remembers earlier batches, or draws random numbers from a generator of its own; "
                f"{CURE}, and draws from torch's generator"
            )
    return first


def _check_unchanged(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, t in _state_of(net).items():
        if name not in before or not _equal(t, before[name]):
            raise PrivacyError(
                f"a forward pass in train mode changes {_named(net, name)}: what it keeps of a "
                "batch reaches later ones past clipping and noise; switch running statistics off, "
                f"or {CURE}"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that private training must leave alone: buffers, and weights not trained."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {n: t.detach().clone() for n, t in _state_of(model).items() if n not in trained}


def check_frozen(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raises PrivacyError if what `frozen_state` had `before` training is not the same now.

    So buffers that change once in a hundred passes are found, which `check_function` may miss.
    """
    after = _state_of(model)
    _check_unchanged(model, before | {n: t for n, t in after.items() if n not in before})


def _state_of(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_buffers()), **dict(net.named_parameters())}


def _named(net: nn.Module, name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    kind = type(net.get_submodule(owner)).__name__
    return f"{leaf} of {f'layer {owner}' if owner else 'the model itself'} ({kind})"


def _check_replaced(net: nn.Module, x: Tensor, seeds: list[int]) -> None:
    """Another image in one place moves the logits in no other place."""
    B = len(x)
    for seed in seeds:
        logits = _logits(net, x, seed)
        # A random image, and one far outside: a rare branch is more likely to be taken.
        for place, other in ((0, torch.rand_like(x[0])), (B - 1, torch.ones_like(x[0]))):
            changed = x.clone()
            changed[place] = other
            moved = _moved(logits, _logits(net, changed, seed), SAME_SIZE)
            moved[place] = False
            if bool(moved.any()):
                raise PrivacyError(
                    f"{_where_mixed(net, x, changed, place, seed)} mixes the examples of a batch: "
                    f"another image in one place of {B} moves the logits of others, so that no "
                    f"gradient is one example's; {CURE}: GroupNorm or LayerNorm for statistics "
                    "over the batch"
                )


def _check_backward(net: nn.Module, x: Tensor) -> None:
    """The gradient of one image's logits is zero at all other images."""
    images = x.clone().requires_grad_()
    with _seeded(SEED):
        logits = net(images.clone())
    if not logits.requires_grad:
        return
    # Not of their plain sum, which is constant for a model that returns probabilities.
    weighted = logits[0] @ torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype)
    (gradient,) = torch.autograd.grad(weighted, images, allow_unused=True)
    if gradient is not None and bool((gradient[1:] != 0).any()):
        raise PrivacyError(
            "a backward pass mixes the examples of a batch: the gradient of one image's logits "
            f"reaches others, past clipping; {CURE}"
        )


def _check_draws(net: nn.Module, x: Tensor, seeds: list[int]) -> None:
    """Random numbers are drawn for each image: one mask for the whole batch ties it together."""
    same = x[:1].expand_as(x).contiguous()
    with _without_dropout(net):
        passes = [_logits(net, same, seed) for seed in seeds]
    shared = all(not bool(_moved(p, p[:1].expand_as(p), SAME_SIZE).any()) for p in passes)
    differ = any(bool(_moved(passes[0], p, SAME_SIZE).any()) for p in passes)
    if shared and differ:
        raise PrivacyError(
            "the model draws one random mask for the whole batch: what happens to an example then "
            "depends on the batch it is in; draw one for each image, as nn.Dropout does"
        )


def _check_removed(net: nn.Module, x: Tensor) -> None:
    """Without the first or the last image the others' logits are the same."""
    with _without_dropout(net):
        whole = _logits(net, x)
        if _is_random(net, x):
            return  # it draws random numbers, others for another batch size
        for kept in (slice(1, None), slice(None, -1)):
            if bool(_moved(whole[kept], _logits(net, x[kept]), OTHER_SIZE).any()):
                raise PrivacyError(
                    "the logits of an image depend on how many are in its batch, or on its place "
                    f"there; {CURE}"
                )


@contextlib.contextmanager
def _without_dropout(net: nn.Module) -> Iterator[None]:
    """torch's own dropout, which draws for each element, switched off."""
    layers = [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    before = [m.training for m in layers]
    for m in layers:
        m.eval()
    try:
        yield
    finally:
        for m, training in zip(layers, before, strict=True):
            m.train(training)


def _where_mixed(net: nn.Module, x: Tensor, changed: Tensor, place: int, seed: int) -> str:
    """The first layer that gives something else in another place, or the code before it."""
    names = {module: name for name, module in net.named_modules()}
    records: list[list[tuple[nn.Module, Tensor | None, Tensor]]] = []
    for images in (x, changed):
        seen: list[tuple[nn.Module, Tensor | None, Tensor]] = []

        def note(module: nn.Module, args: Any, output: Any, seen: Any = seen) -> None:
            if isinstance(output, Tensor) and output.ndim > 0 and len(output) == len(x):
                first = args[0] if args and isinstance(args[0], Tensor) else None
                kept = None if first is None or len(first) != len(x) else first.clone()
                seen.append((module, kept, output.clone()))

        hooks = [module.register_forward_hook(note) for module in net.modules()]
        try:
            _logits(net, images, seed)
        finally:
            for hook in hooks:
                hook.remove()
        records.append(seen)
    for (module, in_a, out_a), (_, in_b, out_b) in zip(*records, strict=False):
        if not _others_moved(out_a, out_b, place):
            continue
        kind = f"layer {names[module] or 'of the model itself'} ({type(module).__name__})"
        clean = in_a is not None and in_b is not None and not _others_moved(in_a, in_b, place)
        return kind if clean or in_a is None else f"the code before {kind}"
    return "the model"


def _others_moved(a: Tensor, b: Tensor, place: int) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return False
    moved = _moved(a, b, SAME_SIZE)
    moved[place] = False
    return bool(moved.any())


def exact_modes(net: nn.Module, image_shape: tuple[int, int, int]) -> Iterator[PerExample]:
    """The model's modes in which clipped sums are those of gradients taken alone, cheapest first.

    `net` is in train mode, and its gradients are reset. Raises PrivacyError if there is none.
    """
    B = 4
    x = torch.rand(B, *_channels_first(image_shape))
    K = _logits(net, x).shape[1]
    y = torch.randint(0, K, (B,))
    double, x_double = _in_double(net, x)
    with _without_dropout(double):
        random_alone = _is_random(double, x_double)
    problems: list[PrivacyError] = []
    modes = modes_of(net)
    for mode in modes:
        try:
            if not random_alone:
                with _without_dropout(double):
                    _check_gradients(double, x_double, y, mode)
            if _is_random(double, x_double):
                _check_separate(double, x_double, y, mode)
            clipped_sum(_copied(net), x, y, 1.0, mode)  # as in training: types, dropout
        except PrivacyError as problem:
            problems.append(problem)
        else:
            yield mode
    if len(problems) == len(modes):
        # The last to run says which parameter it is; torch alone says best what cannot run at all.
        ran = [p for p in problems if not isinstance(p, _CannotRunError)]
        raise (ran or problems)[-1]


class _CannotRunError(PrivacyError):
    """opacus cannot take per-example gradients in some mode."""


def _in_double(net: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the net and its images in float64, or as they are if the net insists on float32."""
    try:
        double = _copied(net).double()
        _logits(double, x.double())
    except RuntimeError:
        return net, x
    return double, x.double()


def clipped_sum(
    net: nn.Module, x: Tensor, y: Tensor, max_grad_norm: float, mode: PerExample
) -> dict[str, Tensor]:
    """What private training adds up for a batch, before noise: by parameter's name.

    x: float [B, C, H, W], y: int64 [B]. Raises PrivacyError if opacus cannot do it in this `mode`.
    """
    mechanism = Mechanism(
        epsilon=1.0,
        delta=1e-5,
        sample_rate=1.0,
        expected_batch=1,
        steps=1,
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        accountant="rdp",
        spent_epsilon=1.0,
        total_variation=None,
    )
    found: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def note(*_: object) -> None:
        found.update((n, p.grad.clone()) for n, p in net.named_parameters() if p.grad is not None)

    optimizer.register_step_pre_hook(note)
    try:
        private = PrivateSteps(net, optimizer, mechanism, SEED, mode=mode)
        with _seeded(SEED):
            private.add(x.clone(), y)
        private.step()
        private.close()
    except PrivacyError:
        raise
    except Exception as error:  # opacus refuses in many ways, some only in the backward pass
        raise _CannotRunError(
            "neither opacus nor torch.func.vmap can take per-example gradients of this model "
            f"({first_line(error)}); build it from layers that both know: opacus.layers has LSTM "
            "and GRU, and torch.utils.checkpoint is not needed, because physical batches are small"
        ) from error
    return found


def _alone(net: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Each example's gradient by torch's autograd, in a batch of one."""
    gradients = []
    for i in range(len(x)):
        net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x[i : i + 1].clone()).float(), y[i : i + 1])
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(
            {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        )
    net.zero_grad(set_to_none=True)
    return gradients


def _norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def _check_gradients(net: nn.Module, x: Tensor, y: Tensor, mode: PerExample) -> None:
    """Clipped sums are those of the examples' gradients taken alone, each parameter's too."""
    alone = _alone(_copied(net), x, y)
    norms = sorted(_norm(g) for g in alone)
    _check_norm(norms[-1])
    # First one that clips nobody, so that the parameter at fault is seen; then one between.
    for C in (1e4 * norms[-1], (norms[0] + norms[-1]) / 2):
        weights = [min(1.0, C / max(_norm(g), 1e-30)) for g in alone]
        got = clipped_sum(_copied(net), x, y, C, mode)
        for name, p in net.named_parameters():
            parts = [w * g[name] for w, g in zip(weights, alone, strict=True) if name in g]
            expected = torch.stack(parts).sum(0) if parts else torch.zeros_like(p)
            difference = float((got.get(name, torch.zeros_like(p)) - expected).norm())
            if not difference <= GRADIENT[x.dtype] * norms[-1]:
                raise PrivacyError(
                    f"the per-example gradients of {_named(net, name)} are not those of its "
                    "examples taken alone: the parameter is used outside of its layer's own call, "
                    "or a backward pass mixes examples, and clipping would not bound it; take "
                    "plain layers, each with its own weights"
                )


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm) or norm == 0:
        raise PrivacyError(
            f"gradients of random images are {norm:g}: nothing to train on; check the model's "
            "initial weights"
        )


def _check_separate(net: nn.Module, x: Tensor, y: Tensor, mode: PerExample) -> None:
    """For models that draw random numbers, whose gradients cannot be taken alone with equal draws.

    An example by itself is clipped to C, and replacing one moves the sum by the same whatever
    another one is: then the sum is one of terms of one example each, none longer than C.
    """

    def total(x: Tensor, C: float) -> dict[str, Tensor]:
        return clipped_sum(_copied(net), x, y[: len(x)], C, mode)

    length = max(_norm(total(x[i : i + 1], 1e10)) for i in range(len(x)))
    _check_norm(length)
    short = length / 10
    longest = max(_norm(total(x[i : i + 1], short)) for i in range(len(x)))
    if not longest <= short * (1 + GRADIENT[x.dtype]):
        raise PrivacyError(
            f"one example alone moves the clipped sum by {longest / short:.3g} C, more than the C "
            "that clipping allows: a parameter is used outside of its layer's own call; take plain "
            "layers, each with its own weights"
        )
    first, last = x.clone(), x.clone()
    first[0], last[-1] = torch.rand_like(x[0]), torch.rand_like(x[0])
    both = first.clone()
    both[-1] = last[-1]
    for C in (1e4 * length, 0.9 * length):
        sums = [total(images, C) for images in (x, first, last, both)]
        rest = _norm({n: a - b - c + d for n, (a, b, c, d) in _zipped(sums).items()})
        if not rest <= GRADIENT[x.dtype] * length:
            raise PrivacyError(
                f"what one example adds to the clipped sum depends on another one, by "
                f"{rest / C:.3g} C: gradients mix examples; {CURE}"
            )


def _zipped(sums: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [one[name] for one in sums] for name in sums[0]}
