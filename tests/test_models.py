from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from raymem import Recipe
from raymem.errors import RecipeError
from raymem.models import build_model, identity


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp-512-256", (28, 28, 1)),
        ("mlp-16", (8, 8, 1)),
        ("small-resnet", (8, 8, 1)),
        ("small-resnet", (32, 32, 3)),
        ("resnet9", (8, 8, 1)),
        ("resnet9", (28, 28, 1)),
        ("resnet9-gn", (32, 32, 3)),
        ("cifar-resnet18", (32, 32, 3)),
        ("cifar-resnet50", (32, 32, 3)),
        ("resnet10t", (64, 64, 3)),
    ],
)
def test_names_give_logits(name, shape):
    H, W, C = shape
    net = build_model(name, n_classes=7, image_shape=shape)
    assert net(torch.rand(2, C, H, W)).shape == (2, 7)


def test_feldmans_mlp_has_its_layers():
    net = build_model("mlp-512-256", n_classes=10, image_shape=(28, 28, 1))
    shapes = [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert shapes == [(512, 784), (256, 512), (10, 256)]


def test_resnet9_is_as_large_as_published():
    """6,573,120 parameters (Page 2018, 10 classes); convolutions at 32, 16, 8 and 4 pixels."""
    net = build_model("resnet9", n_classes=10, image_shape=(32, 32, 3))
    assert sum(p.numel() for p in net.parameters()) == 6_573_120
    sides = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, out: sides.append(out.shape[-1]))
    net(torch.rand(2, 3, 32, 32))
    assert sides == [32, 32, 16, 16, 16, 8, 4, 4]


def test_small_image_stems_keep_the_resolution():
    net = build_model("cifar-resnet18", n_classes=10, image_shape=(32, 32, 3))[1]
    sizes = []
    net.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
    net(torch.rand(1, 3, 32, 32))
    assert sizes == [(32, 32)]
    assert net.conv1.kernel_size == (3, 3)


def test_normalization_is_in_the_model():
    shape = (4, 4, 3)
    net = build_model("mlp-8", n_classes=2, image_shape=shape, mean=(0.1, 0.2, 0.3), std=(2, 3, 4))
    x = torch.rand(5, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3.0, 4.0])
    expected = (x - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(net[0](x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18x", "no model 'resnet18x'"),
        ("mlp-a", "mlp-WIDTH"),
        ("nowhere:model", "cannot be imported"),
        ("math:pi", "not a function"),
        (lambda n_classes, image_shape: torch.nn.Flatten(), "must give logits"),
        (lambda n_classes, image_shape: torch.nn.Conv2d(7, 1, 1), "does not run on 8x8x1"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, message):
    with pytest.raises(RecipeError, match=message):
        build_model(model, n_classes=10, image_shape=(8, 8, 1))


def test_mean_and_std_must_fit_the_channels():
    with pytest.raises(RecipeError, match="mean and std need 1 or 3"):
        build_model("mlp-8", n_classes=2, image_shape=(4, 4, 3), mean=(0.1, 0.2))


SOURCE = """
import torch
def helper():
    return {width}
class Unrelated:
    {unrelated}
def model(n_classes, image_shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(helper(), n_classes))
"""


def code_of(tmp_path, width, unrelated):
    source = textwrap.dedent(SOURCE.format(width=width, unrelated=unrelated))
    (tmp_path / "mine.py").write_text(source)
    program = "from raymem.models import identity; print(identity('mine:model')['code'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_identity_of_your_own_model_is_its_code(tmp_path):
    first = code_of(tmp_path, 64, "pass")
    assert code_of(tmp_path, 64, "x = 1") == first
    assert code_of(tmp_path, 65, "pass") != first


def test_a_function_is_hashed_and_a_name_is_not():
    from learners import look_up_table, memorizes_nothing

    assert identity("resnet18") == {"name": "resnet18"}
    assert identity(look_up_table)["code"] != identity(memorizes_nothing)["code"]
    assert Recipe(model=look_up_table, epochs=1).as_dict()["model"]["name"] == "look_up_table"


def test_source_that_cannot_be_read_is_refused():
    namespace: dict = {}
    exec("def model(n_classes, image_shape): pass", namespace)
    with pytest.raises(RecipeError, match="source"):
        identity(namespace["model"])
