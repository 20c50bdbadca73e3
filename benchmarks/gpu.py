"""One GPU in a few minutes: is it right, and how fast is it? python -m benchmarks.gpu [--data NPZ]

`make gpu-check` runs it. Prints a line for each check (PASS or FAIL) and a row for each measurement
as it goes; each part has its own time limit, the most valuable first, and an error in one leaves
the others. Exit code 1 if a check failed. With --toy everything is small, also for CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from raymem import CurvatureRule, Plan, Recipe
from raymem.curvature.input_checks import float32_products
from raymem.curvature.lower_precision import relative_difference
from raymem.models import build_model
from raymem.training import (
    Images,
    Member,
    Meter,
    Steps,
    TrialResult,
    as_input,
    default_device,
    evaluate,
    run_group,
    run_trial,
    train,
)
from raymem.training.calibrate import models_per_step
from raymem.training.group import Group
from raymem.training.loop import longest, start
from raymem.training.ranks import ALONE
from raymem.training.step import Feed, SingleStep
from raymem.training.trial import fresh_model

ALL_SECONDS = 345.0
MLP = Recipe(model="mlp-512-256", epochs=4, learning_rate=0.02)
TINY = Recipe(
    model="tiny-resnet", epochs=4, batch_size=64, learning_rate=0.05, crop_padding=4, flip=True
)
RESNET18 = Recipe(
    model="cifar-resnet18", epochs=3, batch_size=256, precision="bfloat16", channels_last=True,
    crop_padding=4, flip=True,
)  # fmt: skip


@dataclass
class Bench:
    """The set, its sizes, and what came out so far."""

    images: Images
    toy: bool
    data: str | None = None
    """The .npz that images are from."""
    failed: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return Plan(n=len(self.images.y_train), subset_ratio=0.7, seed=1)

    def sizes(self, *whole: int) -> tuple[int, ...]:
        """Numbers of models, small ones for toys."""
        return tuple(dict.fromkeys(min(G, 3) for G in whole)) if self.toy else whole

    def recipe(self, recipe: Recipe, **change: Any) -> Recipe:
        """With changes, and small where all is small."""
        small: dict[str, Any] = {}
        if self.toy:
            model = "mlp-16" if recipe.model == MLP.model else TINY.model
            small = {"epochs": 2, "batch_size": 16, "model": model, "precision": "float32"}
        return dataclasses.replace(recipe, **{**change, **small})

    def check(self, what: str, good: bool, found: str = "") -> None:
        print(f"{'PASS' if good else 'FAIL'}  {what}{f': {found}' if found else ''}", flush=True)
        if not good:
            self.failed.append(what)

    def member(self, trial: int, **more: Any) -> Member:
        return Member(mask=self.plan.mask(trial), seeds=self.plan.seeds(trial), **more)

    def alone(self, recipe: Recipe, trial: int, *, images: Images | None = None, **more: Any):
        return run_trial(
            images or self.images, self.plan.mask(trial), recipe, self.plan.seeds(trial),
            subset_size=self.plan.subset_size, keep_weights=True, **more,
        )  # fmt: skip

    def together(self, recipe: Recipe, G: int, **more: Any) -> list[Any]:
        members = [self.member(t, keep_weights=True) for t in range(G)]
        return run_group(self.images, members, recipe, subset_size=self.plan.subset_size, **more)


def show(what: str, result: str) -> None:
    print(f"ROW   {what}: {result}", flush=True)


def apart(a: TrialResult, b: TrialResult) -> float:
    """Largest difference of a weight, over the largest weight of its tensor."""
    return max(
        float((a.weights[k].double() - w.double()).abs().max() / w.double().abs().max().clamp(1e-3))
        for k, w in b.weights.items()
    )


def same_bits(a: TrialResult, b: TrialResult) -> bool:
    return bool(
        np.array_equal(a.train.margin, b.train.margin)
        and np.array_equal(a.test.margin, b.test.margin)
        and np.array_equal(a.history.cumulative_loss, b.history.cumulative_loss)
        and all(torch.equal(w, b.weights[k]) for k, w in a.weights.items())
    )


def agree(a: TrialResult, b: TrialResult) -> float:
    """Share of examples on which two models are both right or both wrong."""
    return float(np.mean(a.train.correct == b.train.correct))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Checks


def few_steps(bench: Bench, recipe: Recipe) -> Recipe:
    """An epoch of two steps, so that rounding has not grown."""
    recipe = bench.recipe(recipe)
    return dataclasses.replace(recipe, epochs=1, batch_size=bench.plan.subset_size // 2)


def groups_are_right(bench: Bench) -> None:
    """A member of a group is the trial alone; the same group twice gives the same bits."""
    for whole, limit in ((MLP, 1e-4), (TINY, 5e-3)):
        recipe = few_steps(bench, whole)
        results = bench.together(recipe, 4)
        how = getattr(results[1], "how", repr(results[1]))
        bench.check(f"{recipe.model} trains in groups", how.startswith("group of 4"), how)
        expected = bench.alone(recipe, 1)
        off = apart(results[1], expected)
        bench.check(f"{recipe.model}: a group's model is the one alone", off < limit, f"{off:.1e}")
        again = bench.together(recipe, 4)
        same = all(same_bits(a, b) for a, b in zip(results, again, strict=True))
        bench.check(f"{recipe.model}: the same group twice, the same bits", same)


def large_groups_run(bench: Bench) -> None:
    """Half precision in a layout of channels last, which groups leave: it trains in a group."""
    recipe = bench.recipe(RESNET18, epochs=1)
    results = bench.together(recipe, 2)
    how = getattr(results[1], "how", repr(results[1]))
    bench.check(f"{recipe.model}, {recipe.precision} trains in groups", "group of 2" in how, how)
    agreed = agree(results[1], bench.alone(recipe, 1))
    bench.check(f"{recipe.model}: a group's model agrees with the one alone", agreed > 0.6,
                f"{agreed:.2%} of outcomes the same")  # fmt: skip


def graphs_are_right(bench: Bench) -> None:
    """Replayed steps are the eager ones."""
    for recipe in (MLP, TINY):
        short = bench.recipe(recipe, epochs=2)
        captured, eager = bench.alone(short, 0), bench.alone(short, 0, graph=False)
        bench.check(
            f"{recipe.model}: alone, captured as a graph",
            bench.images.device.type != "cuda" or "graph" in captured.how,
            captured.how,
        )
        same = same_bits(captured, eager)
        off = apart(captured, eager)
        bench.check(
            f"{recipe.model}: graph and eager steps agree", same or off < 0.05,
            "the same bits" if same else f"{off:.1e}",
        )  # fmt: skip
        again = bench.alone(short, 0)
        bench.check(f"{recipe.model}: the same trial twice", same_bits(captured, again))
        a, b = bench.together(short, 2), bench.together(short, 2, graph=False)
        same = all(same_bits(x, y) for x, y in zip(a, b, strict=True))
        off = max(apart(x, y) for x, y in zip(a, b, strict=True))
        bench.check(
            f"{recipe.model}: in a group, graph and eager steps agree", same or off < 0.05,
            "the same bits" if same else f"{off:.1e}",
        )  # fmt: skip


def device_against_cpu(bench: Bench) -> None:
    """The same trial on the CPU: the same draws, and weights but for rounding."""
    i = bench.images
    on_cpu = Images(
        x_train=i.x_train.cpu(), y_train=i.y_train.cpu(), x_test=i.x_test.cpu(),
        y_test=i.y_test.cpu(), n_classes=i.n_classes,
    )  # fmt: skip
    for whole, limit in ((MLP, 1e-4), (TINY, 1e-2)):
        recipe = few_steps(bench, whole)
        here = bench.alone(recipe, 2)
        there = bench.alone(recipe, 2, images=on_cpu, threads=torch.get_num_threads())
        off, same = apart(here, there), agree(here, there)
        bench.check(
            f"{recipe.model}: {i.device.type} against CPU", off < limit and same > 0.98,
            f"weights {off:.1e} apart, {same:.2%} of outcomes the same",
        )  # fmt: skip


def nothing_waits(bench: Bench) -> None:
    """No step reads back from the device or waits for it: torch raises where one would."""
    for recipe in (TINY, dataclasses.replace(MLP, optimizer="adamw", crop_scale=(0.4, 1.0))):
        recipe = bench.recipe(recipe, epochs=2)
        for G in (1, 3):
            step = begun(bench, recipe, G)
            step()
            with sync_refused(bench.images.device):
                step()
                step()
            what = "alone" if G == 1 else f"{G} in one step"
            bench.check(f"{recipe.model}, {what}: an eager step never waits", True)


def begun(bench: Bench, recipe: Recipe, G: int) -> Callable[[], None]:
    """An eager step of a training that has begun; alone for G = 1."""
    steps = Steps(batch=recipe.batch_size, total=8, epochs=1)
    started = [
        start(
            fresh_model(bench.images, recipe), bench.images, bench.plan.mask(t), recipe,
            bench.plan.seeds(t),
        )
        for t in range(G)
    ]  # fmt: skip
    states, subsets = [state for state, _ in started], [subset for _, subset in started]
    group = Group(states, subsets, bench.images, recipe, steps, graph=False)
    if G > 1:
        group.course.begin()
        return group.step
    group.course.feed = Feed(longest(steps), 1, steps.batch, bench.images.device)
    group.course.begin()
    return SingleStep(states[0], bench.images, recipe, ALONE, group.course.feed)


@contextlib.contextmanager
def sync_refused(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Measurements


def plain(bench: Bench, recipe: Recipe) -> float:
    """Images per second of the usual eager loop: pixels on the device, torch's optimizer."""
    i = bench.images
    n = bench.plan.subset_size
    model = build_model(recipe.model, n_classes=i.n_classes, image_shape=i.image_shape)
    model = model.to(i.device).train()
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    half = recipe.precision == "bfloat16"

    def epoch() -> None:
        for rows in torch.randperm(n, device=i.device).split(recipe.batch_size):
            x: Tensor = i.x_train[rows].permute(0, 3, 1, 2).float().div_(255)
            optimizer.zero_grad()
            with torch.autocast(i.device.type, dtype=torch.bfloat16, enabled=half):
                logits = model(x)
            nn.functional.cross_entropy(logits.float(), i.y_train[rows]).backward()
            optimizer.step()
        wait(i.device)

    with float32_products(tf32=False):
        epoch()
        began = time.perf_counter()
        epoch()
    return n / (time.perf_counter() - began)


