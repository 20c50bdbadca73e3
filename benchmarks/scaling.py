"""What ImageNet would cost, from what was measured in small: writes the tables of docs/scaling.md.

    python -m benchmarks.scaling            prints them
    python -m benchmarks.scaling --write    puts them into docs/scaling.md

Operations are counted, sizes and times at scale are read from benchmarks/measured/, and what is
assumed is said to be. Of a GPU only the rates of the table of one card were measured.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measured import kept
from raymem.models import build_model

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
N, M, CLASSES, TRIALS, RATIO = 1_281_167, 50_000, 1000, 2000, 0.7
PIXELS, CROP = 128, 112
CURVATURE_MODELS, PASSES = 100, 12
EPOCHS = (16, 90)
# Assumed, not measured: what one GPU does of a ResNet-50 in bfloat16, all told.
TFLOPS = (25.0, 50.0, 100.0)
NODES, GPUS_PER_NODE, GIGABITS = 16, 8, 10.0

Table = list[tuple[str, ...]]


def operations(pixels: int, *, backward: bool) -> float:
    """Floating-point operations for one image in a ResNet-50 of 1,000 classes, counted by torch.

    A multiplication with its addition is two.
    """
    net = build_model("resnet50", n_classes=CLASSES, image_shape=(pixels, pixels, 3))
    x = torch.zeros(2, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(net.train()(x), torch.zeros(2, dtype=torch.long))
        if backward:
            loss.backward()
    return float(counter.get_total_flops()) / 2


def parameters() -> int:
    net = build_model("resnet50", n_classes=CLASSES, image_shape=(CROP, CROP, 3))
    return sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.buffers())


class Cost:
    """Operations of the parts of the study."""

    def __init__(self) -> None:
        self.train_image = operations(CROP, backward=True)
        self.forward_image = operations(PIXELS, backward=False)
        self.evaluate = (N + M) * self.forward_image
        self.curvature = CURVATURE_MODELS * N * PASSES * self.forward_image

    def trial(self, epochs: int) -> float:
        return RATIO * N * epochs * self.train_image + self.evaluate

    def study(self, epochs: int) -> float:
        return TRIALS * self.trial(epochs) + self.curvature


def gpu_hours(operations: float, tflops: float) -> float:
    return operations / (tflops * 1e12) / 3600


def training(cost: Cost) -> Table:
    rows: Table = [
        ("what", "arithmetic", "value", "kind"),
        ("forward and backward, one image", f"ResNet-50 at {CROP} px, counted by torch",
         f"{cost.train_image / 1e9:.2f} GFLOP", "counted"),
        ("forward, one image", f"ResNet-50 at {PIXELS} px, counted by torch",
         f"{cost.forward_image / 1e9:.2f} GFLOP", "counted"),
        ("evaluation of a trial", f"({N:,} + {M:,}) x {cost.forward_image / 1e9:.2f} GFLOP",
         f"{cost.evaluate / 1e15:.2f} PFLOP", "computed"),
    ]  # fmt: skip
    for epochs in EPOCHS:
        rows.append((
            f"a trial of {epochs} epochs",
            f"{RATIO} x {N:,} x {epochs} x {cost.train_image / 1e9:.2f} GFLOP + evaluation",
            f"{cost.trial(epochs) / 1e15:.0f} PFLOP", "computed",
        ))  # fmt: skip
    rows.append((
        f"curvature under {CURVATURE_MODELS} models",
        f"{CURVATURE_MODELS} x {N:,} x {PASSES} x {cost.forward_image / 1e9:.2f} GFLOP",
        f"{cost.curvature / 1e15:,.0f} PFLOP", "computed",
    ))  # fmt: skip
    return rows


def hours(cost: Cost) -> Table:
    rows: Table = [
        ("one GPU does (assumed)", *(f"{t:.0f} TFLOP/s" for t in TFLOPS)),
        ("images/s in training, at that rate",
         *(f"{t * 1e12 / cost.train_image:,.0f}" for t in TFLOPS)),
    ]  # fmt: skip
    for epochs in EPOCHS:
        each = [gpu_hours(cost.trial(epochs), t) for t in TFLOPS]
        rows.append((f"GPU-hours of a trial of {epochs} epochs", *(f"{h:.2f}" for h in each)))
        rows.append((f"GPU-hours of {TRIALS:,} of them", *(f"{TRIALS * h:,.0f}" for h in each)))
    each = [gpu_hours(cost.curvature, t) for t in TFLOPS]
    rows.append(
        (f"GPU-hours of curvature, {CURVATURE_MODELS} models", *(f"{h:,.0f}" for h in each))
    )
    study = [gpu_hours(cost.study(EPOCHS[0]), t) for t in TFLOPS]
    rows.append((
        f"days on {NODES * GPUS_PER_NODE} GPUs, {EPOCHS[0]} epochs, all",
        *(f"{h / NODES / GPUS_PER_NODE / 24:.1f}" for h in study),
    ))  # fmt: skip
    rows.append((f"money at p per GPU-hour, {EPOCHS[0]} epochs", *(f"{h:,.0f} p" for h in study)))
    return rows


def on_a_card() -> Table:
    """Feldman & Zhang's two studies, and one between them, at the rates measured on one card."""
    rates = kept("gpu")["images_per_second"]
    rows: Table = [("2,000 models of", "arithmetic", f"hours of one {kept('gpu')['card']}", "kind")]
    for what, n, epochs, name in (
        ("mlp-512-256 on MNIST, 10 epochs, 256 in one step", 60_000, 10, "mlp-512-256"),
        ("resnet9 on CIFAR-10, 16 epochs", 50_000, 16, "resnet9"),
        (f"ResNet-50 on ImageNet at {PIXELS} px, {EPOCHS[0]} epochs", N, EPOCHS[0], "resnet50"),
    ):
        images, rate = TRIALS * RATIO * n * epochs, rates[name]
        if rate is None:
            rows.append((what, f"{images:.3g} images in training", "", "rate not measured"))
            continue
        value = (
            f"{images / rate / 3600:,.2g}"
            if images / rate < 36_000
            else (f"{images / rate / 3600:,.0f}")
        )
        rows.append(
            (
                what,
                f"{TRIALS:,} x {RATIO} x {n:,} x {epochs} images / {rate:,} a second",
                value,
                "computed",
            )
        )
    return rows


