"""Curvature against the full Hessian by autograd, in float64, on trained nets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings

import numpy as np
import pytest
import reference
import torch
from learners import no_second_derivative
from torch import nn

from raymem.curvature import (
    CurvatureRule,
    PaperRule,
    input_curvature,
    paper_score,
    pick_mode,
    trace,
)
from raymem.curvature.fold_batchnorm import folded
from raymem.curvature.probes import keys_of, signs
from raymem.errors import CurvatureError
from raymem.training import batch_of, batched_curvature, measure

K = 10
# Three standard deviations are too few for the number of examples here: alpha = 1e-6.
FIVE = 5.0


def small_net(norm, activation, pool=nn.MaxPool2d, width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), norm(width), activation(), pool(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), norm(2 * width), activation(),
        nn.Flatten(), nn.Linear(2 * width * 16, K),
    )  # fmt: skip


def group_norm(width):
    return nn.GroupNorm(4, width)


NETS = {
    "batchnorm-relu": (nn.BatchNorm2d, nn.ReLU),
    "groupnorm-relu": (group_norm, nn.ReLU),
    "batchnorm-gelu": (nn.BatchNorm2d, nn.GELU, nn.AvgPool2d),
}


@pytest.fixture(scope="module")
def pixels(digits):
    x = torch.from_numpy(digits.x_train.copy()).permute(0, 3, 1, 2).double() / 255
    return x, torch.from_numpy(digits.y_train.copy())


@pytest.fixture(scope="module")
def trained(pixels):
    """Nets trained on 600 digits until they are right and confident."""
    x, y = pixels

    @functools.cache
    def train(name):
        torch.manual_seed(0)
        net = small_net(*NETS[name]).double().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        for _ in range(30):
            for batch in torch.randperm(600).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
        return net.eval()

    return train


def examples(pixels, n=12):
    """Images no net has seen, every third with a wrong label: confident and wrong."""
    x, y = pixels
    y = y[600 : 600 + n].clone()
    y[::3] = (y[::3] + 1) % K
    return x[600 : 600 + n], y


def scaled(net, by):
    """A copy of the net with its logits multiplied."""
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied[-1].weight *= by
        copied[-1].bias *= by
    return copied


@pytest.fixture(scope="module")
def cases(pixels, trained):
    """name -> net, x, y, exact tr H, exact tr H^2."""

    @functools.cache
    def case(name):
        net, (x, y) = trained(name), examples(pixels)
        hessians = [reference.input_hessian(net, x[i], int(y[i])) for i in range(len(x))]
        trace = torch.stack([H.trace() for H in hessians])
        squared = torch.stack([(H * H).sum() for H in hessians])
        return net, x, y, trace, squared

    return case


def test_the_nets_are_confident_right_and_wrong(cases):
    net, x, y, *_ = cases("batchnorm-relu")
    p = net(x).softmax(1)
    right = net(x).argmax(1) == y
    assert right.sum() >= 6
    assert (~right).sum() >= 3
    assert p.max(1).values.median() > 0.9


def test_gauss_newton_is_exact_on_a_piecewise_linear_net(cases):
    net, x, y, trace, squared = cases("batchnorm-relu")
    found = input_curvature(net, x, y)
    assert found.mode == "gauss-newton"
    assert found.backward_passes == K - 1
    torch.testing.assert_close(found.trace, trace, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.squared, squared, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.trace_stderr, torch.zeros_like(trace))
    gradients = [reference.input_gradient(net, x[i], int(y[i])).norm() for i in range(len(x))]
    torch.testing.assert_close(found.gradient_norm, torch.stack(gradients), rtol=1e-9, atol=0)
    loss = nn.functional.cross_entropy(net(x), y, reduction="none")
    torch.testing.assert_close(found.loss, loss)


def test_float32_keeps_four_digits_of_the_exact_trace(cases):
    net, x, y, trace, _ = cases("batchnorm-relu")
    single = small_net(*NETS["batchnorm-relu"])
    single.load_state_dict(net.state_dict())
    found = input_curvature(single.float().eval(), x.float(), y)
    assert found.mode == "gauss-newton"
    torch.testing.assert_close(found.trace.double(), trace, rtol=1e-4, atol=1e-30)


def many(net, x, y, rule, n=200):
    found = [input_curvature(net, x, y, rule, seed=seed) for seed in range(n)]
    return {
        name: torch.stack([getattr(f, name) for f in found])
        for name in ("trace", "trace_stderr", "squared")
    }


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("batchnorm-relu", CurvatureRule(exact_classes=2, columns=3, logit_probes=2)),
        ("batchnorm-relu", CurvatureRule(exact_classes=2, columns=0, logit_probes=4)),
        ("groupnorm-relu", CurvatureRule(probes=4)),
        ("batchnorm-gelu", CurvatureRule(probes=4)),
        ("batchnorm-gelu", CurvatureRule(exact_classes=2, columns=3, probes=4)),
    ],
)
@pytest.mark.slow
def test_what_is_not_exact_is_unbiased_within_its_stated_error(cases, name, rule):
    net, x, y, trace, squared = cases(name)
    found = many(net, x, y, rule)
    for estimates, truth in ((found["trace"], trace), (found["squared"], squared)):
        error = estimates.std(0) / len(estimates) ** 0.5
        noise = 1e-9 * truth.abs()
        assert ((estimates.mean(0) - truth).abs() <= FIVE * error + noise).all()
        assert (error > 0).any()
    # The stated variance is that of the estimates: over all examples, within a fifth.
    stated, real = found["trace_stderr"].square().mean(0), found["trace"].var(0)
    assert float((stated.sqrt() / real.sqrt()).median()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("rule", [CurvatureRule(), CurvatureRule(exact_classes=2, columns=3)])
@pytest.mark.parametrize("name", NETS)
def test_the_backward_passes_are_counted(cases, monkeypatch, name, rule):
    """Against a count of torch's own calls: those of vjps, and one within each product."""
    net, x, y, *_ = cases(name)
    counts = {"_grad": 0, "_second_part": 0}

    def counting(name, real):
        def call(*args):
            counts[name] += 1
            return real(*args)

        return call

    mode = pick_mode(net, x, y)
    for at, part in ((trace._Backward, "_grad"), (trace, "_second_part")):
        monkeypatch.setattr(at, part, counting(part, getattr(at, part)))
    found = input_curvature(net, x, y, dataclasses.replace(rule, mode=mode))
    assert found.backward_passes == sum(counts.values())
    assert counts["_second_part"] == (rule.probes if mode == "hessian" else 0)


