"""The registry of measures: everything that the trials say of an example beside its memorization.

Links, label-error rankings, the report and tables on the terminal take names, meanings and units
from here. Every measure is read so that larger values go with more memorization.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.store.columns import SCORES_CURVATURE, SCORES_EXAMPLES

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of an example that is compared with memorization."""

    name: str
    """Its key in links.json; a column of scores/examples.parquet unless `complement` is given."""
    title: str
    """Its plain name in tables."""
    meaning: str
    complement: str = ""
    """The column it is 1 minus; empty: it is a column itself."""
    rival: bool = True
    """Is it what curvature is compared with? False for curvature itself."""
    ranks_label_errors: bool = False
    """Are examples ranked by it where labels were flipped on purpose?"""

    @property
    def column(self) -> str:
        """The column of scores/examples.parquet that it is read from."""
        return self.complement or self.name

    @property
    def unit(self) -> str:
        """As documented of the column; empty for counts and shares."""
        return unit_of(self.column)

    def values(self, table: pa.Table) -> Floats | None:
        """[N] of rows of scores/examples.parquet; None if the study did not measure it, or no
        example has it."""
        if self.column not in table.column_names:
            return None
        values: Floats = table[self.column].cast(pa.float64()).to_numpy()
        if not np.isfinite(values).any():
            return None
        return 1 - values if self.complement else values


_OUT, _IN = "models trained without the example", "models trained on it"

MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            name="curvature_out", title="curvature, out", rival=False, ranks_label_errors=True,
            meaning=f"input loss curvature, {_OUT}",
        ),
        Measure(
            name="curvature_in", title="curvature, in", rival=False, ranks_label_errors=True,
            meaning=f"input loss curvature, {_IN}",
        ),
        Measure(
            name="curvature_over_training_out", title="curvature over training, out", rival=False,
            meaning=f"its mean over the epochs of training (Garg et al. 2024), {_OUT}",
        ),
        Measure(
            name="curvature_over_training_in", title="curvature over training, in", rival=False,
            ranks_label_errors=True,
            meaning=f"its mean over the epochs of training, {_IN}",
        ),
        Measure(
            name="curvature_paper_out", title="finite difference, out", rival=False,
            meaning=f"curvature score of Ravikumar et al. 2024 (eq. 14), {_OUT}",
        ),
        Measure(
            name="curvature_paper_in", title="finite difference, in", rival=False,
            ranks_label_errors=True,
            meaning=f"curvature score of Ravikumar et al. 2024 (eq. 14), {_IN}",
        ),
        Measure(
            name="loss_out", title="loss, out", ranks_label_errors=True,
            meaning=f"cross entropy, {_OUT}",
        ),
        Measure(name="loss_in", title="loss, in", meaning=f"cross entropy, {_IN}"),
        Measure(
            name="p_wrong_out", title="1 - p(label), out", complement="p_true_out",
            ranks_label_errors=True, meaning=f"1 - probability of its label, {_OUT}",
        ),
        Measure(
            name="p_wrong_in", title="1 - p(label), in", complement="p_true_in",
            meaning=f"1 - probability of its label, {_IN}",
        ),
        Measure(
            name="gradient_norm_out", title="input gradient, out",
            meaning=f"norm of the loss gradient with respect to the pixels, {_OUT}",
        ),
        Measure(
            name="gradient_norm_in", title="input gradient, in", ranks_label_errors=True,
            meaning=f"norm of the loss gradient with respect to the pixels, {_IN}",
        ),
        Measure(
            name="cumulative_loss", title="cumulative loss", ranks_label_errors=True,
            meaning="training loss summed over the epochs",
        ),
        Measure(
            name="learning_epoch", title="learning epoch", ranks_label_errors=True,
            meaning="first epoch from which training always got it right",
        ),
        Measure(
            name="forgetting_count", title="forgetting events", ranks_label_errors=True,
            meaning="times training got it wrong after getting it right",
        ),
        Measure(
            name="wrong_out", title="1 - C-score", complement="accuracy_out",
            meaning=f"error rate, {_OUT}; memorization itself where models fit what they train on",
        ),
    )
}  # fmt: skip

# What another store's memorization is compared by, and what ranks label errors beside MEASURES.
OTHER = Measure(
    name="memorization", title="memorization", ranks_label_errors=True,
    meaning="accuracy of models trained on the example minus that of models trained without it",
)  # fmt: skip
SOFT = Measure(
    name="memorization_soft", title="memorization, soft", ranks_label_errors=True,
    meaning="the same difference of the probability of the label",
)  # fmt: skip

# Columns of scores/examples.parquet that are no measure, by their plain names.
_TITLES = {
    "example_id": "example",
    "class": "class",
    "label": "label",
    "epsilon": "epsilon",
    "n_in": "models in",
    "n_out": "models out",
    "n_out_group": "models out, of all near duplicates",
    "n_curvature_in": "models in, with curvature",
    "n_curvature_out": "models out, with curvature",
    "p_true_in": "p(label), in",
    "p_true_out": "p(label), out",
    "memorized": "on the list of memorized examples",
    "memorized_probability": "probability of memorization above 0.25",
    "group_memorization": "memorization with its near duplicates",
    "memorization_low": "95% from",
    "memorization_high": "95% to",
    "attack": "best attack",
    "attack_auc": "AUC of the attack",
    "vulnerability": "vulnerability (d')",
}


def title_of(column: str) -> str:
    """The plain name of a measure or column; the column's own words where it has none.

    >>> title_of("curvature_out"), title_of("n_in"), title_of("accuracy_in")
    ('curvature, out', 'models in', 'accuracy, in')
    """
    known = {**MEASURES, OTHER.name: OTHER, SOFT.name: SOFT}
    if column in known:
        return known[column].title
    if column in _TITLES:
        return _TITLES[column]
    stem, _, arm = column.rpartition("_")
    words = f"{stem}, {arm}" if arm in ("in", "out") else column
    return words.replace("_", " ")


def unit_of(column: str) -> str:
    """The unit of a column of scores/examples.parquet; empty if it has none, as counts and shares.

    >>> unit_of("curvature_out"), unit_of("loss_out"), unit_of("memorization")
    ('nats/pixel^2', 'nats', '')
    """
    found = {**SCORES_EXAMPLES, **SCORES_CURVATURE}.get(column)
    return found.unit if found and ".." not in found.unit else ""


def known_measures(table: pa.Table) -> dict[str, Floats]:
    """The measures that rows of scores/examples.parquet have, [N] each, in the registry's order."""
    found = {name: measure.values(table) for name, measure in MEASURES.items()}
    return {name: values for name, values in found.items() if values is not None}