def rate_of_epochs(
    bench: Bench, recipe: Recipe, run: Callable[[Callable[[int], None]], Any], size: int = 0
):
    """Images per second and model after the first epoch, and seconds in all; of subsets of `size`,
    the plan's by itself."""
    ends: list[float] = []
    began = time.perf_counter()
    run(lambda epoch: ends.append(time.perf_counter()))
    seconds = time.perf_counter() - began
    steps = Steps.of(recipe, size or bench.plan.subset_size)
    images = (steps.total - steps.end(1)) * steps.batch
    return images / (ends[-1] - ends[0]), seconds


def alone_rate(bench: Bench, recipe: Recipe, graph: bool) -> float:
    model = fresh_model(bench.images, recipe)
    rate, _ = rate_of_epochs(
        bench,
        recipe,
        lambda on_epoch: train(
            model, bench.images, bench.plan.mask(0), recipe, bench.plan.seeds(0),
            subset_size=bench.plan.subset_size, graph=graph, on_epoch=on_epoch,
        ),
    )  # fmt: skip
    return rate


def group_rate(bench: Bench, recipe: Recipe, G: int) -> str:
    members = [bench.member(t % 100) for t in range(G)]
    rate, seconds = rate_of_epochs(
        bench,
        recipe,
        lambda on_epoch: run_group(
            bench.images, members, recipe, subset_size=bench.plan.subset_size, on_epoch=on_epoch
        ),
    )
    peak = torch.cuda.max_memory_reserved() / 1e9 if bench.images.device.type == "cuda" else 0.0
    return (
        f"{rate * G:,.0f} images/s; {recipe.epochs} epochs of {G} trials with building, capture "
        f"and evaluation {seconds:.2f} s, {seconds / G:.3f} s a trial; {peak:.1f} GB"
    )


