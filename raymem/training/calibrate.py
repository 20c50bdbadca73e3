"""How many models a device trains best in one step: tried out, four times as many each time.

A GPU that one small model leaves idle takes more of them in the same time, until it is busy or
full. Few models may be slower than one: their convolutions have groups.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch

from raymem.errors import first_line
from raymem.plan import Seeds
from raymem.training.group import Group, why_alone
from raymem.training.images import Images
from raymem.training.loop import start
from raymem.training.precision import products_of
from raymem.training.recipe import Recipe, Steps
from raymem.training.replay import WARM_UP, say_once
from raymem.training.trial import by_itself, fresh_model

MOST = 256
# Of the memory that is free: evaluation needs some as well, and so does what grows unseen.
SHARE_OF_MEMORY = 0.7
# Larger groups must give so much more, or they are not worth their memory, and what is lost with
# their worker.
WORTH = 1.1
TIMES, TIMED_STEPS = 4, 20


def models_per_step(images: Images, recipe: Recipe, subset_size: int, *, share: float = 1.0) -> int:
    """How many trials of a study to train together on the device of `images`, 1 to 256.

    `share` is the part of the device that this process may use. 1 on CPUs, where more bring
    nothing, and for recipes that are not for groups. On a GPU it takes some seconds.
    """
    if images.device.type != "cuda" or why_alone(recipe, images) is not None:
        return 1
    free, _ = torch.cuda.mem_get_info(images.device)
    try:
        return best_number(
            lambda G: tried(images, recipe, subset_size, G), SHARE_OF_MEMORY * share * free
        )
    except Exception as error:  # whatever vmap or a model in it cannot do
        say_once(f"models are trained one by one: {first_line(error)}")
        return 1


def best_number(attempt: Callable[[int], tuple[float, float]], room: float) -> int:
    """The number of models that is worth it; `attempt` gives images per second, and bytes.

    >>> busy_from_sixteen = lambda G: (min(G, 16) * 1000.0, G * 1e6)
    >>> best_number(busy_from_sixteen, 1e9), best_number(busy_from_sixteen, 5e6)
    (16, 4)
    """
    rates: dict[int, float] = {}
    G, used = 1, 0.0
    while G <= MOST and TIMES * used <= room:
        try:
            rates[G], used = attempt(G)
        except (torch.OutOfMemoryError, MemoryError):
            break
        G *= TIMES
    enough = max(rates.values(), default=0.0) / WORTH
    return min((G for G, rate in rates.items() if rate >= enough), default=1)


def tried(images: Images, recipe: Recipe, subset_size: int, G: int) -> tuple[float, float]:
    """Images per second that G models are trained with, and the bytes that they take."""
    whole = Steps.of(recipe, subset_size)
    steps = Steps(batch=whole.batch, total=WARM_UP + 1 + TIMED_STEPS, epochs=1)
    device = images.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device) if cuda else 0
    with by_itself(0, torch.get_num_threads()), products_of(recipe, device):
        group = _group(images, recipe, subset_size, G, steps)
        group.course.begin()
        for _ in range(WARM_UP + 1):
            group.step()
        _wait(device)
        began = time.perf_counter()
        for _ in range(TIMED_STEPS):
            group.step()
        _wait(device)
        seconds = time.perf_counter() - began
    used = torch.cuda.max_memory_reserved(device) - before if cuda else 0
    return TIMED_STEPS * G * steps.batch / seconds, float(used)


def _group(images: Images, recipe: Recipe, subset_size: int, G: int, steps: Steps) -> Group:
    """Of G copies of one model, on the first images of the set."""
    model = fresh_model(images, recipe)
    mask = torch.arange(len(images.y_train)).numpy() < max(1, subset_size)
    started = [
        start(copy.deepcopy(model), images, mask, recipe, Seeds(init=g, order=g, augment=g))
        for g in range(G)
    ]
    states, subsets = [state for state, _ in started], [subset for _, subset in started]
    return Group(states, subsets, images, recipe, steps)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