def test_stratified_needs_the_probes_it_says(cases):
    net, x, y, *_ = cases("batchnorm-relu")
    assert (
        input_curvature(net, x, y, CurvatureRule(exact_classes=2, columns=4)).backward_passes == 7
    )
    all_columns = CurvatureRule(exact_classes=2, columns=K)
    found = input_curvature(net, x, y, all_columns)
    assert found.backward_passes == K
    torch.testing.assert_close(found.trace, input_curvature(net, x, y).trace)


@pytest.mark.parametrize("name", NETS)
def test_the_mode_is_chosen_by_what_the_model_is(cases, name):
    net, x, y, *_ = cases(name)
    expected = "gauss-newton" if name == "batchnorm-relu" else "hessian"
    assert pick_mode(net, x, y) == expected
    assert input_curvature(net, x, y).mode == expected
    # Saturated logits, whose Hessian vanishes, do not hide it; nor does float32.
    steep = scaled(net, 30).float()
    assert pick_mode(steep, x.float(), y) == expected
    forced = CurvatureRule(mode="gauss-newton")
    assert input_curvature(net, x, y, forced).mode == "gauss-newton"


def test_gauss_newton_alone_is_not_the_hessian_of_groupnorm(cases):
    net, x, y, trace, _ = cases("groupnorm-relu")
    found = input_curvature(net, x, y, CurvatureRule(mode="gauss-newton"))
    assert ((found.trace - trace).abs() > 0.01 * trace.abs()).any()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "rule", [CurvatureRule(probes=3), CurvatureRule(exact_classes=2, columns=3, probes=3)]
)
def test_the_batch_does_not_matter(pixels, trained, name, rule):
    net = trained(name)
    x, y = examples(pixels, 64)
    whole = input_curvature(net, x, y, rule)
    paper = paper_score(net, x, y)
    for size in (1, 8):
        part = input_curvature(net, x[:size], y[:size], dataclasses.replace(rule, mode=whole.mode))
        for f in ("trace", "trace_stderr", "squared", "gradient_norm", "loss"):
            torch.testing.assert_close(
                getattr(part, f), getattr(whole, f)[:size], rtol=1e-7, atol=1e-12
            )
        torch.testing.assert_close(
            paper_score(net, x[:size], y[:size]), paper[:size], rtol=1e-5, atol=1e-15
        )
    backwards = input_curvature(
        net, x.flip(0), y.flip(0), dataclasses.replace(rule, mode=whole.mode)
    )
    torch.testing.assert_close(backwards.trace.flip(0), whole.trace, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "rule", [CurvatureRule(probes=3), CurvatureRule(exact_classes=2, columns=3, probes=3)]
)
def test_confident_examples_keep_their_digits_in_float32(cases, name, rule):
    """1 - p is 1e-8 and less here: differences of softmax from one-hot would leave nothing."""
    net, x, y, *_ = cases(name)
    steep = scaled(net, 12)
    y = steep(x).argmax(1)
    p = steep(x).softmax(1).max(1).values
    assert ((1 - p) < 1e-8).sum() >= 4
    exact = input_curvature(steep, x, y, rule)
    single = input_curvature(
        steep.float(), x.float(), y, dataclasses.replace(rule, mode=exact.mode)
    )
    for f in ("trace", "squared", "gradient_norm", "loss"):
        a, b = getattr(single, f).double(), getattr(exact, f)
        off = ((a - b) / b).abs()[b.abs() > 1e-25]
        # Estimates of tr H^2 cancel by themselves; kinks can move with rounding.
        assert float(off.median()) < 2e-3, (f, off)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scale", [0.0, 1e3, 1e30])
