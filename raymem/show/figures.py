"""A report's figures, in light and dark for the page, and as PNG and PDF for papers."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from raymem.encoding import epsilon_name
from raymem.experiments import ARMS, GROUPS
from raymem.links import LeftOut, Links, PaperBins, Removed
from raymem.links.column_arrays import Floats, train_at
from raymem.scores import Attacked
from raymem.store import Store
from raymem.store.measures import known_measures, title_of, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

LIGHT = {
    "ink": "#1b1f24",
    "paper": "#ffffff",
    "grid": "#d8dee4",
    "one": "#0b62c4",
    "two": "#b3440e",
}
DARK = {"ink": "#e6edf3", "paper": "#12161c", "grid": "#333b45", "one": "#6cb2ff", "two": "#ff9d66"}
SIZE = (6.4, 4.0)
# Points of a scatter: more are a blot.
MOST_POINTS = 5_000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure."""

    name: str
    title: str
    alt: str
    """What it shows, in words, for people who do not see it."""
    light: bytes
    dark: bytes
    """PNG."""
    pdf: bytes

    def keep(self, store: Store, *, dark: bool = False) -> None:
        """Write figures/NAME.png and .pdf to the store, and NAME-dark.png if asked for."""
        kept = {".png": self.light, ".pdf": self.pdf}
        for suffix, data in (kept | {"-dark.png": self.dark} if dark else kept).items():
            store.files.replace(f"figures/{self.name}{suffix}", data)


Draw: TypeAlias = "Callable[[Axes, dict[str, str]], None]"


def figures(
    store: Store, links: Links, epsilon: float, attacked: Sequence[Attacked] = ()
) -> Iterator[Figure]:
    """All figures for which there are numbers."""
    scores = store.scores()
    here = train_at(scores, epsilon)
    mem = np.array(here["memorization"].drop_null().to_numpy(), np.float64)
    if len(mem):
        above = int((mem > 0.25).sum())
        yield _figure(
            "memorization",
            "Memorization of the training examples",
            f"Histogram of memorization over {len(mem):,} examples; {above:,} are above 0.25.",
            lambda ax, c: _histogram(ax, c, mem),
        )
    for bins in links.paper.get(epsilon, ()):
        if bins.straight is None or not bins.measure.endswith("_out"):
            continue
        values = known_measures(here)[bins.measure]
        everyone = np.array(here["memorization"].cast("float64").to_numpy(), np.float64)
        yield _figure(
            f"link1-{bins.measure}",
            f"Link 1: {title_of(bins.measure)} and memorization",
            f"Points: examples; dots: means of the paper's bins, with a line of slope "
            f"{bins.straight.slope:.3g} (R squared {bins.straight.r_squared:.2f} over bins)."
            + (
                " Circles: the same, binned by one half of the trials, means of the other."
                if bins.crossed is not None
                else ""
            ),
            functools.partial(_link1, bins=bins, mem=everyone, values=values),
        )
    seen = [o for o in links.curvature.observed if o.curvature is not None]
    if len(seen) > 1:
        yield _figure(
            "link2",
            "Link 2: mean curvature and epsilon",
            "Mean curvature at each epsilon: "
            + ", ".join(f"{o.curvature:.3g} at {epsilon_name(o.epsilon)}" for o in seen)
            + ".",
            lambda ax, c: _link2(ax, c, links),
        )
    pools = [a for a in links.memorization if a.pool is not None]
    if len(pools) > 1:
        yield _figure(
            "link3",
            "Link 3: memorization and epsilon, with upper bounds",
            "Mean memorization at each epsilon: "
            + ", ".join(f"{a.pool.value:.3f} at {epsilon_name(a.epsilon)}" for a in pools if a.pool)
            + ".",
            lambda ax, c: _link3(ax, c, links),
        )

    for here in attacked:
        if here.epsilon == epsilon and any(one.roc.fpr for one in here.attacks):
            yield _figure(
                "membership-roc",
                "Membership inference: true against false positives",
                f"Curves over {here.targets:,} target trials, both axes logarithmic. At 1% false "
                "positives the attacks find, in percent of the members: "
                + ", ".join(f"{one.name} {100 * one.tpr_at_fpr.value:.2g}" for one in here.attacks)
                + ".",
                functools.partial(_roc, here=here),
            )


def removal_figure(found: Removed) -> Figure:
    """Test accuracy and the number of removed examples, by arm (Feldman & Zhang 2020, figure 2)."""
    return _figure(
        "removal",
        "Removal: test accuracy without memorized or random examples",
        f"Mean test accuracy of {found.headline.repeats} repeats with 95% intervals, by number of "
        f"removed training examples. {found.verdict.text}.",
        functools.partial(_removal, found=found),
    )


