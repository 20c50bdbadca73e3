"""tr H and tr H^2 of the input Hessian H, per example: exact where it can be, else unbiased.

For logits f(x), p = softmax(f), J = df/dx and cross entropy,

    H = J' S J + sum_k (p_k - 1[k = y]) grad^2 f_k,    S = diag(p) - p p'.

The first part is the Gauss-Newton matrix. Nets of convolutions, linear layers, ReLU, max-pool and
BatchNorm in eval mode are piecewise linear: grad^2 f_k = 0 almost everywhere, and H is that part.

**Gauss-Newton.** Let c be the likeliest class, D_k = J_k - J_c for the K-1 others. S restricted to
them factors as B B', b_j = sqrt(p_j) (e_j - p / (1 + sqrt(p_c))), so that tr H = sum_j |D'b_j|^2: a
sum of squares, without cancellation however confident the model is, from K-1 backward passes. With
many classes the likeliest columns b_j are taken exactly, and the sum over the rest is estimated
with Rademacher probes, unbiased; how many of each, the example's own p says.

**Hessian.** For other nets the second part R is added by Hutchinson's estimator (1990), E[v'Rv] for
Rademacher v: only what Gauss-Newton misses has an error. R is the Hessian of sum_k r_k f_k with the
weights r = p - 1[k = y] held fixed, so that Rv is one forward-over-reverse pass (Pearlmutter 1994)
without the differences of softmax, which on confident examples leave no digit of float32.

Shapes: B batch, K classes, q exact columns, s logit probes, n input probes, d values per image.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from raymem.curvature.input_checks import (
    check_inputs,
    differentiable,
    float32_products,
    plain_arithmetic,
)
from raymem.curvature.paper import PaperRule
from raymem.curvature.probes import image_signs, keys_of, signs
from raymem.errors import CurvatureError, first_line
from raymem.models import margins
from raymem.settings import Setting

Mode = Literal["gauss-newton", "hessian"]
Precision = Literal["auto", "float32", "tf32", "bfloat16"]
# Slowest first, on GPUs that have all.
PRECISIONS = ("float32", "tf32", "bfloat16")
# |Rv| / |Hv| is exactly 0 on BatchNorm-ReLU nets, 0.56 on GroupNorm-ReLU, 0.74 on GELU.
RESIDUAL_IS_NOISE = 1e-3
CHECKED = 32
# Streams of probes: no two uses of one example's key share signs.
LOGIT_STREAM, INPUT_STREAM, CHECK_STREAM = 0, 1 << 20, 2 << 20


def parse_every(text: str) -> int:
    """N of "N", 1 of "every". Raises ValueError for anything else."""
    if text == "every":
        return 1
    if not (text.isdecimal() and int(text) >= 1):
        raise ValueError(f"invalid number of epochs {text!r}; give every, or a number from 1 on")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class CurvatureRule:
    """How curvature is measured. Part of a study's identity if the study measures it.

    Raises CurvatureError for settings that make no sense.

    >>> CurvatureRule(mode="hessian").probes
    8
    """

    mode: Literal["auto", "gauss-newton", "hessian"] = "auto"
    """How the trace of the Hessian is computed; auto: Gauss-Newton where that is the whole Hessian,
    as for networks of ReLUs."""
    exact_classes: Annotated[int, Setting(least=1)] = 16
    """Up to this many classes the Gauss-Newton trace is exact, at one pass a class."""
    columns: Annotated[int, Setting(least=0)] = 8
    """With more classes: at most this many of the likeliest classes are computed exactly, the rest
    by probes."""
    logit_probes: Annotated[int, Setting(least=2)] = 2
    """With more classes: at least this many Rademacher probes for the rest; columns + logit_probes
    in all."""
    probes: Annotated[int, Setting(least=2)] = 8
    """In hessian mode: Rademacher probes, each a Hessian-vector product, of the part that
    Gauss-Newton misses."""
    paper: Annotated[PaperRule | None, Setting(option="paper", switch=True, prefix="paper-")] = (
        field(default_factory=PaperRule)
    )
    """Measure the paper's finite-difference score too; None: not measured."""
    precision: Precision = "auto"
    """Precision of the Gauss-Newton passes, where the trace keeps to 0.001 of float32's on examples
    of the set, else float32; auto: on NVIDIA GPUs the fastest, elsewhere float32. Not part of a
    study's identity."""
    every_epochs: Annotated[
        int | None, Setting(option="curvature-epochs", parse=parse_every, form="every|N")
    ] = None
    """Average the trace over training too (Garg et al. 2024): every epoch, or every Nth, the last
    among them; None: the trained model only."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "gauss-newton", "hessian"):
            raise CurvatureError(f"no mode {self.mode!r}; take auto, gauss-newton or hessian")
        least_of = {"exact_classes": 1, "columns": 0, "logit_probes": 2, "probes": 2}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise CurvatureError(f"{name} must be an integer of {least} or more, got {value}")
        if self.precision not in ("auto", *PRECISIONS):
            raise CurvatureError(
                f"no precision {self.precision!r}; take auto, {', '.join(PRECISIONS)}"
            )
        if self.every_epochs is not None and self.every_epochs < 1:
            raise CurvatureError(f"every_epochs must be 1 or more, got {self.every_epochs}")

    def as_dict(self) -> dict[str, object]:
        """The rule as JSON-ready data: what a study's hash covers.

        `every_epochs` is left out where it is None: such studies keep the identity they had.
        """
        data = dataclasses.asdict(self)
        del data["precision"]
        if self.every_epochs is None:
            del data["every_epochs"]
        return data


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Curvature of the loss of B examples, and the cheap baselines beside it; all [B]."""

    trace: Tensor
    """tr H, nats per squared pixel unit; may be negative where H has a second part."""
    trace_stderr: Tensor
    """Standard error of `trace` over its probes; 0 where it is exact."""
    squared: Tensor
    """tr H^2 = |H|_F^2, or an unbiased estimate of it, which can be negative."""
    gradient_norm: Tensor
    """|d loss / dx|_2, nats per pixel unit."""
    loss: Tensor
    """Cross entropy, nats."""
    mode: Mode
    """What was computed."""
    backward_passes: int
    """Vector-Jacobian products that were needed; one in each Hessian-vector product."""