def test_no_nan_however_confident_right_or_wrong(cases, name, scale):
    net, x, y, *_ = cases(name)
    steep = scaled(net, scale).float()
    rule = CurvatureRule(probes=2) if scale < 1e30 else CurvatureRule(mode="gauss-newton")
    for r in (rule, dataclasses.replace(rule, exact_classes=2, columns=3)):
        found = input_curvature(steep, x.float(), y, r)
        if scale < 1e30:
            assert torch.isfinite(found.trace).all()
            assert torch.isfinite(found.gradient_norm).all()
        assert not torch.isnan(found.trace).any()
    if scale == 0:
        assert torch.equal(found.trace, torch.zeros_like(found.trace))


def test_the_paper_score_tends_to_h_squared_times_tr_h_squared_on_a_smooth_net(cases):
    net, x, y, _, squared = cases("batchnorm-gelu")
    # 200 probes leave an error of several percent ...
    found = paper_score(net, x, y, PaperRule(step=1e-4, probes=200)) / 1e-8
    assert float(((found - squared) / squared).abs().median()) < 0.15
    # ... and none against |Hv|^2 along the same probes.
    exact = _squared_along_the_probes(net, x, y)
    for step, tolerance in ((1e-3, 0.2), (1e-4, 0.02), (1e-5, 0.002)):
        found = paper_score(net, x, y, PaperRule(step=step)) / step**2
        assert float(((found - exact) / exact).abs().median()) < tolerance


def _squared_along_the_probes(net, x, y):
    """mean_k |H v_k|^2 for the score's own ten probes, from full Hessians."""
    from raymem.curvature.paper import PAPER_STREAM

    lengths = []
    for i in range(len(x)):
        H = reference.input_hessian(net, x[i], int(y[i]))
        keys = keys_of(x[i : i + 1], 0)
        v = torch.cat([signs(keys, PAPER_STREAM + k, 64, torch.float64) for k in range(10)])
        lengths.append((v @ H).square().sum(1).mean())
    return torch.stack(lengths)