def disk_and_network() -> Table:
    scoring, cache = kept("scoring"), (N + M) * PIXELS**2 * 3
    trial, weights = scoring["trial_bytes"], 4 * parameters()
    per_node, committed = cache * 8 / (GIGABITS * 1e9), TRIALS * trial
    return [
        ("what", "arithmetic", "value", "kind"),
        ("cache", f"({N:,} + {M:,}) x {PIXELS} x {PIXELS} x 3 bytes", f"{cache / 1e9:.1f} GB",
         "computed"),
        ("one trial file", f"{N + M:,} rows", f"{trial / 1e6:.1f} MB", "measured"),
        (f"{TRIALS:,} trial files", f"{TRIALS:,} x {trial / 1e6:.1f} MB",
         f"{committed / 1e9:.0f} GB", "computed"),
        (f"weights of {CURVATURE_MODELS} models", f"{CURVATURE_MODELS} x {weights / 1e6:.0f} MB",
         f"{CURVATURE_MODELS * weights / 1e9:.1f} GB", "counted"),
        ("scores", "examples, and 20 folds", f"{scoring['scores_bytes_at_2000'] / 1e9:.1f} GB",
         "computed from a measured fold"),
        ("local disk while scoring", f"20 folds x {N + M:,} x 92 bytes",
         f"{scoring['spool_bytes'] / 1e9:.1f} GB", "computed"),
        (f"copying the cache to a node at {GIGABITS:.0f} Gbit/s (assumed)",
         f"{cache / 1e9:.1f} GB x 8 / {GIGABITS:.0f} Gbit/s", f"{per_node:.0f} s", "computed"),
        (f"copying it to {NODES} nodes", f"{NODES} x {cache / 1e9:.1f} GB",
         f"{NODES * cache / 1e9:,.0f} GB of traffic", "computed"),
        ("commits", f"{trial / 1e6:.1f} MB a trial", f"{committed / 1e9:.0f} GB", "computed"),
    ]  # fmt: skip


