"""Random resized crops against torchvision's, and the draws behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from raymem import Recipe
from raymem.errors import RecipeError
from raymem.training import augment
from raymem.training.crops import random_boxes, resized_crops

SCALE, RATIO = (0.25, 1.0), (3 / 4, 4 / 3)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(B, H, W, C=3, seed=0):
    return torch.randint(0, 256, (B, H, W, C), dtype=torch.uint8, generator=draws(seed))


@settings(max_examples=60, deadline=None)
@given(H=st.integers(5, 40), W=st.integers(5, 40), S=st.integers(1, 48), seed=st.integers(0, 10**6))
def test_a_resized_crop_is_torchvisions_antialiased_one(H, W, S, seed):
    """Larger, smaller and equal results, of boxes at the edge as well."""
    x = pictures(4, H, W, seed=seed)
    boxes = random_boxes(4, (H, W), (0.05, 1.0), (0.5, 2.0), draws(seed))
    found = resized_crops(x, boxes, S)
    for image, box, crop in zip(x, boxes, found, strict=True):
        expected = V.resized_crop(
            image.permute(2, 0, 1).float(), *box.tolist(), [S, S], antialias=True
        )
        assert torch.allclose(crop.permute(2, 0, 1), expected, atol=0.02), (box, S)


def test_a_mirrored_crop_is_the_crop_mirrored():
    x = pictures(6, 20, 20)
    boxes = random_boxes(6, (20, 20), SCALE, RATIO, draws())
    flipped = torch.tensor([True, False, True, False, True, False])
    plain, found = resized_crops(x, boxes, 12), resized_crops(x, boxes, 12, flipped)
    expected = torch.where(flipped[:, None, None, None], plain.flip(2), plain)
    assert torch.allclose(found, expected, atol=1e-4)


def test_boxes_are_drawn_as_torchvision_draws_them():
    """Two-sample Kolmogorov-Smirnov, alpha 1e-4 for each of six marginals."""
    from scipy.stats import ks_2samp

    ours = random_boxes(4000, (128, 96), SCALE, RATIO, draws(3)).numpy().astype(float)
    image = torch.zeros(3, 128, 96)
    torch.manual_seed(5)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(4000)], float
    )
    for a, b in (
        *zip(ours.T, theirs.T, strict=True),
        (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        (ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]),
    ):
        assert ks_2samp(a, b).pvalue > 1e-4


def test_boxes_lie_inside_and_where_none_fits_the_centre_is_taken():
    boxes = random_boxes(2000, (31, 17), (0.01, 1.0), (0.2, 5.0), draws())
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 31).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 17).all()
    # A whole strip cannot be cut to nearly a square.
    strip = random_boxes(5, (10, 100), (1.0, 1.0), RATIO, draws())
    assert strip.tolist() == [[0, 43, 10, 13]] * 5  # 13 of 100, as 10 * 4 / 3 says


RECIPE = Recipe(model="mlp-8", epochs=1, crop_scale=SCALE, crop_size=14, flip=True)


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe(model="mlp-8", epochs=1, crop_padding=3, flip=True)]
)
@pytest.mark.parametrize("world", [2, 3])
def test_an_image_is_augmented_alike_however_many_share_the_batch(recipe, world):
    x = pictures(11, 16, 16)
    whole = augment(x, recipe, draws(8))
    cuts = torch.arange(11).tensor_split(world)
    parts = [
        augment(x[c], recipe, draws(8), part=slice(int(c[0]), int(c[-1]) + 1), of=11) for c in cuts
    ]
    assert torch.allclose(torch.cat(parts).float(), whole.float(), atol=1e-4)


def test_crops_have_the_size_asked_for_and_evaluation_sees_whole_images(digits):
    from raymem import Plan
    from raymem.training import Images, run_trial

    seen = []

    def watching(n_classes, image_shape):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.last = torch.nn.Linear(1, n_classes)

            def forward(self, x):
                seen.append((self.training, tuple(x.shape[2:])))
                return self.last(x.mean((1, 2, 3))[:, None])

        return Net()

    images = Images.from_arrays(
        digits.x_train[:40], digits.y_train[:40], digits.x_test[:10], digits.y_test[:10], 10
    )
    recipe = Recipe(model=watching, epochs=1, batch_size=20, crop_scale=SCALE, crop_size=6)
    run_trial(images, np.ones(40, bool), recipe, Plan(n=40).seeds(0))
    assert {size for training, size in seen if training} == {(6, 6)}
    assert {size for training, size in seen if not training} == {(8, 8)}


def test_settings_of_crops_are_checked():
    with pytest.raises(RecipeError) as caught:
        Recipe(
            model="mlp-8", epochs=1, crop_scale=(0.5, 1.5), crop_ratio=(2.0, 1.0), crop_padding=2
        )
    for part in ("crop_scale must be", "crop_ratio", "two ways to crop"):
        assert part in str(caught.value)
    with pytest.raises(RecipeError, match="goes with crop_scale"):
        Recipe(model="mlp-8", epochs=1, crop_size=12)