def usual_loop(net, x, y, probes, h, norm):
    """As published: both gradients anew for each probe, of the loss's mean over the batch."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for v in probes:
        moved, here = (x + h * v).requires_grad_(), x.clone().requires_grad_()
        (a,) = torch.autograd.grad(nn.functional.cross_entropy(net(moved), y), moved)
        (b,) = torch.autograd.grad(nn.functional.cross_entropy(net(here), y), here)
        length = (a - b).flatten(1).norm(dim=1)
        total += length**2 if norm == "squared" else length
    return total / len(probes)


@pytest.mark.parametrize("norm", ["squared", "first-power"])
def test_the_paper_score_is_the_published_loop(cases, norm):
    from raymem.curvature.paper import PAPER_STREAM

    net, x, y, *_ = cases("batchnorm-relu")
    keys = keys_of(x, 3)
    probes = [signs(keys, PAPER_STREAM + k, 64, x.dtype).reshape(x.shape) for k in range(10)]
    rule = PaperRule(norm=norm, batch_divisor=len(x))
    found = paper_score(net, x, y, rule, seed=3)
    torch.testing.assert_close(found, usual_loop(net, x, y, probes, 1e-3, norm), rtol=1e-5, atol=0)
    summed = paper_score(net, x, y, dataclasses.replace(rule, batch_divisor=1), seed=3)
    power = 2 if norm == "squared" else 1
    torch.testing.assert_close(summed, found * len(x) ** power, rtol=1e-9, atol=0)


def test_the_variants_of_the_paper_score(cases):
    net, x, y, *_ = cases("batchnorm-relu")
    predicted = net(x).argmax(1)
    by_option = paper_score(net, x, y, PaperRule(labels="predicted"))
    torch.testing.assert_close(by_option, paper_score(net, x, predicted))
    assert not torch.allclose(by_option, paper_score(net, x, y))
    half = scaled(net, 0.5)
    torch.testing.assert_close(
        paper_score(net, x, y, PaperRule(temperature=2.0)), paper_score(half, x, y)
    )


def test_finite_differences_see_jumps_that_the_hessian_does_not(cases):
    """Why the two are two columns: on a ReLU net at h = 1e-3 the score is not tr H^2."""
    net, x, y, _, squared = cases("batchnorm-relu")
    ratio = paper_score(net, x, y, PaperRule(step=1e-3, probes=50)) / 1e-6 / squared
    assert float(ratio.median()) > 1.2


# Probes


def test_signs_are_fair_and_independent():
    keys = keys_of(torch.rand(200, 1, 10, 10), 0)
    all_signs = torch.stack([signs(keys, k, 100, torch.float64) for k in range(50)])
    assert set(all_signs.unique().tolist()) == {-1.0, 1.0}
    n = all_signs.numel()
    assert abs(float(all_signs.mean())) < FIVE / n**0.5
    for other in (all_signs.roll(1, 0), all_signs.roll(1, 1), all_signs.roll(1, 2)):
        assert abs(float((all_signs * other).mean())) < FIVE / n**0.5


def test_signs_are_splitmix64():
    key = 0x0123456789ABCDEF
    words = []
    for count in (1, 2):
        z = (key + count * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    expected = [1.0 if words[i // 64] >> (i % 64) & 1 else -1.0 for i in range(100)]
    assert signs(torch.tensor([key]), 0, 100, torch.float64)[0].tolist() == expected


def test_keys_tell_pixels_places_and_seeds_apart():
    x = torch.zeros(4, 1, 2, 2)
    x[1, 0, 0, 0] = x[2, 0, 1, 1] = 1e-7
    x[3] = -0.0
    keys = keys_of(x, 0)
    assert len(set(keys[:3].tolist())) == 3
    assert keys[0] == keys[3]
    assert keys_of(x, 1)[0] != keys[0]
    assert torch.equal(keys_of(x.double(), 0), keys)


# Inputs


def linear_net(n_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, n_classes)).eval()


X, Y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])


class Tupled(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


class Without(nn.Sequential):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class InPlace(nn.Sequential):
    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2))


def batch_statistics():
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), linear_net()).eval()


def test_a_layer_that_works_in_place_does_not_reach_the_callers_images():
    net, x = InPlace(linear_net()).eval(), X.clone()
    found = input_curvature(net, x, Y)
    paper_score(net, x, Y, PaperRule(labels="predicted"))
    assert torch.equal(x, X)
    assert (found.trace > 0).all()
    with torch.inference_mode():
        torch.testing.assert_close(input_curvature(net, x, Y).trace, found.trace)


def test_weights_that_are_not_finite_are_named():
    net = linear_net()
    with torch.no_grad():
        net[1].weight[0, 0] = torch.nan
    with pytest.raises(CurvatureError, match="not finite"):
        input_curvature(net, X, Y)


@pytest.mark.parametrize(
    ("net", "x", "y", "message"),
    [
        (linear_net().train(), X, Y, "training mode"),
        (nn.Sequential(linear_net(), nn.Dropout().train()), X, Y, "training mode"),
        (linear_net(), (X * 255).to(torch.uint8), Y, "torch.uint8"),
        (linear_net().double(), X, Y, "torch.float32 but the model has torch.float64"),
        (linear_net(), X.half(), Y, "torch.float16"),
        (linear_net(), X, Y[:2], "one label per image"),
        (linear_net(), X, Y.float(), "int64"),
        (linear_net(), X, Y + 1, "labels go from 1 to 3"),
        (linear_net(), X, Y - 1, "labels go from -1 to 1"),
        (linear_net(1), X, Y * 0, "two or more classes"),
        (linear_net(), X[:0], Y[:0], "no image"),
        (Tupled(linear_net()).eval(), X, Y, "gives tuple"),
        (Without(linear_net()).eval(), X, Y, "cannot be differentiated"),
        (batch_statistics(), X, Y, "keeps no running statistics"),
        (nn.Sequential(nn.Identity()).eval(), X, Y, "two or more classes"),
    ],
)
@pytest.mark.parametrize("function", [input_curvature, paper_score])
def test_bad_input_is_named(function, net, x, y, message):
    with pytest.raises(CurvatureError, match=message):
        function(net, x, y)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "exact"},
        {"probes": 2.5},
        {"probes": 1},
        {"logit_probes": 1},
        {"columns": -1},
        {"exact_classes": 0},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(settings):
    with pytest.raises(CurvatureError):
        CurvatureRule(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"step": 0}, {"probes": 0}, {"temperature": -1}, {"batch_divisor": 0}, {"norm": "l2"},
     {"labels": "both"}, {"step": float("nan")}, {"step": float("inf")},
     {"temperature": float("inf")}],
)  # fmt: skip
def test_a_paper_rule_that_makes_no_sense_is_refused(settings):
    with pytest.raises(CurvatureError):
        PaperRule(**settings)


class Seeing(nn.Module):
    """Writes down under which settings it runs."""

    def __init__(self):
        super().__init__()
        self.inner = linear_net()
        self.seen = []

    def forward(self, x):
        self.seen.append(
            (
                torch.backends.cudnn.allow_tf32,
                torch.get_float32_matmul_precision(),
                torch.is_autocast_enabled("cpu"),
                self.inner[1].weight.requires_grad,
            )
        )
        return self.inner(x)


def test_arithmetic_is_plain_inside_and_as_it_was_afterwards():
    net = Seeing().eval()
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            input_curvature(net, X, Y)
            paper_score(net, X, Y)
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert len(net.seen) > 10
    assert set(net.seen) == {(False, "highest", False, False)}
    assert net.inner[1].weight.requires_grad


def test_a_layer_without_second_derivatives_is_named_and_can_be_forced():
    net = no_second_derivative(3, (2, 2, 1)).eval()
    with pytest.raises(CurvatureError, match="gauss-newton"):
        input_curvature(net, X, Y)
    found = input_curvature(net, X, Y, CurvatureRule(mode="gauss-newton"))
    assert (found.trace > 0).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_models_of_timm_have_hessian_vector_products(name):
    import timm

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm compiles with what torch calls deprecated
        size = {"img_size": 32, "patch_size": 8} if name.startswith("vit") else {}
        net = timm.create_model(name, num_classes=3, **size).eval()
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    found = input_curvature(net, x, y, CurvatureRule(probes=2))
    assert found.mode == ("gauss-newton" if name == "resnet18" else "hessian")
    assert torch.isfinite(found.trace).all()


# Whole sets


def test_folding_batchnorm_changes_nothing_but_time(pixels):
    torch.manual_seed(1)
    net = small_net(nn.BatchNorm2d, nn.ReLU)
    x, y = (t[:40] for t in pixels)
    net.train()(x.float())
    net.eval()
    less = folded(net, x.float())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in less.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    a, b = (input_curvature(n, x.float(), y) for n in (net, less))
    torch.testing.assert_close(a.trace, b.trace, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(a.gradient_norm, b.gradient_norm, rtol=1e-4, atol=1e-9)


class Branching(nn.Module):
    """Cannot be traced: its way depends on values."""

    def __init__(self):
        super().__init__()
        self.net = small_net(nn.BatchNorm2d, nn.ReLU)

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


def test_what_cannot_be_folded_is_left(pixels):
    x = pixels[0][:4].float()
    net = Branching().eval()
    assert folded(net, x) is net
    plain = small_net(group_norm, nn.ReLU).eval()
    assert folded(plain, x) is plain


class Shared(nn.Module):
    """Its convolution serves twice, once before a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.last = nn.Linear(64, K)

    def forward(self, x):
        again = self.conv(torch.relu(x - 0.9))
        return self.last((self.norm(self.conv(x)) + again).flatten(1))