def leave_one_out_figure(found: LeftOut) -> Figure:
    """Memorization of each example by leaving it out, against its score at ratio r."""
    return _figure(
        "leave-one-out",
        "Memorization by leaving one out and at a subset ratio",
        f"Memorization of {len(found.experiment.rows)} examples by leaving each out, with 95% "
        f"intervals, against memorization at subset ratio {found.experiment.scored_ratio:g}. "
        f"{found.verdict.text}.",
        functools.partial(_leave_one_out, found=found),
    )


def _figure(name: str, title: str, alt: str, draw: Draw) -> Figure:
    light, dark = _drawn(draw, LIGHT), _drawn(draw, DARK)
    about = {"Title": title, "Description": alt}
    png = _saved(light, "png", about)
    # To find the layout takes as long as to draw: it is found once.
    for canvas in (light, dark):
        canvas.set_layout_engine("none")
        canvas.axes[0].set_position(light.axes[0].get_position())
    return Figure(
        name=name,
        title=title,
        alt=alt,
        light=png,
        dark=_saved(dark, "png", about),
        pdf=_saved(light, "pdf", {"CreationDate": None}),
    )


def _drawn(draw: Draw, colours: dict[str, str]) -> Canvas:
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=SIZE, layout="constrained", facecolor=colours["paper"])
    ax = canvas.subplots()
    ax.set_facecolor(colours["paper"])
    draw(ax, colours)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(colours["ink"])
    ax.tick_params(colors=colours["ink"])
    ax.xaxis.label.set_color(colours["ink"])
    ax.yaxis.label.set_color(colours["ink"])
    ax.grid(color=colours["grid"], linewidth=0.6)
    ax.set_axisbelow(True)
    if legend := ax.get_legend():
        legend.get_frame().set_facecolor(colours["paper"])
        legend.get_frame().set_edgecolor(colours["grid"])
        for text in legend.get_texts():
            text.set_color(colours["ink"])
    return canvas


def _saved(canvas: Canvas, kind: str, about: Mapping[str, str | None]) -> bytes:
    out = io.BytesIO()
    canvas.savefig(out, format=kind, dpi=140, metadata=about)
    return out.getvalue()


def _histogram(ax: Axes, colours: dict[str, str], mem: Floats) -> None:
    ax.hist(mem, bins=np.linspace(min(-0.1, mem.min()), 1, 56).tolist(), color=colours["one"])
    ax.axvline(0.25, color=colours["two"], linewidth=1, label="0.25")
    ax.set_yscale("log")
    ax.set_xlabel("memorization")
    ax.set_ylabel("training examples")
    ax.legend()


