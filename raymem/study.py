"""`Study`: examples, recipe and plan in one store, one method per stage. Composes; no maths."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming import ScorerOptions, StageSummary, measure_kept
from raymem.data import CachedExamples, Examples
from raymem.data.shards import list_shards
from raymem.errors import PlanError
from raymem.experiments import LeaveOneOut, Removal
from raymem.fleet import (
    Progress,
    Repeat,
    Resources,
    TrialOptions,
    repeat_trial,
    run_fleet,
)
from raymem.plan import Kind, Plan
from raymem.privacy import (
    Mechanism,
    Privacy,
    check_epsilons,
    mechanism_for,
)
from raymem.scores import LEAST_FIT, EpsilonSummary, PairRule, Until, interim_result, score
from raymem.settings import Setting
from raymem.store import Part, Store, Target, parse_part
from raymem.training import Recipe, check_private_recipe


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The study."""

    store: Annotated[str | os.PathLike[str], Setting(path=True)]
    """Folder or URL of the study; made if it is not there, checked if it is."""
    trials: Annotated[int, Setting(least=1)]
    """How many models are trained; can be raised later, whole blocks are best."""
    subset_ratio: float = 0.7
    """Share of the training examples that each model sees."""
    kind: Annotated[Kind, Setting(choices=("balanced", "fixed-size"))] = "balanced"
    """How subsets are drawn; balanced: in each block of trials every example is in equally many."""
    part: Annotated[tuple[int, int] | None, Setting(parse=parse_part, form="K/N")] = None
    """Train only part K of N of the trials, such as 1/2, whole blocks, as another cluster does the
    others; see `raymem merge`; None: all trials."""
    seed: Annotated[int, Setting(least=0)] = 0
    """Random seed."""
    curvature: Annotated[CurvatureRule | None, Setting(switch=True, prefix="curvature-")] = None
    """Measure the input loss curvature of every training example; None: not measured."""
    curvature_trials: Annotated[int | None, Setting(least=1)] = None
    """Measure it in the first this many trials only, whole blocks; can be raised for later trials;
    None: in all."""
    curvature_at: Literal["trial", "stage"] = "trial"
    """When it is measured: at the end of each trial, or in a stage after training, under weights
    that trials keep; the numbers are the same."""
    curvature_data: Annotated[str | None, Setting(path=True)] = None
    """Shards that this stage reads the images from; None: the cache."""
    keep_models: Annotated[int, Setting(least=0)] = 0
    """Keep the weights of the first this many trials."""