class _Backward:
    """Vector-Jacobian products of the logits in the pixels, from one forward pass."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, precision: str) -> None:
        self._tf32 = precision == "tf32"
        half = precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            self._output, self._at = differentiable(model, x, y)
        if half:
            # What multiplies the products is the softmax of these.
            with torch.no_grad():
                self.logits = model(x.detach().clone())
        else:
            self.logits = self._output.detach()

    def __call__(self, ups: Tensor) -> Tensor:
        """J'up of each of m directions, [m, B, K] -> [m, B, d]; the graph stays for others."""
        ups = ups.to(self._output.dtype)
        with float32_products(tf32=self._tf32):
            if len(ups) > 1 and batches_passes(ups):
                found = self._batched(ups)
                if found is not None:
                    return found.flatten(2)
            return torch.stack([self._grad(up) for up in ups]).flatten(2)

    def one(self, up: Tensor) -> Tensor:
        """J'up, [B, K] -> [B, d]."""
        return self(up[None])[0]

    def _grad(self, up: Tensor, *, batched: bool = False) -> Tensor:
        (found,) = torch.autograd.grad(
            self._output, self._at, up, retain_graph=True, is_grads_batched=batched
        )
        return found

    def _batched(self, ups: Tensor) -> Tensor | None:
        """All at once; None if a layer has no such backward pass."""
        try:
            return self._grad(ups, batched=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # whatever vmap cannot do
            _say_once(f"backward passes are taken one by one: {first_line(error)}")
            return None


def batches_passes(values: Tensor) -> bool:
    """Are backward passes taken together? On CPUs it brings nothing, and takes memory."""
    return values.is_cuda


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger("raymem").warning(text)


class _GaussNewton(NamedTuple):
    trace: Tensor
    variance: Tensor
    squared: Tensor
    gradient: Tensor
    logits: Tensor
    """[B, K], without their graph."""
    back: _Backward
    passes: int
    root: Tensor | None
    """[B, K-1, d] with root'root = J'SJ, if all columns were computed."""


def input_curvature(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rule: CurvatureRule | None = None,
    *,
    seed: int = 0,
) -> Curvature:
    """tr H of the cross entropy in the pixels: eq. 7 of Ravikumar et al. 2024.

    model: logits [B, K] from x, in eval mode. x: [B, C, H, W], float32 or float64. y: int64 [B].
    Examples do not influence each other: any batch gives the same, to rounding.

    In Gauss-Newton mode the trace is label-free: it is tr of the Fisher information of the pixels.

    Raises CurvatureError for a model in training mode, wrong types and shapes, and models that
    cannot be differentiated as the mode needs it.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    >>> result = input_curvature(net, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))
    >>> result.mode, result.backward_passes, bool((result.trace > 0).all())
    ('gauss-newton', 2, True)
    """
    rule = rule or CurvatureRule()
    check_inputs(model, x, y)
    mode: Mode = pick_mode(model, x, y, seed=seed) if rule.mode == "auto" else rule.mode
    with plain_arithmetic(model, x):
        keys = keys_of(x, seed)
        gn = _gauss_newton(model, x, y, keys, rule)
        passes = gn.passes
        if mode == "hessian":
            trace, variance, squared = _with_residual(model, x, y, keys, rule, gn)
            # Without all columns, J'SJv takes a pass of its own beside each Rv.
            passes += rule.probes * (1 if gn.root is not None else 2)
        else:
            trace, variance, squared = gn.trace, gn.variance, gn.squared
    return Curvature(
        trace=trace,
        trace_stderr=variance.sqrt(),
        squared=squared,
        gradient_norm=gn.gradient.flatten(1).norm(dim=1),
        # log1p of the odds against: cross_entropy gives 0 where they are below rounding.
        loss=F.softplus(-margins(gn.logits, y)),
        mode=mode,
        backward_passes=passes,
    )


def pick_mode(model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Mode:
    """Gauss-Newton if it is all of the Hessian for this model, as far as the first 32 images tell.

    Compares Rv with Hv for one random v. The logits are divided by their spread first: with
    confident models both vanish, and their ratio would be rounding.

    Raises CurvatureError if the model has no Hessian-vector products; then a mode must be forced.
    """
    check_inputs(model, x, y)
    x, y = x[:CHECKED].detach(), y[:CHECKED]
    with plain_arithmetic(model, x):
        v = image_signs(keys_of(x, seed), CHECK_STREAM, x)
        back = _Backward(model, x, y, "float32")
        spread = back.logits.std(dim=1, keepdim=True).clamp(min=1)
        cooled = back.logits / spread
        second = _second_part(model, x, _missed(cooled, y) / spread, v)
        moved = second.logits_tangent / spread
        gn_vector = back.one(_softmax_hessian(cooled, moved) / spread).view_as(x)
    total, residual = float((second.vector + gn_vector).norm()), float(second.vector.norm())
    if not math.isfinite(total + residual):
        raise CurvatureError(
            "the model gives logits or derivatives that are not finite for the first images; check "
            "its weights"
        )
    return "hessian" if residual > RESIDUAL_IS_NOISE * total else "gauss-newton"


def _gauss_newton(
    model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, rule: CurvatureRule
) -> _GaussNewton:
    back = _Backward(model, x, y, rule.precision)
    p = back.logits.softmax(1)
    order = p.argsort(dim=1, descending=True, stable=True)
    if p.shape[1] <= rule.exact_classes:
        return _all_columns(back, y, p, order)
    return _some_columns(back, y, p, order, keys, rule)


def _all_columns(back: _Backward, y: Tensor, p: Tensor, order: Tensor) -> _GaussNewton:
    """All K-1 rows D_k; the gradient comes with them, as J'(p - y) = sum_k (p_k - y_k) D_k."""
    likeliest, others = order[:, :1], order[:, 1:]
    ups = [
        torch.zeros_like(p).scatter_(1, other[:, None], 1.0).scatter_(1, likeliest, -1.0)
        for other in others.unbind(1)
    ]
    D = back(torch.stack(ups)).transpose(0, 1)
    q = p.gather(1, others)
    beta = 1 / (1 + p.gather(1, likeliest).sqrt())
    mixed = D - beta[:, :, None] * (q[:, None] @ D)
    root = q.sqrt()[:, :, None] * mixed
    M = root @ root.mT
    missed = q - (others == y[:, None]).to(q)
    return _GaussNewton(
        trace=M.diagonal(dim1=1, dim2=2).sum(1),
        variance=torch.zeros_like(q[:, 0]),
        squared=M.square().sum((1, 2)),
        gradient=(missed[:, None] @ D)[:, 0],
        logits=back.logits,
        back=back,
        passes=p.shape[1] - 1,
        root=root,
    )


def _some_columns(
    back: _Backward, y: Tensor, p: Tensor, order: Tensor, keys: Tensor, rule: CurvatureRule
) -> _GaussNewton:
    """A few passes, each a likely column of B or a probe of the rest, and one for the gradient.

    How many columns are exact is each example's own choice: many where few classes are likely,
    none where all are, whichever promises the least error for the same passes.
    """
    K = p.shape[1]
    likeliest, others = order[:, :1], order[:, 1:]
    q = p.gather(1, others)
    top = p.gather(1, likeliest)
    most = min(rule.columns, K - 1)
    m = most + (rule.logit_probes if most < K - 1 else 0)
    n_exact = _columns_worth(q, most, m)

    def up(w: Tensor) -> Tensor:
        """sum_j w_j b_j as a direction of the logits, w [B, K-1]."""
        scaled = w * q.sqrt()
        total = scaled.sum(1, keepdim=True)
        found = torch.zeros_like(p).scatter_(1, others, scaled - total * q / (1 + top.sqrt()))
        return found.scatter_(1, likeliest, -total * top.sqrt())

    rank = torch.arange(K - 1, device=p.device)
    ups = []
    for k in range(m):
        w = signs(keys, LOGIT_STREAM + k, K - 1, p.dtype)
        # By class, not by rank: ranks of equal logits may differ between batches.
        w = w.gather(1, others - (others > likeliest).long())
        w = torch.where(rank >= n_exact[:, None], w, 0.0)
        w = torch.where((k < n_exact)[:, None], (rank == k).to(p), w)
        ups.append(up(w))
    *found, gradient = back(torch.stack([*ups, _missed(back.logits, y)]))
    T = torch.stack(found, 1)
    trace, variance, squared = _from_gram(T @ T.mT, n_exact)
    return _GaussNewton(
        trace=trace,
        variance=variance,
        squared=squared,
        gradient=gradient,
        logits=back.logits,
        back=back,
        passes=m + 1,
        root=None,
    )


def _columns_worth(q: Tensor, most: int, m: int) -> Tensor:
    """[B]: of m passes, how many to spend on exact columns, at most `most`; q [B, K-1] descends.

    The error of the rest's sum over s probes goes as what is left of q, over sqrt(s).
    """
    if most == m:
        return torch.full_like(q[:, 0], most, dtype=torch.long)
    left = q.flip(1).cumsum(1).flip(1)[:, : most + 1]
    probes = m - torch.arange(most + 1, device=q.device)
    # Backwards, so that of equals the one with most exact columns is taken.
    return most - (left.square() / probes).flip(1).argmin(1)


def _from_gram(Q: Tensor, n_exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tr M, the variance of its estimate, and tr M^2, from the Gram matrix [B, m, m] of m passes.

    Passes are exact columns up to n_exact [B], then probes t of the rest, for which |t|^2 and, over
    pairs of different probes, (t't')^2 have the rest's tr M and tr M^2 as means.
    """
    m = Q.shape[1]
    is_exact = (torch.arange(m, device=Q.device) < n_exact[:, None]).to(Q)
    is_probe, s = 1 - is_exact, (m - n_exact).to(Q)
    share = is_probe / s.clamp(min=1)[:, None]
    lengths = Q.diagonal(dim1=1, dim2=2)
    mean = (share * lengths).sum(1)
    spread = (is_probe * (lengths - mean[:, None]).square()).sum(1)
    variance = spread / (s * (s - 1)).clamp(min=1)
    one = is_exact + share
    weights = one[:, :, None] * one[:, None, :]
    pairs = is_probe[:, :, None] * is_probe[:, None, :] / (s * (s - 1)).clamp(min=1)[:, None, None]
    weights = torch.where(pairs > 0, pairs * (1 - torch.eye(m).to(Q)), weights)
    return (is_exact * lengths).sum(1) + mean, variance, (weights * Q.square()).sum((1, 2))


def _with_residual(
    model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, rule: CurvatureRule, gn: _GaussNewton
) -> tuple[Tensor, Tensor, Tensor]:
    """Trace, its variance, and tr H^2 = tr GN^2 + 2 tr GN R + tr R^2, with what was missed."""
    logits = gn.logits
    weights = _missed(logits, y)
    traces, squares = [], []
    for k in range(rule.probes):
        v = image_signs(keys, INPUT_STREAM + k, x)
        second = _second_part(model, x, weights, v)
        vector, direction = second.vector.flatten(1), v.flatten(1)
        traces.append((direction * vector).sum(1))
        if gn.root is None:
            up = _softmax_hessian(logits, second.logits_tangent)
            known = gn.back.one(up)
        else:
            known = (gn.root.mT @ (gn.root @ direction[:, :, None]))[:, :, 0]
        squares.append(((2 * known + vector) * vector).sum(1))
    missed = torch.stack(traces, 1)
    variance = gn.variance + missed.var(1) / rule.probes
    return gn.trace + missed.mean(1), variance, gn.squared + torch.stack(squares, 1).mean(1)


def _missed(logits: Tensor, y: Tensor) -> Tensor:
    """p - 1[k = y], [B, K]: the likeliest class's from the others', to keep digits where p is 1."""
    p = logits.softmax(1)
    likeliest = logits.argmax(1, keepdim=True)
    missed = p - F.one_hot(y, logits.shape[1]).to(p)
    return _balanced(missed, likeliest)


def _softmax_hessian(logits: Tensor, m: Tensor) -> Tensor:
    """S m = p (m - p'm), [B, K], with the same care."""
    p = logits.softmax(1)
    likeliest = logits.argmax(1, keepdim=True)
    m = m - m.gather(1, likeliest)
    return _balanced(p * (m - (p * m).sum(1, keepdim=True)), likeliest)


def _balanced(values: Tensor, at: Tensor) -> Tensor:
    """Values [B, K] that sum to 0: the one `at` [B, 1] is minus the sum of the others."""
    others = values.scatter(1, at, 0.0)
    return others.scatter(1, at, -others.sum(1, keepdim=True))


class _Product(NamedTuple):
    vector: Tensor
    """Rv, in the shape of x."""
    logits_tangent: Tensor
    """Jv, [B, K]."""


def _second_part(model: nn.Module, x: Tensor, weights: Tensor, v: Tensor) -> _Product:
    """Rv and Jv, R the Hessian of the sum of weights * logits, forward over reverse."""

    def weighted(at: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(at.clone())
        return (weights * logits).sum(), logits

    # The fused attention kernels have no second derivative. torch warns of its own torch.jit.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        try:
            derivatives: Any = torch.func.jvp(
                torch.func.grad(weighted, has_aux=True), (x.detach(),), (v,)
            )
        except (RuntimeError, NotImplementedError) as error:
            raise CurvatureError(
                f"the model has no Hessian-vector products ({first_line(error)}); force "
                "mode='gauss-newton' if it is piecewise linear, else replace that layer"
            ) from error
    _, (vector, tangent) = derivatives
    return _Product(vector.detach(), tangent.detach())
