"""Backward passes taken together, in other arithmetic, or replayed: the same curvature."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys

import numpy as np
import pytest
import torch
from test_group import OnDevice
from torch import nn

from raymem import CurvatureRule, Recipe, Store, Study
from raymem.curvature import input_curvature, pick_mode, pick_precision
from raymem.curvature.lower_precision import TOLERANCE, relative_difference
from raymem.errors import CurvatureError
from raymem.models import build_model
from raymem.store import TrialKey
from raymem.training import Meter, measure

trace = sys.modules["raymem.curvature.trace"]
RULES = [CurvatureRule(probes=3), CurvatureRule(exact_classes=2, columns=3, probes=3)]


def net_of(name, seed=0):
    torch.manual_seed(seed)
    net = build_model(name, n_classes=6, image_shape=(8, 8, 3)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net, torch.rand(9, 3, 8, 8), torch.arange(9) % 6


@pytest.mark.parametrize("rule", RULES, ids=["all columns", "some"])
@pytest.mark.parametrize("name", ["mlp-16", "tiny-resnet", "tiny-resnet-gn"])
def test_passes_taken_together_give_the_same(name, rule, monkeypatch):
    net, x, y = net_of(name)
    rule = dataclasses.replace(rule, mode=pick_mode(net, x, y))
    one_by_one = input_curvature(net, x, y, rule)
    monkeypatch.setattr(trace, "batches_passes", lambda values: True)
    batched, real = [], trace._Backward._grad
    monkeypatch.setattr(
        trace._Backward, "_grad",
        lambda self, up, **how: batched.append(how) or real(self, up, **how),
    )  # fmt: skip
    together = input_curvature(net, x, y, rule)
    assert {"batched": True} in batched
    for kind in ("trace", "squared", "gradient_norm", "trace_stderr"):
        torch.testing.assert_close(
            getattr(together, kind), getattr(one_by_one, kind), rtol=1e-4, atol=1e-6
        )


class Stubborn(torch.autograd.Function):
    """Looks at its gradient's values, which vmap cannot."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if float(gradient.sum()) < 1e30 else None


class Doubling(nn.Module):
    def forward(self, x):
        return Stubborn.apply(x)


def test_a_layer_that_cannot_is_passed_one_by_one_and_the_log_says_so(monkeypatch, caplog):
    net = nn.Sequential(nn.Flatten(), Doubling(), nn.Linear(12, 4)).eval()
    x, y = torch.rand(3, 3, 2, 2), torch.arange(3)
    rule = CurvatureRule(mode="gauss-newton")
    expected = input_curvature(net, x, y, rule).trace
    monkeypatch.setattr(trace, "batches_passes", lambda values: True)
    trace._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "raymem"):
        assert torch.equal(input_curvature(net, x, y, rule).trace, expected)
    assert "one by one" in caplog.text


def exact_in_bfloat16():
    """Its derivatives are small integers, and so are its sums of two of them."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.randint(-3, 4, (4, 12)))
    return net


def test_the_models_own_examples_decide():
    """bfloat16 has 8 bits: enough where derivatives are small integers, not for a trained net's."""
    asked = CurvatureRule(mode="gauss-newton", precision="bfloat16")
    good, x = exact_in_bfloat16(), torch.rand(8, 3, 2, 2)
    chosen = pick_precision(good, x, torch.arange(8) % 4, asked)
    assert chosen.precision == "bfloat16"
    assert chosen.differences["bfloat16"] <= TOLERANCE
    net, x, y = net_of("tiny-resnet")
    refused = pick_precision(net, x, y, asked)
    assert refused.precision == "float32"
    assert 1e-3 < refused.differences["bfloat16"] < 0.1
    # On a CPU auto is float32, and TF32 is not there.
    for precision in ("auto", "float32", "tf32"):
        found = pick_precision(net, x, y, dataclasses.replace(asked, precision=precision))
        assert (found.precision, found.differences) == ("float32", {})


def test_lower_precision_rounds_derivatives_only():
    """Not the softmax that they are weighted with: what is lost is what J loses."""
    net, x, y = net_of("mlp-16")
    rule = CurvatureRule(mode="gauss-newton")
    full = input_curvature(net, x, y, rule)
    low = input_curvature(net, x, y, dataclasses.replace(rule, precision="bfloat16"))
    assert torch.equal(low.loss, full.loss)
    assert not torch.equal(low.trace, full.trace)
    torch.testing.assert_close(low.trace, full.trace, rtol=0.05, atol=0)
    assert low.trace.dtype == torch.float32


def test_the_relative_difference_is_the_mean_over_examples():
    full = torch.tensor([2.0, -4.0, 0.0])
    found = torch.tensor([2.02, -4.0, 0.001])
    # The last has none of its own: a thousandth of the mean size, 0.002, takes its place.
    expected = (0.01 + 0 + 0.5) / 3
    assert relative_difference(found, full) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(relative_difference(torch.tensor([math.nan]), torch.ones(1)))
    assert relative_difference(torch.zeros(3), torch.zeros(3)) == 0


def test_precisions_are_no_part_of_the_identity_and_others_are_refused():
    assert CurvatureRule(precision="bfloat16").as_dict() == CurvatureRule().as_dict()
    with pytest.raises(CurvatureError, match="no precision 'float8'"):
        CurvatureRule(precision="float8")


def test_a_trial_says_which_it_took_and_why(digits, tmp_path):
    study = Study(
        examples=digits, recipe=Recipe(model="mlp-8", epochs=2), store=tmp_path, trials=1,
        curvature=CurvatureRule(paper=None, precision="bfloat16"),
    )  # fmt: skip
    study.train(engine="serial")
    about = Store(tmp_path).provenance(TrialKey(math.inf, 0))
    said = about["curvature"]
    taken = "bfloat16" if said["precision_differences"]["bfloat16"] <= TOLERANCE else "float32"
    assert said["precision"] == taken
    assert ("curvature in bfloat16" in about["arithmetic"]) == (taken == "bfloat16")


@pytest.mark.parametrize("name", ["mlp-16", "tiny-resnet"])
def test_a_batch_needs_nothing_of_the_host(name, monkeypatch):
    """But for the check of labels, which a CUDA graph leaves out."""
    net, _, y = net_of(name)
    x = torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8)
    meter = Meter(net, x, y, CurvatureRule())
    images = x.permute(0, 3, 1, 2).float() / 255
    checks = sys.modules["raymem.curvature.input_checks"]
    monkeypatch.setattr(checks, "check_logits", lambda logits, y: None)
    with OnDevice():
        found = meter._measure(images, y)
    assert set(found) >= {"curvature", "curvature_paper"}


class Repeated:
    """What replays a step on a GPU, without one: the outputs are the same tensors each time."""

    def __init__(self, step):
        self.step, self.taken = step, 0

    def __call__(self):
        self.step()
        self.taken += 1


def test_whole_batches_are_replayed_and_the_rest_is_not(monkeypatch):
    at = sys.modules["raymem.training.batched_curvature"]
    monkeypatch.setattr(at, "Replayed", Repeated)
    net, _, _ = net_of("mlp-16")
    x, y = torch.randint(0, 256, (23, 8, 8, 3), dtype=torch.uint8), torch.arange(23) % 6
    expected = measure(net, x, y, CurvatureRule(), batch_size=23).values
    meter = Meter(net, x, y, CurvatureRule())
    meter._graph = at._Graph(meter._measure, 5)
    found = meter.all(x, y, 5)
    assert meter._graph._replayed.taken == 4
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-7)