def rates_of(bench: Bench, recipe: Recipe, groups: tuple[int, ...], epochs: int) -> None:
    recipe = bench.recipe(recipe, epochs=epochs)
    name = f"{recipe.model}, {recipe.precision}, batch {recipe.batch_size}"
    show(f"{name}, plain eager loop", f"{plain(bench, recipe):,.0f} images/s")
    show(f"{name}, alone, eager", f"{alone_rate(bench, recipe, False):,.0f} images/s")
    more = bench.recipe(recipe, epochs=3 * epochs)
    show(f"{name}, alone, graph", f"{alone_rate(bench, more, True):,.0f} images/s")
    for G in bench.sizes(*groups):
        if G > 1:
            show(f"{name}, {G} models in a step", group_rate(bench, more, G))


def mlp_rates(bench: Bench) -> None:
    rates_of(bench, MLP, (32, 256), epochs=3)


def tiny_rates(bench: Bench) -> None:
    rates_of(bench, TINY, (16, 64), epochs=2)


def tf32_rates(bench: Bench) -> None:
    for recipe, G in ((MLP, 256), (TINY, 64)):
        for precision in ("tf32", "bfloat16"):
            chosen = bench.recipe(recipe, epochs=6, precision=precision)
            (G,) = bench.sizes(G)
            show(f"{recipe.model}, {precision}, {G} models in a step", group_rate(bench, chosen, G))