def _link1(ax: Axes, colours: dict[str, str], bins: PaperBins, mem: Floats, values: Floats) -> None:
    both = np.isfinite(mem) & np.isfinite(values)
    step = max(1, int(both.sum()) // MOST_POINTS)
    ax.scatter(
        mem[both][::step], values[both][::step], s=4, alpha=0.25, color=colours["one"],
        linewidths=0, label="examples", rasterized=True,
    )  # fmt: skip
    ax.scatter(bins.memorization, bins.mean, s=22, color=colours["two"], label="means of bins")
    if bins.crossed is not None and len(bins.crossed.mean):
        ax.scatter(
            bins.crossed.memorization, bins.crossed.mean, s=26, facecolors="none",
            edgecolors=colours["ink"], linewidths=0.8, label="binned by other trials",
        )  # fmt: skip
    assert bins.straight is not None
    x = np.array([0.0, 1.0])
    ax.plot(x, bins.straight.slope * x + bins.straight.intercept, color=colours["two"], linewidth=1)
    if len(values[both]):
        top = float(np.quantile(values[both], 0.995))
        ax.set_ylim(min(0.0, float(values[both].min())), max(top, float(bins.mean.max())) * 1.05)
    ax.set_xlabel("memorization")
    ax.set_ylabel(f"{title_of(bins.measure)} [{unit_of(bins.measure)}]")
    ax.legend()


def _places(epsilons: list[float]) -> tuple[list[float], list[str]]:
    """Where epsilons are on an axis: logarithmic, inf one step after the last."""
    finite = [e for e in epsilons if math.isfinite(e)]
    last = math.log2(max(finite)) if finite else 0.0
    places = [math.log2(e) if math.isfinite(e) else last + 1.5 for e in epsilons]
    return places, [epsilon_name(e) for e in epsilons]


def _epsilon_axis(ax: Axes, places: list[float], names: list[str]) -> None:
    ax.set_xticks(places, names)
    ax.set_xlabel("epsilon")


def _link2(ax: Axes, colours: dict[str, str], links: Links) -> None:
    seen = [o for o in links.curvature.observed if o.curvature is not None]
    means = [o.curvature for o in seen if o.curvature is not None]
    places, names = _places([o.epsilon for o in seen])
    error = [0.0 if o.curvature_stderr is None else 2 * o.curvature_stderr for o in seen]
    ax.errorbar(
        places, means, yerr=error, fmt="o", color=colours["one"],
        capsize=3, label="mean curvature, two standard errors",
    )  # fmt: skip
    shape = links.curvature.shape
    finite = [p for p, o in zip(places, seen, strict=True) if math.isfinite(o.epsilon)]
    fitted = links.curvature.parameters
    if shape is not None and len(finite) > 1:
        x = np.linspace(min(finite), max(finite), 200)
        e = 2.0**x
        law = fitted["slope"].value * shape(e) * -np.expm1(-e) + fitted["c2"].value
        ax.plot(x, law, color=colours["two"], label="the theorem's law, fitted")
    _epsilon_axis(ax, places, names)
    ax.set_ylabel(f"mean curvature [{unit_of('curvature_out')}]")
    ax.set_ylim(bottom=0)
    ax.legend()


def _link3(ax: Axes, colours: dict[str, str], links: Links) -> None:
    audits = [a for a in links.memorization if a.pool is not None]
    places, names = _places([a.epsilon for a in audits])
    means = [a.pool.value for a in audits if a.pool]
    low = [a.pool.value - a.pool.low for a in audits if a.pool]
    high = [a.pool.high - a.pool.value for a in audits if a.pool]
    ax.errorbar(
        places, means, yerr=[low, high], fmt="o", color=colours["one"], capsize=3,
        label="mean memorization, 95%",
    )  # fmt: skip
    styles = {"paper": ":", "sharp": "--", "total-variation": "-"}
    for name, style in styles.items():
        points = [
            (p, c.bound.value)
            for p, a in zip(places, audits, strict=True)
            for c in a.bounds
            if c.bound.name == name
        ]
        if points:
            x, y = zip(*points, strict=True)
            # A mark too: one epsilon alone makes no line.
            ax.plot(
                x, y, style, marker="_", color=colours["two"], linewidth=1.2, label=f"bound: {name}"
            )
    _epsilon_axis(ax, places, names)
    ax.set_ylabel("memorization")
    ax.legend()


def _roc(ax: Axes, colours: dict[str, str], here: Attacked) -> None:
    styles = (("one", "-"), ("one", "--"), ("two", ":"), ("two", "-"), ("two", "--"), ("ink", "-"))
    least = 1.0
    for one, (colour, style) in zip(here.attacks, styles, strict=False):
        # A rate of 0 has no place on a logarithmic axis.
        points = [(f, t) for f, t in zip(one.roc.fpr, one.roc.tpr, strict=True) if t > 0]
        if points:
            x, y = zip(*points, strict=True)
            least = min(least, *x)
            label = f"{one.name}, AUC {one.auc.value:.3f}"
            ax.plot(x, y, style, color=colours[colour], linewidth=1.4, label=label)
    ax.plot(
        [least, 1], [least, 1], ":", color=colours["ink"], linewidth=1, label="guessing"
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("false-positive rate")
    ax.set_ylabel("true-positive rate")
    ax.legend(loc="lower right")


def _removal(ax: Axes, colours: dict[str, str], found: Removed) -> None:
    effect = found.headline
    styles = dict(zip(ARMS, (("two", "o-"), ("one", "s--"), ("ink", "^:")), strict=True))
    for arm, (colour, style) in styles.items():
        means = [effect.accuracy_all, *effect.accuracy[arm]]
        y = 100 * np.array([mean.value for mean in means])
        error = 100 * np.array(
            [[m.value - m.low for m in means], [m.high - m.value for m in means]]
        )
        ax.errorbar(
            [0, *effect.sizes], y, yerr=np.nan_to_num(error), fmt=style, color=colours[colour],
            capsize=3, markersize=4, linewidth=1.2, label=f"without {arm}",
        )  # fmt: skip
    ax.set_xlabel("removed training examples")
    ax.set_ylabel("test accuracy, percent")
    ax.legend()


def _leave_one_out(ax: Axes, colours: dict[str, str], found: LeftOut) -> None:
    rows = found.examples.to_pylist()
    styles = dict(zip(GROUPS, (("one", "s"), ("two", "o"), ("ink", "^")), strict=True))
    for group, (colour, marker) in styles.items():
        here = [row for row in rows if row["group"] == group]
        if not here:
            continue
        x, y, low, high = (
            np.array([row[name] for row in here])
            for name in (
                "memorization", "leave_one_out", "leave_one_out_low", "leave_one_out_high",
            )
        )  # fmt: skip
        ax.errorbar(
            x, y, yerr=[y - low, high - y], fmt=marker, color=colours[colour], markersize=4,
            linewidth=0.7, label=group,
        )  # fmt: skip
    ax.plot([0, 1], [0, 1], ":", color=colours["ink"], linewidth=1, label="equal")
    ax.set_xlabel(f"memorization at subset ratio {found.experiment.scored_ratio:g}")
    ax.set_ylabel("memorization by leaving one out")
    ax.legend()