def scores() -> Table:
    s, i = kept("scoring"), kept("influence")
    return [
        ("what", "arithmetic", "value", "kind"),
        ("one trial read and added", f"{s['examples']:,} rows", f"{s['seconds_per_trial']:.2f} s",
         "measured"),
        ("one fold", "its rows of scores/folds.parquet", f"{s['seconds_per_fold']:.1f} s",
         "measured"),
        ("the rest", "estimates, intervals, tables", f"{s['seconds_fixed']:.0f} s", "measured"),
        (f"scoring {TRIALS:,} trials", f"2000 x {s['seconds_per_trial']:.2f} + 20 x "
         f"{s['seconds_per_fold']:.1f} + {s['seconds_fixed']:.0f} s",
         f"{s['seconds_at_2000'] / 60:.0f} min", "extrapolated"),
        ("memory of scoring", f"peak with {s['folds']} folds {s['peak_many_folds']:.2f} GB, and "
         "bits of 2,000 trials", f"{s['peak_at_2000']:.1f} GB", "extrapolated"),
        ("influence of one class on itself", "2,000 trials, about 1,281 x 50 examples",
         f"{1e3 * i['per_class']:.0f} ms", "measured"),
        ("influence, all classes", f"{i['fixed']:.1f} s + 1000 x {i['per_class']:.3f} s",
         f"{i['seconds_at_2000']:.0f} s", "extrapolated"),
        ("memory of influence", "packed bits, pairs and tiles", f"{i['peak']:.2f} GB", "measured"),
        ("a mask of the plan", f"{N:,} examples", f"{s['mask_seconds']:.2f} s", "measured"),
        ("a commit", "encode, digest, local disk", f"{s['commit_seconds']:.2f} s", "measured"),
    ]  # fmt: skip


def fleet() -> Table:
    t = kept("ten_thousand")
    first, last = t["memory"][0], t["memory"][-1]
    rows: Table = [
        ("what", "value", "kind"),
        (f"{t['trials']:,} empty trials, {t['workers']} workers: a trial, start and all",
         f"{1e3 * t['per_trial']:.1f} ms", "measured"),
        ("the first commit after", f"{t['start']:.0f} s", "measured"),
        ("the same trial in the last tenth",
         f"{1e3 * t['last_tenth']:.1f} ms ({1e3 * t['first_tenth']:.1f} in the first)", "measured"),
    ]  # fmt: skip
    for name, label in (
        ("driver", "driver"),
        ("queue", "trial queue actor"),
        ("largest_worker", "largest worker"),
        ("object_store", "object store"),
    ):
        change = f"{first[name]:.1f} to {last[name]:.1f} MB"
        rows.append((
            f"memory of the {label}, from {first['done']:,} to {last['done']:,} trials",
            change, "measured",
        ))  # fmt: skip
    ended = f"{t['listing']:.2f}, {t['status']:.1f}, {t['resume']:.2f} s"
    rows.append(("listing, status, resume of the finished study", ended, "measured"))
    rows.append(("calls a trial queue actor answers", f"{t['calls_a_second']:,.0f}/s", "measured"))
    return rows


def simulated() -> Table:
    rows: Table = [("scenario", "workers", "hours (ideal)", "lost", "given up", "calls/s",
                    "share of a core")]  # fmt: skip
    for s in kept("simulation")["scenarios"]:
        ended = ", ended" if s["fatal"] else ""
        rows.append((
            s["name"], f"{s['workers']:,}", f"{s['hours']:.1f} ({s['ideal_hours']:.1f})",
            f"{100 * s['lost_share']:.1f}%", f"{s['given_up']}{ended}",
            f"{s['calls_a_second']:,.0f}", f"{100 * s['queue_share']:.2f}%",
        ))  # fmt: skip
    return rows


def where() -> Iterator[str]:
    for name in ("scoring", "influence", "ten_thousand", "simulation", "gpu"):
        numbers = kept(name)
        size = f", {numbers['trials']:,} trials" if name == "ten_thousand" else ""
        yield f"- {name}: {numbers['measured']}, {numbers['on']}{size}"


def as_markdown(table: Table) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def tables() -> dict[str, str]:
    """All tables of the page, by the name that marks their place."""
    cost = Cost()
    return {
        "training": as_markdown(training(cost)),
        "hours": as_markdown(hours(cost)),
        "card": as_markdown(on_a_card()),
        "disk": as_markdown(disk_and_network()),
        "scores": as_markdown(scores()),
        "fleet": as_markdown(fleet()),
        "simulated": as_markdown(simulated()),
        "where": "\n".join(where()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/scaling.md.")
    parser.add_argument("--write", action="store_true", help="into the page")
    write = parser.parse_args().write
    page = PAGE.read_text()
    for name, text in tables().items():
        print(f"\n{name}\n{text}")
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert place.search(page), name
        page = place.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    if write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
