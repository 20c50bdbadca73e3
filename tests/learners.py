"""Learners with known answers, and the images they read: proofs for the whole pipeline.

Each image carries its own number and label in its first pixels, so a learner can tell which example
it sees. `seen` is a weight per example that only training on it can raise.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from raymem import Examples, Recipe

K = 4
CAPACITY = 4096


def numbered_examples(n_train: int = 60, n_test: int = 20) -> Examples:
    """Images that carry number and label; test images have numbers of their own."""
    total = n_train + n_test
    x = np.zeros((total, 2, 2, 1), np.uint8)
    number = np.arange(total)
    y = number % K
    x[:, 0, 0, 0], x[:, 0, 1, 0], x[:, 1, 0, 0] = number % 256, number // 256, y
    return Examples(
        x_train=x[:n_train], y_train=y[:n_train], x_test=x[n_train:], y_test=y[n_train:]
    )


class KnownOdds(nn.Module):
    """Right with probability `p_in` on what it trained on, `p_out` elsewhere, drawn at its birth.

    p_true is sigmoid(2) where it is right and sigmoid(-2) where it is wrong.
    """

    def __init__(self, p_in: float, p_out: float) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(CAPACITY))
        self.register_buffer("right_if_in", torch.rand(CAPACITY) < p_in)
        self.register_buffer("right_if_out", torch.rand(CAPACITY) < p_out)

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x[:, 0].flatten(1) * 255).round().long()
        number, label = pixels[:, 0] + 256 * pixels[:, 1], pixels[:, 2]
        is_label = nn.functional.one_hot(label, K).float()
        if self.training:
            return is_label * self.seen[number, None]
        is_in = self.seen[number] > 0
        right = torch.where(is_in, self.right_if_in[number], self.right_if_out[number])
        answer = torch.where(right, label, (label + 1) % K)
        # One logit apart from the rest by 2 + log(K - 1): log p - log of the others' sum is 2.
        gap = 2 + np.log(K - 1)
        logits = nn.functional.one_hot(answer, K) * gap
        # Where it is wrong, the label's margin is -2 as well.
        others = torch.log(torch.exp(torch.tensor(gap)) + K - 2)
        return logits + torch.where(right, 0.0, others - 2)[:, None] * is_label


def memorizes_everything(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return KnownOdds(1.0, 0.0)


def memorizes_nothing(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return KnownOdds(1.0, 1.0)


def errs_at_known_odds(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return KnownOdds(0.9, 0.4)


class Covered(nn.Module):
    """Right on an example if it, or another of its group, was trained on: groups are of one to
    three images.

    An example of a group of k has memorization (1 - r)^(k - 1) at subset ratio r: 1 if it is alone,
    and otherwise 0 by leaving one out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(CAPACITY))

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x[:, 0].flatten(1) * 255).round().long()
        number, label = pixels[:, 0] + 256 * pixels[:, 1], pixels[:, 2]
        is_label = nn.functional.one_hot(label, K).float()
        if self.training:
            return is_label * self.seen[number, None]
        size, first = group_of(number)
        others = first[:, None] + torch.arange(3)
        covered = (self.seen[others] > 0) & (torch.arange(3) < size[:, None])
        answer = torch.where(covered.any(1), label, (label + 1) % K)
        return nn.functional.one_hot(answer, K) * 5.0


def group_of(number: Tensor) -> tuple[Tensor, Tensor]:
    """Size of an image's group and its first number: of twelve in a row, three are alone, two pairs
    follow, then a group of three; the last two are alone."""
    sizes = torch.tensor([1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 1, 1])
    firsts = torch.tensor([0, 1, 2, 3, 3, 5, 5, 7, 7, 7, 10, 11])
    place = number % 12
    return sizes[place], number - place + firsts[place]


def covered_by_others(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return Covered()


class LookUpTable(nn.Module):
    """A row of logits per image number, all preferring a class no example has: to be taught."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        start = torch.zeros(CAPACITY, n_classes)
        start[:, -1] = 1.0
        self.table = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x[:, 0].flatten(1) * 255).round().long()
        return self.table[pixels[:, 0] + 256 * pixels[:, 1]]


def look_up_table(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return LookUpTable(n_classes)


def recipe(model, **settings) -> Recipe:
    """A recipe that leaves pixels as they are and raises `seen` at once."""
    defaults = {"epochs": 2, "batch_size": 64, "learning_rate": 100.0, "schedule": "constant"}
    return Recipe(model=model, **{**defaults, "mean": (0.0,), "std": (1.0,), **settings})


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, up):
        return up * 2


class _Opaque(nn.Module):
    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(n_inputs, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Doubling.apply(x.flatten(1)))


def no_second_derivative(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """A layer of its own that torch can differentiate once only."""
    return _Opaque(int(np.prod(image_shape)), n_classes)
