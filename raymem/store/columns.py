"""Every column of every table in a store: type, meaning, unit and sign.

The words here go into the Parquet files' field metadata and, by `make docs`, into docs/columns.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """A column's Arrow type, and what a person must know to use it."""

    type: pa.DataType
    meaning: str
    unit: str = ""

    def field(self, name: str) -> pa.Field:
        """The Arrow field, with meaning and unit in its metadata."""
        return pa.field(name, self.type, metadata={"meaning": self.meaning, "unit": self.unit})


Columns = Mapping[str, Column]
# A row of a table, by column.
Row = Mapping[str, Any]


def schema(columns: Columns, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """The Arrow schema of a table with these columns."""
    return pa.schema(
        [column.field(name) for name, column in columns.items()],
        metadata=None if metadata is None else dict(metadata),
    )


_SPLIT = Column(pa.string(), "train or test")
_INDEX = Column(pa.int64(), "position of the example in its split, in the set's order")
_ID = Column(pa.string(), "the example's id, unique over both splits")
_LABEL = Column(pa.int64(), "class number, 0..K-1")
_EPSILON = Column(pa.float64(), "privacy budget of the trial; inf: not private", "nats")
_TRIAL = Column(pa.int32(), "number of the subset; the same subset at every epsilon")
_GROUP = Column(
    pa.int64(), "number shared by examples with exactly equal pixels, over both splits; null: none"
)
_NEAR = Column(
    pa.int64(),
    "number shared by examples whose pixels differ by at most 5 of 255 (root mean square), exact "
    "duplicates among them, over both splits; only these in sets too large to search; null: none",
)

EXAMPLES: Columns = {
    "split": _SPLIT,
    "index": _INDEX,
    "example_id": _ID,
    "label": _LABEL,
    "content_hash": Column(pa.string(), "128 bits of SHA-256 over the image's shape and pixels"),
    "duplicate_group": _GROUP,
    "near_duplicate_group": _NEAR,
}

TRIAL: Columns = {
    "trial": _TRIAL,
    "epsilon": _EPSILON,
    "split": _SPLIT,
    "index": _INDEX,
    "in_subset": Column(
        pa.bool_(), "whether this model trained on the example; null for test examples"
    ),
    "correct": Column(pa.bool_(), "whether the largest logit is the label's"),
    "margin": Column(
        pa.float32(),
        "log p_y - log of the sum of the other classes' p; p_true = sigmoid(margin), "
        "loss = softplus(-margin)",
        "nats",
    ),
    "cumulative_loss": Column(
        pa.float32(),
        "cross entropy in training, summed over epochs; null outside the subset",
        "nats",
    ),
    "learning_epoch": Column(
        pa.int32(),
        "first epoch (from 1) after which every training visit classified it correctly; null "
        "outside the subset, and if there is none",
        "epochs",
    ),
    "forgetting_count": Column(
        pa.int32(),
        "times it was classified correctly at one training visit and incorrectly at the next; null "
        "outside the subset",
    ),
}

_TRACE = "trace of the Hessian of the loss in the pixels (Ravikumar et al. 2024, eq. 7)"
_OVER_TRAINING = (
    "mean of curvature over the epochs at which it was measured during training, including the "
    "last one (Garg et al. 2024)"
)
_SQUARED = "trace of the squared Hessian, or an unbiased estimate of it"
_GRADIENT = "L2 norm of the gradient of the loss in the pixels"
_PAPER = (
    "finite-difference score of Ravikumar et al. 2024 (eq. 14), not divided by h^2, so that it "
    "does not estimate the trace; h, number of probes and variant are in the metadata"
)
PER_PIXEL, PER_PIXEL2, PER_PIXEL4 = "nats/pixel", "nats/pixel^2", "nats^2/pixel^4"

# Of the summed loss, pixels in [0, 1]; null for test examples. Only if the study measures it.
TRIAL_CURVATURE: Columns = {
    "curvature": Column(pa.float32(), f"{_TRACE}; may be negative on smooth nets", PER_PIXEL2),
    "curvature_squared": Column(pa.float32(), _SQUARED, PER_PIXEL4),
    "gradient_norm": Column(pa.float32(), _GRADIENT, PER_PIXEL),
    "curvature_paper": Column(pa.float32(), _PAPER, "nats^2/pixel^2"),
    "curvature_over_training": Column(
        pa.float32(), f"{_OVER_TRAINING}; only if the study asks for it", PER_PIXEL2
    ),
}

SCORES_EXAMPLES: Columns = {
    "example_id": _ID,
    "index": _INDEX,
    "split": _SPLIT,
    "label": _LABEL,
    "epsilon": _EPSILON,
    "n_in": Column(pa.int32(), "trials that trained on the example; null for test examples"),
    "n_out": Column(pa.int32(), "trials that did not; for test examples, all trials"),
    "accuracy_in": Column(pa.float64(), "share of in-trials that classify it correctly", "0..1"),
    "accuracy_out": Column(
        pa.float64(), "share of out-trials that classify it correctly: C-score", "0..1"
    ),
    "p_true_in": Column(pa.float64(), "mean probability of the label over in-trials", "0..1"),
    "p_true_out": Column(pa.float64(), "mean probability of the label over out-trials", "0..1"),
    "memorization": Column(
        pa.float64(),
        "accuracy_in - accuracy_out (Feldman & Zhang 2020, eq. 1): high when only models that "
        "trained on the example classify it correctly",
        "-1..1",
    ),
    "memorization_stderr": Column(
        pa.float64(), "standard error of memorization; 0 where all trials of an arm agree", "-1..1"
    ),
    "memorization_low": Column(pa.float64(), "lower end of Newcombe's 95% interval", "-1..1"),
    "memorization_high": Column(pa.float64(), "upper end of Newcombe's 95% interval", "-1..1"),
    "memorization_soft": Column(
        pa.float64(),
        "p_true_in - p_true_out: less noisy than memorization, but a different estimand",
        "-1..1",
    ),
    "memorization_soft_stderr": Column(pa.float64(), "its standard error", "-1..1"),
    "memorization_soft_low": Column(pa.float64(), "lower end of its 95% interval", "-1..1"),
    "memorization_soft_high": Column(pa.float64(), "upper end of its 95% interval", "-1..1"),
    "memorized_probability": Column(
        pa.float64(),
        "posterior probability that memorization is above 0.25 (Jeffreys priors)",
        "0..1",
    ),
    "memorized": Column(
        pa.bool_(),
        "whether it is on the list of examples with memorization above 0.25; at most 5% of the "
        "list are expected to be false",
    ),
    "loss_in": Column(pa.float64(), "mean cross entropy over in-trials", "nats"),
    "loss_out": Column(pa.float64(), "mean cross entropy over out-trials", "nats"),
    "cumulative_loss": Column(
        pa.float64(), "mean over in-trials of the training loss summed over epochs", "nats"
    ),
    "learning_epoch": Column(
        pa.float64(), "mean learning epoch over the in-trials that learned it", "epochs"
    ),
    "forgetting_count": Column(pa.float64(), "mean forgetting events over in-trials"),
    "duplicate_group": _GROUP,
    "near_duplicate_group": _NEAR,
    "n_out_group": Column(
        pa.int32(),
        "trials that trained on no example of its near_duplicate_group; null: no group",
    ),
    "group_memorization": Column(
        pa.float64(),
        "accuracy_in minus the accuracy of trials that trained on no copy: the effect of the whole "
        "group instead of this copy alone; null: no other copy in training, or n_out_group is 0",
        "-1..1",
    ),
    "group_memorization_stderr": Column(pa.float64(), "its standard error", "-1..1"),
    "group_memorization_low": Column(pa.float64(), "lower end of Newcombe's 95% interval", "-1..1"),
    "group_memorization_high": Column(
        pa.float64(), "upper end of Newcombe's 95% interval", "-1..1"
    ),
    "null_reason": Column(
        pa.string(),
        "why memorization is null: test example, canary, no in-trial, no out-trial, not published; "
        "else null",
    ),
}

# A table of scores without one of these columns is damaged.
NEEDED = {
    "examples": (
        "example_id", "index", "split", "label", "epsilon", "n_in", "n_out", "accuracy_in",
        "accuracy_out", "memorization", "memorization_stderr", "memorization_low",
        "memorization_high",
    ),
    "trials": ("trial", "epsilon", "status"),
    "folds": ("fold", "epsilon", "n_in", "n_out", "correct_in", "correct_out"),
    "influence": ("train_id", "test_id", "epsilon", "influence"),
    "membership": ("example_id", "epsilon", "vulnerability"),
}  # fmt: skip

# Added to scores/examples.parquet and scores/trials.parquet if the study is private.
SCORES_PRIVACY: Columns = {
    "spent_epsilon": Column(
        pa.float64(),
        "epsilon spent by the steps taken, according to the accountant; inf: not private",
        "nats",
    ),
    "delta": Column(pa.float64(), "delta of (epsilon, delta)-DP; null: not private", "0..1"),
    "accountant": Column(pa.string(), "prv or rdp; null: not private"),
}
TRIALS_PRIVACY: Columns = {
    **SCORES_PRIVACY,
    "noise_multiplier": Column(
        pa.float64(), "standard deviation of the noise divided by max_grad_norm; 0: no noise"
    ),
    "sample_rate": Column(pa.float64(), "probability that an example is in a batch", "0..1"),
    "steps": Column(pa.int64(), "optimizer steps"),
    "max_grad_norm": Column(
        pa.float64(), "L2 norm that the gradient of each example is clipped to; inf: not clipped"
    ),
}

# Added to scores/trials.parquet if the study averages curvature over training.
TRIALS_OVER_TRAINING: Columns = {
    "curvature_epochs": Column(
        pa.int32(), "number of epochs averaged in curvature_over_training; null: not measured"
    ),
    "curvature_epochs_seconds": Column(
        pa.float64(), "wall time of measuring curvature in the epochs before the last", "seconds"
    ),
}

_OVER = {"in": "in-trials that measured curvature", "out": "out-trials that measured curvature"}

# Added to scores/examples.parquet if trials measured curvature.
SCORES_CURVATURE: Columns = {
    **{f"n_curvature_{arm}": Column(pa.int32(), over) for arm, over in _OVER.items()},
    **{
        f"{name}_{arm}{tail}": Column(
            pa.float64(),
            (f"standard error of {name}_{arm} over trials" if tail else f"mean over {over}: {of}"),
            unit,
        )
        for name, of, unit, tails in (
            ("curvature", _TRACE, PER_PIXEL2, ("", "_stderr")),
            ("curvature_squared", _SQUARED, PER_PIXEL4, ("",)),
            ("gradient_norm", _GRADIENT, PER_PIXEL, ("",)),
            ("curvature_paper", _PAPER, "nats^2/pixel^2", ("", "_stderr")),
            ("curvature_over_training", _OVER_TRAINING, PER_PIXEL2, ("", "_stderr")),
        )
        for arm, over in _OVER.items()
        for tail in tails
    },
}

STREAMED_VALUES: Columns = {
    "curvature": TRIAL_CURVATURE["curvature"],
    "curvature_stderr": Column(
        pa.float32(), "standard error of curvature over its probes; 0: exact", PER_PIXEL2
    ),
    "curvature_squared": TRIAL_CURVATURE["curvature_squared"],
    "gradient_norm": TRIAL_CURVATURE["gradient_norm"],
    "loss": Column(pa.float32(), "cross entropy", "nats"),
    "curvature_paper": TRIAL_CURVATURE["curvature_paper"],
}

STREAMED: Columns = {
    "example_id": Column(pa.string(), "the example's id in its shard"),
    "label": _LABEL,
    "content_hash": Column(
        pa.string(), "128 bits of SHA-256 over shape and pixels as the model saw them; null: not ok"
    ),
    "ok": Column(pa.bool_(), "whether it was scored"),
    "error": Column(pa.string(), "why it was not scored; null: it was"),
    "mode": Column(pa.string(), "how the trace was computed; null: not ok"),
    **STREAMED_VALUES,
}

_HASH = "128 bits of SHA-256 over the image's shape and pixels"
_PIECE = Column(pa.string(), "key of the .npy file in the cache that has its pixels")
_ROW = Column(pa.int64(), "its row in that file")

# Of a cache made by `raymem ingest`.
_MARGIN = "log p_y - log of the sum of the other classes' p"

MEMBERSHIP_VALUES: Columns = {
    "n_in": Column(pa.int32(), "trials that trained on the example"),
    "n_out": Column(pa.int32(), "trials that did not"),
    "margin_in": Column(
        pa.float64(), f"mean margin ({_MARGIN}) over in-trials; null: none", "nats"
    ),
    "margin_out": Column(pa.float64(), "the same over out-trials", "nats"),
    "margin_in_stdev": Column(
        pa.float64(), "standard deviation over in-trials; null: fewer than two", "nats"
    ),
    "margin_out_stdev": Column(pa.float64(), "the same over out-trials", "nats"),
    "vulnerability": Column(
        pa.float64(),
        "d' = (margin_in - margin_out) / their pooled standard deviation: positive when models "
        "that trained on the example are more confident of its label, so that membership can be "
        "inferred; null: no in-trial or no out-trial, or margins do not vary",
        "standard deviations",
    ),
    "vulnerability_stderr": Column(
        pa.float64(), "its standard error, if margins are normal", "standard deviations"
    ),
    "attack": Column(
        pa.string(),
        "the membership inference attack with the highest AUC on the other half of the examples "
        "(even and odd positions); null: attack_auc is null",
    ),
    "attack_auc": Column(
        pa.float64(),
        "probability that this attack's score of the example is higher in a target trial that "
        "trained on it than in one that did not, targets from one half of the trials and "
        "references from the other; null: no target trials of both kinds",
        "0..1",
    ),
    "attack_auc_stderr": Column(
        pa.float64(), "its standard error over target trials; null: attack_auc is null, 0 or 1"
    ),
    "n_targets_in": Column(pa.int32(), "target trials that trained on the example"),
    "n_targets_out": Column(pa.int32(), "target trials that did not"),
}

CACHE_INDEX: Columns = {
    "split": _SPLIT,
    "index": Column(pa.int64(), "position of the example in its split, which is sorted by id"),
    "example_id": _ID,
    "label": _LABEL,
    "wnid": Column(pa.string(), "WordNet id of its class, where classes are named so; else null"),
    "content_hash": Column(pa.string(), _HASH),
    "piece": _PIECE,
    "row": _ROW,
}

CACHE_SHARD: Columns = {
    "example_id": Column(pa.string(), "the image's id"),
    "label": Column(pa.int64(), "class number as the shard has it; null: none"),
    "content_hash": Column(pa.string(), f"{_HASH}; null: not ok"),
    "ok": Column(pa.bool_(), "whether it was decoded"),
    "error": Column(pa.string(), "why it was not decoded; null: it was"),
    "piece": Column(pa.string(), f"{_PIECE.meaning}; null: not ok"),
    "row": Column(pa.int64(), f"{_ROW.meaning}; null: not ok"),
}

CACHE_REJECTS: Columns = {
    "split": _SPLIT,
    "example_id": Column(pa.string(), "the image's id"),
    "label": Column(pa.int64(), "class number as the set has it; null: none"),
    "error": Column(pa.string(), "why it was left out"),
}

SUMS: Columns = {
    "n_in": Column(pa.int32(), "in-trials"),
    "n_out": Column(pa.int32(), "out-trials; for test examples, all"),
    "correct_in": Column(pa.int32(), "in-trials that classify it correctly"),
    "correct_out": Column(pa.int32(), "out-trials that classify it correctly"),
    "p_true_in": Column(pa.float64(), "sum of p_true over in-trials"),
    "p_true_out": Column(pa.float64(), "sum of p_true over out-trials"),
    "p_true_squared_in": Column(pa.float64(), "sum of p_true^2 over in-trials"),
    "p_true_squared_out": Column(pa.float64(), "sum of p_true^2 over out-trials"),
    "loss_in": Column(pa.float64(), "sum of the cross entropy over in-trials", "nats"),
    "loss_out": Column(pa.float64(), "sum of the cross entropy over out-trials", "nats"),
    "cumulative_loss": Column(pa.float64(), "sum of cumulative_loss over in-trials", "nats"),
    "learning_epoch": Column(pa.float64(), "sum of learning_epoch where learned", "epochs"),
    "learned": Column(pa.int32(), "in-trials that learned it"),
    "forgetting_count": Column(pa.float64(), "sum of forgetting_count over in-trials"),
}

# Added to the sums if trials measured curvature.
SUMS_CURVATURE: Columns = {
    **{f"n_curvature_{arm}": Column(pa.int32(), over) for arm, over in _OVER.items()},
    **{
        f"{name}_{arm}{tail}": Column(
            pa.float64(), f"sum of {'the squares of ' if tail else ''}{name} over {over}"
        )
        for name, tails in (
            ("curvature", ("", "_squares")),
            ("curvature_squared", ("",)),
            ("gradient_norm", ("",)),
            ("curvature_paper", ("", "_squares")),
            ("curvature_over_training", ("", "_squares")),
        )
        for arm, over in _OVER.items()
        for tail in tails
    },
}


FOLDS: Columns = {
    "epsilon": _EPSILON,
    "split": _SPLIT,
    "index": _INDEX,
    "fold": Column(pa.int32(), "number of the fold; a block of trials is never cut"),
    **SUMS,
}

INFLUENCE: Columns = {
    "train_id": Column(pa.string(), "the training example's id"),
    "test_id": Column(pa.string(), "the test example's id"),
    "train_index": Column(pa.int64(), "position of the training example in its split"),
    "test_index": Column(pa.int64(), "position of the test example in its split"),
    "train_label": Column(pa.int64(), "class number of the training example"),
    "test_label": Column(pa.int64(), "class number of the test example"),
    "epsilon": _EPSILON,
    "influence": Column(
        pa.float64(),
        "accuracy on the test example with the training example in, minus out (Feldman & Zhang "
        "2020, eq. 2): high when training on the one helps models classify the other correctly",
        "-1..1",
    ),
    "influence_stderr": Column(pa.float64(), "its standard error", "-1..1"),
    "memorization": Column(pa.float64(), "memorization of the training example", "-1..1"),
    "strong": Column(
        pa.bool_(),
        "whether influence >= 0.15, memorization >= 0.25, and the p-value is below the level at "
        "which one pair is expected by chance; false: kept as one of the most influential pairs of "
        "its test example",
    ),
}

MEMBERSHIP: Columns = {
    **{name: SCORES_EXAMPLES[name] for name in ("example_id", "index", "label", "epsilon")},
    **MEMBERSHIP_VALUES,
    "memorization": SCORES_EXAMPLES["memorization"],
}

SCORES_TRIALS: Columns = {
    "trial": _TRIAL,
    "epsilon": _EPSILON,
    "status": Column(pa.string(), "done, or the cause of the last failure"),
    "attempt": Column(
        pa.int32(), "number of the attempt that finished, or of the last one that failed, from 1"
    ),
    "seed_init": Column(pa.int64(), "seed of the initial weights"),
    "seed_order": Column(pa.int64(), "seed of the order of examples"),
    "seed_augment": Column(pa.int64(), "seed of crops and flips"),
    "seed_noise": Column(pa.int64(), "seed of the noise of private training"),
    "subset_size": Column(pa.int32(), "training examples in the subset"),
    "accuracy_in": Column(pa.float64(), "accuracy on the subset, in eval mode", "0..1"),
    "accuracy_out": Column(pa.float64(), "accuracy on the other training examples", "0..1"),
    "accuracy_test": Column(pa.float64(), "accuracy on the test examples", "0..1"),
    "loss_in": Column(pa.float64(), "mean cross entropy on the subset", "nats"),
    "loss_out": Column(pa.float64(), "mean cross entropy on the other training examples", "nats"),
    "curvature_in": Column(
        pa.float64(), f"mean over the subset: {_TRACE}; null: not measured", PER_PIXEL2
    ),
    "curvature_out": Column(pa.float64(), "the same over the other training examples", PER_PIXEL2),
    "curvature_mode": Column(pa.string(), "how the trace was computed; null: not measured"),
    "seconds": Column(pa.float64(), "wall time of training and evaluation", "seconds"),
    "curvature_seconds": Column(pa.float64(), "wall time of measuring curvature", "seconds"),
    "device": Column(pa.string(), "device that it was trained on"),
    "host": Column(pa.string(), "machine that it was trained on"),
    "digest": Column(pa.string(), "SHA-256 of the trial's data columns"),
}

TABLES: Mapping[str, Columns] = {
    "examples.parquet": EXAMPLES,
    "trials/**/*.parquet": {**TRIAL, **TRIAL_CURVATURE},
    "curvature/MODEL/SHARD.parquet": STREAMED,
    "scores/examples.parquet": {**SCORES_EXAMPLES, **SCORES_CURVATURE, **SCORES_PRIVACY},
    "scores/trials.parquet": {**SCORES_TRIALS, **TRIALS_PRIVACY, **TRIALS_OVER_TRAINING},
    "scores/folds.parquet": {**FOLDS, **SUMS_CURVATURE},
    "scores/influence.parquet": INFLUENCE,
    "scores/membership.parquet": MEMBERSHIP,
    "CACHE/index.parquet": CACHE_INDEX,
    "CACHE/shards/SPLIT/SHARD.parquet": CACHE_SHARD,
    "CACHE/rejects.parquet": CACHE_REJECTS,
}


def as_markdown() -> str:
    """docs/columns.md."""
    lines = [
        "# Columns",
        "",
        "All tables are Parquet (zstd). The same words are in the files' field metadata. Columns a",
        "study did not ask for are absent; undefined values are null.",
    ]
    for table, columns in TABLES.items():
        lines += ["", f"## {table}", "", "| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [f"| {name} | {c.type} | {c.unit} | {c.meaning} |" for name, c in columns.items()]
    return "\n".join(lines) + "\n"