def test_a_relu_that_serves_everywhere_does_not_keep_from_folding(pixels):
    relu = nn.ReLU()
    net = small_net(nn.BatchNorm2d, lambda: relu).eval()
    less = folded(net, pixels[0][:8].float())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in less.modules())


class Masked(nn.Module):
    """One class is ruled out by a logit of -1e6, which must not set the tolerance."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        ruled_out = torch.zeros(K)
        ruled_out[0] = -1e6
        return self.net(x) + ruled_out


def test_folding_leaves_what_it_would_change(pixels):
    x = pixels[0][:8].float() * 0.5
    torch.manual_seed(0)
    net = Shared()
    net.train()(x)
    net.eval()
    assert folded(net, x) is net
    assert folded(Masked(net).eval(), x).net is net
    plain = Masked(small_net(nn.BatchNorm2d, nn.ReLU)).eval()
    less = folded(plain, x)
    assert less is not plain
    torch.testing.assert_close(less(x), plain(x), rtol=1e-4, atol=1e-4)


def test_measure_does_not_depend_on_its_batches(digits):
    torch.manual_seed(0)
    net = small_net(nn.BatchNorm2d, nn.ReLU)
    x, y = (
        torch.from_numpy(digits.x_train[:50].copy()),
        torch.from_numpy(digits.y_train[:50].copy()),
    )
    a, b = measure(net, x, y), measure(net, x, y, batch_size=7, channels_last=True)
    assert set(a.values) == {
        "curvature", "curvature_stderr", "curvature_squared", "gradient_norm", "loss",
        "curvature_paper",
    }  # fmt: skip
    for name in ("curvature", "curvature_squared", "gradient_norm", "loss"):
        np.testing.assert_allclose(a.values[name], b.values[name], rtol=1e-3, atol=1e-9)
    assert a.mode == "gauss-newton"
    without = measure(net, x, y, CurvatureRule(paper=None))
    assert "curvature_paper" not in without.values


def test_a_batch_that_does_not_fit_is_halved(digits, monkeypatch):
    torch.manual_seed(0)
    net = small_net(nn.BatchNorm2d, nn.ReLU)
    x, y = (
        torch.from_numpy(digits.x_train[:40].copy()),
        torch.from_numpy(digits.y_train[:40].copy()),
    )
    expected = measure(net, x, y, batch_size=10)
    real, sizes = batched_curvature.input_curvature, []

    def short_of_memory(model, images, *rest, **more):
        sizes.append(len(images))
        if len(images) > 10:
            raise torch.OutOfMemoryError("no room")
        return real(model, images, *rest, **more)

    monkeypatch.setattr(batched_curvature, "input_curvature", short_of_memory)
    found = measure(net, x, y, batch_size=40)
    assert sizes == [40, 20, 10, 10, 20, 10, 10]
    np.testing.assert_allclose(found.values["curvature"], expected.values["curvature"], rtol=1e-4)


def test_measuring_nothing_is_refused():
    with pytest.raises(CurvatureError, match="no image"):
        measure(linear_net(), torch.zeros(0, 2, 2, 1, dtype=torch.uint8), torch.zeros(0).long())


def test_batches_stay_small_for_large_images():
    assert batch_of(3 * 224 * 224) == 8