def large_rates(bench: Bench) -> None:
    rates_of(bench, RESNET18, (), epochs=3)


def curvature_rates(bench: Bench) -> None:
    """The exact trace of 10 classes, in the precision that the model allows, and the usual loop."""
    recipe = bench.recipe(RESNET18, epochs=1)
    images, n = bench.images, min(2_048, len(bench.images.y_train))
    model = fresh_model(images, recipe)
    train(model, images, bench.plan.mask(0), recipe, bench.plan.seeds(0))
    model = model.to(memory_format=torch.contiguous_format).eval()
    x, y = images.x_train[:n], images.y_train[:n]
    usual, _ = per_second(images.device, n, lambda: usual_loop(model, x, y))
    show(f"{recipe.model}, curvature, two gradients a probe, ten probes",
         f"{usual:,.0f} examples/s")  # fmt: skip
    traces, rates = {}, {}
    for precision in ("float32", "tf32", "bfloat16", "auto"):
        rule = CurvatureRule(precision=precision, paper=None)
        meter = Meter(model, x, y, rule)
        size = meter.batch_size(x, y)
        size = min(size, max(8, n // 8))  # enough whole batches to warm up, capture and replay
        measuring = functools.partial(meter.all, x, y, size)
        rates[precision], found = per_second(images.device, n, measuring)
        traces[precision] = torch.from_numpy(found["curvature"])
        chosen = meter.precision
        show(
            f"{recipe.model}, exact trace, {precision}: {chosen.precision} {chosen.differences}",
            f"{rates[precision]:,.0f} examples/s in batches of {size}",
        )
    off = relative_difference(traces["auto"], traces["float32"])
    what = f"{recipe.model}: the trace is within 0.001 of float32's"
    bench.check(what, off <= 1e-3, f"{off:.1e}")
    meter = Meter(model, x, y, CurvatureRule(precision="float32"))
    eager = meter(x[:64], y[:64])["curvature"].cpu()
    again = relative_difference(traces["float32"][:64], eager)
    what = f"{recipe.model}: replayed passes give what eager ones do"
    bench.check(what, again < 1e-4, f"{again:.1e}")
    if images.device.type == "cuda":
        ratio = rates["auto"] / usual
        bench.check(f"{recipe.model}: five times the usual loop", ratio >= 5, f"{ratio:.1f} times")


def per_second(device: torch.device, n: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Examples per second of the second run, and what it gives."""
    work()
    wait(device)
    began = time.perf_counter()
    found = work()
    wait(device)
    return n / (time.perf_counter() - began), found


def usual_loop(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """As published scripts do it: both gradients in each of ten probes, TF32 as torch has it."""
    for at in range(0, len(x), 256):
        images = as_input(x[at : at + 256], torch.contiguous_format)
        labels = y[at : at + 256]
        for _ in range(10):
            v = torch.randint(0, 2, images.shape, device=images.device) * 2e-3 - 1e-3
            gradients = []
            for moved in (images + v, images):
                moved = moved.clone().requires_grad_()
                loss = nn.functional.cross_entropy(model(moved), labels)
                gradients.append(torch.autograd.grad(loss, moved)[0])
            (gradients[0] - gradients[1]).flatten(1).norm(dim=1)


def whole_recipe(bench: Bench) -> None:
    """`--recipe gpu` of jobs/feldman_cifar.py, trained once on every training image of --data."""
    recipe, images = bench.recipe(recipe_of_job()), bench.images
    if bench.data is not None:
        images = Images.from_arrays(*arrays(bench.data), images.n_classes, images.device)
    everything = np.ones(len(images.y_train), bool)
    model = fresh_model(images, recipe)
    rate, seconds = rate_of_epochs(
        bench,
        recipe,
        lambda on_epoch: train(
            model, images, everything, recipe, bench.plan.seeds(0), on_epoch=on_epoch
        ),
        size=len(everything),
    )
    test = evaluate(model, images.x_test, images.y_test).correct
    whole = len(everything) == 50_000 and len(test) == 10_000
    accuracy = f"{test.mean():.2%} of {len(test):,} test images right"
    show(
        f"{recipe.model}, {recipe.precision}, {recipe.epochs} epochs of {len(everything):,} images",
        f"{accuracy}; {rate:,.0f} images/s after the first epoch, {seconds:.1f} s in all",
    )
    if whole:
        bench.check("recipe gpu reaches 93% on CIFAR-10", bool(test.mean() >= 0.93), accuracy)


def recipe_of_job() -> Recipe:
    path = Path(__file__).parents[1] / "jobs" / "feldman_cifar.py"
    recipe: Recipe = runpy.run_path(str(path))["RECIPES"]["gpu"]
    return recipe


def resnet9_rates(bench: Bench) -> None:
    """A few in one step: models that large fill the device sooner."""
    recipe = bench.recipe(recipe_of_job(), epochs=2)
    for G in bench.sizes(2, 4):
        show(
            f"{recipe.model}, {recipe.precision}, {G} models in a step",
            group_rate(bench, recipe, G),
        )


def chosen_sizes(bench: Bench) -> None:
    """What `--models-per-step auto` takes, and how long it tries."""
    for recipe in (MLP, TINY, RESNET18):
        began = time.perf_counter()
        G = models_per_step(bench.images, bench.recipe(recipe), bench.plan.subset_size)
        show(f"{recipe.model}, auto", f"{G} models in a step, {time.perf_counter() - began:.1f} s")


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "groups": (groups_are_right, 60),
    "graphs": (graphs_are_right, 60),
    "waiting": (nothing_waits, 30),
    "large-groups": (large_groups_run, 30),
    "mlp": (mlp_rates, 60),
    "tiny": (tiny_rates, 60),
    "large": (large_rates, 45),
    "cpu": (device_against_cpu, 45),
    "curvature": (curvature_rates, 60),
    "accuracy": (whole_recipe, 90),
    "resnet9": (resnet9_rates, 60),
    "auto": (chosen_sizes, 60),
    "tf32": (tf32_rates, 60),
}


class Late(BaseException):
    """A part took too long. Groups would take an Exception for a model's that is not for them."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Late in a part that takes longer."""

    def late(number: int, frame: object) -> None:
        raise Late(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pictures(path: str | None, n: int, device: torch.device, side: int = 32) -> Images:
    """n training images and a tenth as many for testing: those of an .npz, or random ones."""
    m = max(1, n // 10)
    if path is not None:
        x, y, _, _ = arrays(path)
        x, y = x[: n + m], y[: n + m]
    else:
        generator = np.random.default_rng(0)
        y = generator.integers(0, 10, n + m)
        # Each class has a colour, so that there is something to learn.
        noise = generator.integers(0, 156, (n + m, side, side, 3), dtype=np.uint8)
        x = noise + generator.integers(0, 100, (10, 1, 1, 3), dtype=np.uint8)[y]
    return Images.from_arrays(x[:n], y[:n], x[n:], y[n:], int(y.max()) + 1, device)


Set = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@functools.cache
def arrays(path: str) -> Set:
    """x_train, y_train, x_test, y_test of an .npz that has them, or JPEG bytes (`jpeg`, `offset`,
    `label`, and `split`, which is train or test)."""
    with np.load(path) as file:
        if "jpeg" not in file:
            x, y = file["x_train"], file["y_train"].astype(np.int64)
            return x, y, file["x_test"], file["y_test"].astype(np.int64)
        jpeg, offset = file["jpeg"], file["offset"]
        y, train = file["label"].astype(np.int64), file["split"] == "train"

    def decoded(i: int) -> np.ndarray:
        whole = Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))
        return np.asarray(whole.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        x = np.stack(list(pool.map(decoded, range(len(y)))))
    return x[train], y[train], x[~train], y[~train]


def run(bench: Bench, only: list[str] | None = None) -> bool:
    """All parts; did every check pass?"""
    began = time.perf_counter()
    for name in only or PARTS:
        part, limit = PARTS[name]
        left = ALL_SECONDS - (time.perf_counter() - began)
        if left <= 5:
            print(f"SKIP  {name}: no time is left", flush=True)
            continue
        start_of_part = time.perf_counter()
        try:
            with limited(min(limit, left)):
                part(bench)
        except (Exception, Late) as error:
            bench.check(name, False, f"{type(error).__name__}: {error}")
            traceback.print_exc(limit=-4)
        if bench.images.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"      {name} took {time.perf_counter() - start_of_part:.1f} s", flush=True)
    print(f"{'FAIL' if bench.failed else 'PASS'}  {len(bench.failed)} checks failed", flush=True)
    return not bench.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz with x_train (uint8), y_train, ..., or with JPEGs")
    parser.add_argument("--toy", action="store_true", help="small sizes, also on a CPU")
    parser.add_argument("--only", choices=PARTS, action="append")
    arguments = parser.parse_args()
    device = default_device()
    if device.type != "cuda" and not arguments.toy:
        parser.error("there is no GPU; --toy runs small sizes here")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}", flush=True)
    torch.set_flush_denormal(True)
    size = {"n": 60, "side": 8} if arguments.toy else {"n": 10_000}
    images = pictures(arguments.data, device=device, **size)
    bench = Bench(images, arguments.toy, arguments.data)
    sys.exit(0 if run(bench, arguments.only) else 1)


if __name__ == "__main__":
    main()
