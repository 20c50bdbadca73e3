"""A model's name, or the user's own function -> a fresh `torch.nn.Module`.

Every model takes float images in [0, 1], [B, C, H, W], and normalizes them itself, so that
derivatives with respect to its input are per pixel unit of the [0, 1] image.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raymem.errors import RecipeError

ModelFunction = Callable[..., nn.Module]

SMALL_IMAGE_RESNETS = ("cifar-resnet18", "cifar-resnet34", "cifar-resnet50")
NAMES = ("mlp-512-256", "small-resnet", "tiny-resnet", "resnet9", *SMALL_IMAGE_RESNETS)


class Normalize(nn.Module):
    """(x - mean) / std per channel, x [B, C, H, W] in [0, 1]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = 1 / torch.tensor(std).reshape(1, -1, 1, 1)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", -torch.tensor(mean).reshape(1, -1, 1, 1) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def build_model(
    model: str | ModelFunction,
    *,
    n_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> nn.Module:
    """A fresh model for images of `image_shape` (H, W, C), with its normalization in front.

    Names: `mlp-512-256` (or any widths; Feldman & Zhang's MNIST net), `small-resnet` (four stages
    of 16 to 128 channels, for 8x8 to 32x32 images), `tiny-resnet` (the same behind a stem of
    stride 2: a quarter of the work), `resnet9` (6.6 million parameters, for fast training on
    CIFAR), `cifar-resnet18|34|50` (timm's ResNets with a 3x3 stem and no pooling, as used on
    CIFAR), any other name is timm's. With `-gn` at the end it is the same net
    with GroupNorm for BatchNorm, as private training needs: groups of two channels or more, at most
    32 (64 channels and more: 32 groups, as opacus has them). A function is called with n_classes
    and image_shape; "module:function" is imported first.

    Weights come from torch's global random state. Raises RecipeError for unknown names and for
    models that do not give [B, K] logits.

    >>> net = build_model("mlp-8", n_classes=10, image_shape=(8, 8, 1))
    >>> net(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    n_channels = image_shape[2]
    if callable(model) or ":" in model:
        net = resolve(model)(n_classes=n_classes, image_shape=image_shape)
    else:
        net = _by_name(model, n_classes, image_shape)
    whole = nn.Sequential(
        Normalize(_per_channel(mean, n_channels), _per_channel(std, n_channels)), net
    )
    _check_logits(whole, model, n_classes, image_shape)
    return whole


def resolve(model: str | ModelFunction) -> ModelFunction:
    """The function itself, or the one "module:function" names."""
    if not isinstance(model, str):
        return model
    module, _, name = model.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"model {model!r} cannot be imported ({error}); give 'module:function' with the module "
            "on the path of the driver and of the workers"
        ) from error
    if not callable(function):
        raise RecipeError(f"model {model!r} is not a function")
    return function  # type: ignore[no-any-return]


def identity(model: str | ModelFunction) -> dict[str, object]:
    """What tells one model from another in a study's hash: its name, and its code if it is yours.

    The code hash covers the function's source and, transitively, that of the functions and classes
    of the same module which it names. Any edit of that text counts, comments too.
    """
    if isinstance(model, str) and ":" not in model:
        return {"name": model}
    function = resolve(model)
    name = model if isinstance(model, str) else getattr(function, "__qualname__", repr(function))
    digest = hashlib.sha256("\n".join(_sources(function)).encode())
    return {"name": name, "code": digest.hexdigest()}


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """log p_y - log sum_{k != y} p_k = z_y - logsumexp_{k != y} z_k; logits [B, K], y [B] -> [B].

    LiRA's logit-scaled confidence (Carlini et al. 2022), computed without forming p.

    >>> margins(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])).tolist()
    [0.0, -2.0]
    """
    label = y[:, None]
    others = logits.scatter(1, label, -torch.inf).logsumexp(1)
    return logits.gather(1, label)[:, 0] - others


def _sources(function: Any) -> Iterator[str]:
    module = inspect.getmodule(function)
    seen, todo = set(), [function]
    while todo:
        item = todo.pop(0)
        try:
            source = textwrap.dedent(inspect.getsource(item))
        except (OSError, TypeError) as error:
            raise RecipeError(
                f"the source of {item!r} cannot be read ({error}); define the model function in a "
                "file, so that a study can tell when it changes"
            ) from error
        yield source
        seen.add(item)
        for name in dict.fromkeys(re.findall(r"\w+", source)):
            other = getattr(module, name, None)
            own = (
                isinstance(other, type | types.FunctionType) and inspect.getmodule(other) is module
            )
            if own and other not in seen and other not in todo:
                todo.append(other)


def _by_name(name: str, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    H, W, C = image_shape
    if name.endswith("-gn"):
        return _with_group_norm(_by_name(name.removesuffix("-gn"), n_classes, image_shape))
    if name.startswith("mlp-"):
        return _mlp(name, H * W * C, n_classes)
    if name in ("small-resnet", "tiny-resnet"):
        return _small_resnet(C, n_classes, stride=1 if name == "small-resnet" else 2)
    if name == "resnet9":
        return _resnet9(C, n_classes)
    if name in SMALL_IMAGE_RESNETS:
        return _small_stem(_timm(name.removeprefix("cifar-"), C, n_classes), C, 64)
    return _timm(name, C, n_classes)


def _mlp(name: str, n_inputs: int, n_classes: int) -> nn.Module:
    try:
        widths = [int(width) for width in name.split("-")[1:]]
    except ValueError as error:
        raise RecipeError(f"model {name!r} should be mlp-WIDTH[-WIDTH...]") from error
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in zip([n_inputs, *widths], widths, strict=False):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_classes))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.layers(x)
        return found


class MaxOverPixels(nn.Module):
    """[B, C, H, W] to [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


class Scaled(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def _resnet9(n_channels: int, n_classes: int) -> nn.Module:
    """The net of fast CIFAR training (Page 2018, "How to Train Your ResNet"): eight convolutions of
    64 to 512 channels, two residual blocks, logits of an eighth of their size at the start."""

    def block(n_in: int, n_out: int, *, pool: bool = False) -> nn.Sequential:
        layers: list[nn.Module] = [
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))

    return nn.Sequential(
        block(n_channels, 64),
        block(64, 128, pool=True),
        Residual(block(128, 128), block(128, 128)),
        block(128, 256, pool=True),
        block(256, 512, pool=True),
        Residual(block(512, 512), block(512, 512)),
        MaxOverPixels(),
        nn.Linear(512, n_classes, bias=False),
        Scaled(0.125),
    )


def _timm(name: str, n_channels: int, n_classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:8]}*")[:5])
        raise RecipeError(
            f"there is no model {name!r}; take one of {', '.join(NAMES)}, or a timm model"
            + (f" such as {near}" if near else "")
        )
    model: nn.Module = timm.create_model(name, num_classes=n_classes, in_chans=n_channels)
    return model