@dataclass(frozen=True, kw_only=True)
class Study(StudySettings):
    """A fleet of models of one recipe on random subsets of one data set, in one store.

    >>> from raymem.data import load_examples
    >>> study = Study(
    ...     examples=load_examples("digits"),
    ...     recipe=Recipe(model="mlp-32", epochs=3),
    ...     store="memory://doctest-study",
    ...     trials=4,
    ... )
    >>> study.train(engine="serial").done
    4
    >>> [summary.trials for summary in study.score()]
    [4]
    >>> study.scores().num_rows
    1797
    """

    examples: Examples
    """The labelled images."""
    recipe: Recipe
    """How each model is trained."""
    pool: tuple[int, ...] | None = None
    """Candidate-pool plans only, see Plan."""
    rest_ratio: float = 1.0
    """Candidate-pool plans only, see Plan."""
    removal: Removal | None = None
    """Removal plans only, see Plan."""
    leave_one_out: LeaveOneOut | None = None
    """Leave-one-out plans only, see Plan."""
    epsilons: tuple[float, ...] = (math.inf,)
    """Privacy budgets, each of which trains the same subsets; inf is not private. More can be asked
    for later."""
    privacy: Privacy | None = None
    """How trials are made private; None: not at all, unless an epsilon is finite."""
    plan: Plan = field(init=False)
    """The subsets."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise PlanError(f"trials must be 1 or more, got {self.trials}")
        if self.keep_models < 0:
            raise PlanError(f"keep_models must be 0 or more, got {self.keep_models}")
        plan = Plan(
            n=len(self.examples.train_ids),
            subset_ratio=self.subset_ratio,
            kind=self.kind,
            seed=self.seed,
            pool=self.pool,
            rest_ratio=self.rest_ratio,
            removal=self.removal,
            leave_one_out=self.leave_one_out,
        )
        object.__setattr__(self, "plan", plan)
        self._check_experiment()
        self._check_privacy()
        self._check_curvature_trials()
        self._check_part()

    def _check_experiment(self) -> None:
        experiment = self.plan.experiment
        if experiment is None:
            return
        if self.privacy is not None or any(e < math.inf for e in self.epsilons):
            raise PlanError(
                f"a {self.kind} experiment compares trials that are not private, got epsilons "
                f"{', '.join(f'{e:g}' for e in self.epsilons)} or privacy; leave both out"
            )
        if experiment.labels != tuple(self.examples.y_train.tolist()):
            raise PlanError(
                f"the labels of the {self.kind} experiment are not those of {self.examples.name}; "
                "make it from the same examples"
            )

    def _check_part(self) -> None:
        if self.target.wanted():
            return
        blocks = math.ceil(self.trials / self.plan.block)
        raise PlanError(
            f"part {self.target.part} has none of {self.trials:,} trials, which are {blocks} "
            f"blocks of {self.plan.block}; take fewer parts or more trials"
        )

    def _check_privacy(self) -> None:
        # As stores name them: a finer difference is none.
        epsilons = self.target.epsilons
        object.__setattr__(self, "epsilons", epsilons)
        privacy = self.privacy
        if privacy is None and all(math.isinf(epsilon) for epsilon in epsilons):
            check_epsilons(epsilons, n=1, delta=0.0)
            return
        privacy = privacy or Privacy()
        object.__setattr__(self, "privacy", privacy)
        check_epsilons(epsilons, self.plan.subset_size, privacy.delta)
        check_private_recipe(self.recipe)

    def mechanism(self, epsilon: float) -> Mechanism | None:
        """The DP-SGD mechanism of trials at `epsilon`, calibrated by the installed accountant; None
        if the study is not private.

        A store keeps the mechanism of its first trials. Raises PrivacyError if there is none.
        """
        if self.privacy is None:
            return None
        return mechanism_for(
            self.privacy,
            epsilon,
            subset_size=self.plan.subset_size,
            batch_size=self.recipe.batch_size,
            epochs=self.recipe.epochs,
        )

    def mechanisms(self, store: Store | None) -> dict[float, Mechanism]:
        """Of all epsilons: those that the store has, new ones fixed there."""
        found = {}
        for epsilon in self.epsilons:
            fixed = None if store is None or self.privacy is None else store.mechanism(epsilon)
            made = fixed or self.mechanism(epsilon)
            if made is not None:
                found[epsilon] = made if fixed or store is None else store.fix_mechanism(made)
        return found

    @property
    def _measured_trials(self) -> int:
        return self.trials if self.curvature_trials is None else self.curvature_trials

    def _curvature_source(self) -> str | None:
        if self.curvature_data is None and isinstance(self.examples, CachedExamples):
            return self.examples.cache.url
        return self.curvature_data

    def _check_curvature_trials(self) -> None:
        if self.curvature and self.curvature_at == "stage" and self._curvature_source() is None:
            raise PlanError(
                "curvature after training reads shards or a cache, and the images are in memory; "
                "give curvature_data, or measure it in the trials (curvature_at='trial')"
            )
        every = None if self.curvature is None else self.curvature.every_epochs
        if every is not None and self.curvature_at == "stage":
            raise PlanError(
                "curvature over training is measured while a model trains, not after it; take "
                "curvature_at='trial', or leave every_epochs out"
            )
        if every is not None and every >= self.recipe.epochs:
            raise PlanError(
                f"every_epochs is {every}, but the recipe has only "
                f"{self.recipe.epochs}; take a smaller every_epochs"
            )
        limit, block = self.curvature_trials, self.plan.block
        if limit is None:
            return
        if self.curvature is None:
            raise PlanError("curvature_trials needs curvature; give a CurvatureRule")
        if limit < 1 or (limit % block and limit < self.trials and self.kind != "fixed-size"):
            raise PlanError(
                f"curvature_trials must be whole blocks of {block} trials, got {limit}; take "
                f"{max(1, -(-limit // block)) * block}, so that every example has its share of "
                "in and out"
            )

    def as_dict(self) -> dict[str, object]:
        """What makes its trials comparable, JSON-ready: its hash is the study's identity."""
        return {
            "data": {
                "fingerprint": self.examples.fingerprint,
                "image_shape": list(self.examples.image_shape),
                "n_train": len(self.examples.train_ids),
                "n_test": len(self.examples.test_ids),
                **({"planted": list(self.examples.planted)} if self.examples.planted else {}),
                **({"canaries": list(self.examples.canaries)} if self.examples.canaries else {}),
            },
            "plan": self.plan.as_dict(),
            "recipe": self.recipe.as_dict(),
            # Absent where the study has none, so that only what it has is part of its identity.
            **({} if self.curvature is None else {"curvature": self.curvature.as_dict()}),
            **({} if self.privacy is None else {"privacy": self.privacy.as_dict()}),
        }

    def open_store(self) -> Store:
        """The store, made or checked. Raises StudyMismatchError if it is another study's."""
        store = Store(self.store)
        store.open_study(self.as_dict(), self.examples)
        return store

    def train(
        self,
        resources: Resources | None = None,
        **settings: Any,
    ) -> Progress:
        """Train the trials that are not done yet; see `run_fleet`.

        `settings` are fields of `resources`: `train(engine="serial")`.
        """
        resources = dataclasses.replace(resources or Resources(), **settings)
        store = self.open_store()
        store.target = self.target
        return run_fleet(
            self.examples,
            self.plan,
            self.recipe,
            store,
            options=self.trial_options(store),
            resources=resources,
        )

    @property
    def target(self) -> Target:
        """What the store is to have."""
        part = None
        if self.part is not None:
            part = Part(number=self.part[0], of=self.part[1], block=self.plan.block)
        return Target(trials=self.trials, epsilons=self.epsilons, part=part)

    def trial_options(self, store: Store | None = None) -> TrialOptions:
        """What trials do beyond the recipe; epsilons that are new are fixed in `store`."""
        at_stage = self.curvature is not None and self.curvature_at == "stage"
        return TrialOptions(
            curvature=None if at_stage else self.curvature,
            curvature_trials=self.curvature_trials,
            keep_models=max(self.keep_models, self._measured_trials if at_stage else 0),
            mechanisms=self.mechanisms(store),
        )

    def train_until(
        self,
        until: Until,
        resources: Resources | None = None,
        *,
        on_message: Callable[[str], None] = print,
        **settings: Any,
    ) -> Progress:
        """Train whole blocks until the target is reached, `trials` at most; see `Until`.

        The target is checked at the ends of blocks only, at epsilon inf, or the largest there is.
        Each check is passed to `on_message`, and kept in the store for `raymem status`; the other
        arguments are those of `train`.
        """
        if self.part is not None:
            raise PlanError(
                "a stopping rule looks at all trials, and a part has some; give --until or --part"
            )
        block, store = self.plan.block, self.open_store()
        epsilon = max(self.epsilons)
        done = sum(key.epsilon == epsilon for key in store.done())
        trials = min(self.trials, max(2, math.ceil(done / block)) * block)
        interim: list[dict[str, object]] = []
        while True:
            progress = dataclasses.replace(self, trials=trials).train(resources, **settings)
            keys = sorted(k for k in store.done() if k.epsilon == epsilon and k.trial < trials)
            seen = interim_result(store, keys)
            value, forecast = until.value(seen), until.forecast(seen)
            if forecast is not None:  # it stops at the ends of blocks only
                forecast = math.ceil(forecast / block) * block
            interim.append({"trials": trials, "value": value, "forecast": forecast})
            store.write_note(
                "until", {"rule": str(until), "most_trials": self.trials, "interim": interim}
            )
            reached = until.reached(value)
            on_message(
                f"{trials:,} trials: {until.quantity} {value:.3f}, wanted {until.target:g}; "
                + ("reached" if reached else f"forecast: {forecast or '?'} trials")
                + ("; not reached with --trials" if trials >= self.trials and not reached else "")
            )
            if reached or trials >= self.trials or not progress.complete:
                if math.isinf(epsilon) and seen.fit < LEAST_FIT:
                    on_message(
                        f"training accuracy on hard examples is {100 * seen.fit:.0f}%: models do "
                        "not fit, so memorization is underestimated; train them longer, at a "
                        "higher learning rate, or wider"
                    )
                return progress
            trials = until.next_interim(seen, block, self.trials)

    def repeat(self, *, threads: int = 1) -> Repeat:
        """Train one committed trial again and compare; see `repeat_trial`."""
        store = self.open_store()
        return repeat_trial(
            self.examples, self.plan, self.recipe, store, self.trial_options(store), threads=threads
        )

    def seconds_of_a_trial(self) -> float:
        """Of the first committed one. Raises StoreError if none is."""
        store = self.open_store()
        done = store.done()
        return float(store.provenance(min(done))["seconds"]) if done else math.inf

    def measure_curvature(
        self, options: ScorerOptions | None = None, **settings: Any
    ) -> StageSummary | None:
        """Measure curvature of every image under the models that were kept for it.

        None if trials measure it themselves, or nobody does. `settings` are fields of `options`:
        `measure_curvature(models_per_pass=8)`. Raises StoreError if trials are not done, and what
        `measure_kept` raises.
        """
        if self.curvature is None or self.curvature_at == "trial":
            return None
        data = self._curvature_source()
        assert data is not None  # __post_init__ refused it
        store = self.open_store()
        wanted = [key for key in self.target.wanted() if key.trial < self._measured_trials]
        return measure_kept(
            store,
            sorted(wanted, key=lambda key: (self.epsilons.index(key.epsilon), key.trial)),
            list_shards(data, self.examples.classes, n_classes=self.examples.n_classes),
            self.curvature,
            options=options,
            **settings,
        )

    def score(self, rule: PairRule | None = None) -> list[EpsilonSummary]:
        """Score what is committed; `rule` says which influence pairs are kept. See `score`."""
        Store(self.store).study()  # a store that is not there is a wrong path, not a new study
        return score(self.open_store(), rule)

    def scores(self, name: str = "examples") -> Any:
        """scores/NAME.parquet as a pyarrow table: examples, trials, folds or influence."""
        return Store(self.store).scores(name)