def _small_resnet(n_channels: int, n_classes: int, *, stride: int) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    net = ResNet(
        BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_type="deep",
        stem_width=8,
        num_classes=n_classes,
        in_chans=n_channels,
    )
    return _small_stem(net, n_channels, 16, stride=stride)


def _small_stem(net: Any, n_channels: int, width: int, *, stride: int = 1) -> nn.Module:
    """One 3x3 convolution without pooling: the stem ResNets have on 32x32 images."""
    net.conv1 = nn.Conv2d(n_channels, width, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    module: nn.Module = net
    return module


def _with_group_norm(net: nn.Module) -> nn.Module:
    """`net` with a GroupNorm in place of each BatchNorm, with the same activation after it."""
    from timm.layers import BatchNormAct2d

    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            C = child.num_features
            groups = max(g for g in range(1, min(32, max(1, C // 2)) + 1) if C % g == 0)
            norm: nn.Module = nn.GroupNorm(groups, C)
            if isinstance(child, BatchNormAct2d):
                norm = nn.Sequential(norm, child.drop, child.act)
            setattr(module, name, norm)
    return net


def _per_channel(values: Sequence[float], n_channels: int) -> Sequence[float]:
    if len(values) not in (1, n_channels):
        raise RecipeError(f"mean and std need 1 or {n_channels} values, got {len(values)}")
    return tuple(values) * (n_channels if len(values) == 1 else 1)


def _check_logits(
    model: nn.Module, name: object, n_classes: int, image_shape: tuple[int, int, int]
) -> None:
    H, W, C = image_shape
    training = model.training
    with torch.no_grad():
        try:
            logits = model.eval()(torch.zeros(1, C, H, W))
        except Exception as error:  # whatever a model raises on its first image, its name helps
            raise RecipeError(
                f"model {name!r} does not run on {H}x{W}x{C} images ({error}); take another model "
                "or image size"
            ) from error
    model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (1, n_classes):
        raise RecipeError(
            f"model {name!r} gives {getattr(logits, 'shape', type(logits))} for one image; it must "
            f"give logits [B, {n_classes}]"
        )
