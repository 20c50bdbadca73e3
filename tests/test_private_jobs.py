"""Private studies from the command line: options, stages, what is refused, and the digits job."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from raymem import (
    CurvatureRule,
    Examples,
    JobSettings,
    Plan,
    Privacy,
    PrivateStudy,
    Recipe,
    Store,
    Study,
    run_job,
)
from raymem.cli import PoolSettings, job_study, main
from raymem.errors import PrivacyError
from raymem.links import find_links, link2, link3
from raymem.models import build_model
from raymem.privacy.sgd import check_layers
from raymem.store import Target, TrialKey, verify
from raymem.training import check_private_recipe, private_recipe

JOBS = Path(__file__).parents[1] / "jobs"


def job(name):
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = Recipe(model="mlp-8", epochs=2, batch_size=100)


def run(capsys, *arguments, recipe=SMALL, **settings):
    """What a job prints, and its exit code."""
    code = 0
    asked = {"data": "digits", "store": "memory://private-jobs", "trials": 2, **settings}
    try:
        run_job(JobSettings(**asked), recipe, arguments=[*arguments, "--engine", "serial"])
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return out.out + out.err, code


@pytest.mark.slow
def test_the_whole_chain(capsys, tmp_path):
    store = str(tmp_path / "store")
    asked = ("--store", store, "--epsilons", "0.5,8,inf", "--accountant", "rdp", "--flip-labels",
             "0.1", "--curvature", "--curvature-trials", "20", "--subset-ratio", "0.5")  # fmt: skip
    out, code = run(capsys, *asked)
    assert code == 0, out
    assert "digits, 120 labels flipped" in out
    assert "trials 6/6" in out
    opened = Store(store)
    assert opened.done() == {TrialKey(e, t) for e in (0.5, 8.0, math.inf) for t in (0, 1)}
    assert [m.epsilon for m in map(opened.mechanism, (0.5, 8.0, math.inf))] == [0.5, 8.0, math.inf]
    # Rows of different epsilons are of the same subsets.
    inside = [opened.trial(TrialKey(e, 1))["in_subset"].to_pylist() for e in (0.5, 8.0, math.inf)]
    assert inside[0] == inside[1] == inside[2]
    assert len({opened.provenance(key)["digest"] for key in opened.done()}) == 6
    links = json.loads((tmp_path / "store" / "links.json").read_text())
    assert [a["epsilon"] for a in links["link_3_memorization_and_epsilon"]] == [0.5, 8.0, "inf"]
    assert {row["mode"] for row in modes(opened)} == {"gauss-newton"}
    assert verify(opened) == []
    shown = CliRunner().invoke(main, ["links", store])
    assert shown.exit_code == 0
    assert "training examples with flipped labels" in shown.output
    as_json = CliRunner().invoke(main, ["links", store, "--json"])
    assert json.loads(as_json.output)["link_3_verdict"].startswith("link 3: the claimed")
    status = CliRunner().invoke(main, ["status", store])
    assert "6 of 6 done" in status.output
    # Again: nothing to train, and the same scores to the byte.
    before = (tmp_path / "store" / "scores" / "examples.parquet").read_bytes()
    out, code = run(capsys, *asked)
    assert code == 0
    assert (tmp_path / "store" / "scores" / "examples.parquet").read_bytes() == before


def modes(store):
    return [store.provenance(key)["curvature"] for key in store.done()]


def test_a_dry_run_says_what_epsilons_cost(capsys):
    out, code = run(capsys, "plan", "--epsilons", "2,inf", "--store", "memory://private-plan")
    assert code == 0
    assert "epsilon 2 (spends 1.9" in out
    assert "epsilon inf: 17 steps, Poisson batches of 100 expected, no noise, no clipping" in out
    assert "a private trial took" in out
    assert "4 trials on this machine" in out


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (
            ["--epsilons", "much"],
            "invalid epsilons 'much'; give numbers such as 0.5,2,8,inf",
            2,
        ),
        (["--epsilons", "0,1"], "must be positive", 1),
        (["--epsilons", "1,1"], "given twice", 1),
        (["--epsilons", "1", "--delta", "0.01"], "publishing a whole example", 1),
        (["--epsilons", "1", "--max-grad-norm", "-1"], "must be a positive number", 1),
        (["--epsilons", "1", "--workers-per-trial", "2"], "2 workers per trial", 1),
    ],
)
def test_what_is_refused(capsys, arguments, says, code):
    out, got = run(capsys, *arguments, "--store", "memory://private-refused")
    assert says in " ".join(out.split())
    assert got == code
    assert "Traceback" not in out


def test_grids_have_names(capsys, monkeypatch):
    studies = []
    monkeypatch.setattr(job_study, "run_stages", lambda study, *others: studies.append(study))
    assert run(capsys, "plan", "--epsilons", "quick")[1] == 0
    assert studies[0].epsilons == (0.5, 2, 8, math.inf)


def test_a_store_tells_private_studies_from_others(capsys, tmp_path):
    store = str(tmp_path / "store")
    assert run(capsys, "train", "--store", store)[1] == 0
    out, code = run(capsys, "train", "--store", store, "--epsilons", "8,inf")
    assert code == 1
    assert "privacy" in out
    assert "another study" in out


def test_batch_norm_is_refused_before_anything_is_trained():
    study = Study(
        examples=tiny(),
        recipe=Recipe(model="tiny-resnet", epochs=1),
        store="memory://private-bn",
        trials=1,
        epsilons=(8.0,),
        privacy=Privacy(accountant="rdp"),
    )
    with pytest.raises(PrivacyError, match="BatchNorm2d"):
        study.train(engine="serial")
    assert Store("memory://private-bn").done() == set()


def test_with_epsilons_a_job_trains_the_group_norm_counterpart_and_says_so(capsys, monkeypatch):
    studies = []
    monkeypatch.setattr(job_study, "run_stages", lambda study, *others: studies.append(study))
    settings = {"data": tiny(), "recipe": Recipe(model="tiny-resnet", epochs=1, batch_size=25)}
    text, code = run(capsys, "train", "--epsilons", "8,inf", **settings)
    assert code == 0, text
    assert text == "the recipe for private training: model tiny-resnet-gn in place of tiny-resnet\n"
    assert studies[0].recipe.model == "tiny-resnet-gn"
    assert studies[0].epsilons == (8.0, math.inf)
    # Another study than without epsilons, whose recipe it says nothing about.
    assert run(capsys, "train", **settings) == ("", 0)
    assert studies[1].recipe == settings["recipe"]
    assert studies[1].privacy is None


@pytest.mark.parametrize("path", sorted(JOBS.glob("*_cifar.py")) + sorted(JOBS.glob("*_digits.py")))
def test_no_job_offers_epsilons_that_its_recipes_cannot_have(path, digits):
    module = runpy.run_path(str(path))
    recipes = [*module["RECIPES"].values()] if "RECIPES" in module else [module["RECIPE"]]
    for recipe in recipes:
        made = private_recipe(recipe, n_classes=10, image_shape=(32, 32, 3))
        check_private_recipe(made)
        check_layers(build_model(made.model, n_classes=10, image_shape=(32, 32, 3)).train())
        assert private_recipe(made, n_classes=10, image_shape=(32, 32, 3)) == made


def tiny():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, 8, 8, 1), np.uint8)
    return Examples(
        x_train=x[:40], y_train=np.arange(40) % 2, x_test=x[40:], y_test=np.arange(10) % 2
    )


@pytest.mark.slow
def test_studies_without_out_trials_have_links_too():
    """As the paper's link 2: all data in all trials, only seeds differ."""
    study = Study(
        examples=tiny(),
        recipe=Recipe(model="mlp-8", epochs=2, batch_size=10),
        store="memory://private-all",
        trials=3,
        subset_ratio=1.0,
        curvature=CurvatureRule(),
        epsilons=(1, 2, 4, 8),
        privacy=Privacy(accountant="rdp"),
    )
    study.train(engine="serial")
    study.score()
    found = find_links(Store(study.store))
    laws = ("theorem", "theorem-constant-loss", "constant", "logarithm", "power", "isotonic")
    assert {fit.law for fit in found.curvature.fits} == set(laws)
    assert [audit.pool for audit in found.memorization] == [None] * 4
    assert not any(audit.refuted for audit in found.memorization)
    json.dumps(found.as_dict(), allow_nan=False)


def test_fixed_sizes_have_their_own_bound():
    study = Study(
        examples=tiny(),
        recipe=Recipe(model="mlp-8", epochs=2, batch_size=10),
        store="memory://private-fixed",
        trials=6,
        kind="fixed-size",
        epsilons=(1.0,),
        privacy=Privacy(accountant="rdp"),
    )
    study.train(engine="serial")
    study.score()
    (audit,) = link3(Store(study.store))
    assert {c.bound.name for c in audit.bounds if c.bound.holds} == {
        "fixed-size", "total-variation",
    }  # fmt: skip
    assert audit.pairs is None
    assert audit.candidates is not None


def test_weights_are_kept_at_every_epsilon(tmp_path):
    study = Study(
        examples=tiny(),
        recipe=Recipe(model="mlp-8", epochs=2, batch_size=10),
        store=tmp_path / "store",
        trials=1,
        keep_models=1,
        epsilons=(8.0, math.inf),
        privacy=Privacy(accountant="rdp"),
    )
    study.train(engine="serial")
    store = Store(tmp_path / "store")
    assert store.kept() == store.done() == {TrialKey(8.0, 0), TrialKey(math.inf, 0)}
    assert set(store.weights(TrialKey(8.0, 0))) == set(store.weights(TrialKey(math.inf, 0)))


def test_a_pool_from_an_earlier_store(capsys, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert run(capsys, "--store", first, "--trials", "20")[1] == 0
    out, code = run(
        capsys, "--store", second, "--epsilons", "8", "--accountant", "rdp", "--pool-from", first,
        "--pool-size", "30", "--subset-ratio", "0.5", "--rest-ratio", "0.7", pool=PoolSettings(),
    )  # fmt: skip
    assert code == 0, out
    plan = Store(second).plan()
    assert (plan.kind, len(plan.pool), plan.rest_ratio) == ("candidate-pool", 30, 0.7)
    shown = CliRunner().invoke(main, ["links", second])
    assert "examples (the candidates)" in shown.output
    sizes = Store(second).scores("trials")["subset_size"].to_pylist()
    # 0.7 of 1,170 and half of 30: 834, standard deviation 16.
    assert all(755 <= size <= 915 for size in sizes)
    out, code = run(capsys, "--store", second, "--pool-from", str(tmp_path / "nowhere"),
                    "--epsilons", "8", pool=PoolSettings())  # fmt: skip
    assert code == 1
    assert "there is no study" in out


def test_the_papers_studies_are_there():
    paper = job("privacy_cifar").RECIPES["paper"]
    assert (paper.model, paper.epochs, paper.batch_size) == ("cifar-resnet18-gn", 20, 128)
    assert (paper.learning_rate, paper.schedule) == (0.001, "steps")
    for name in ("scripts-cifar10", "scripts-cifar100"):
        scripts = job("privacy_cifar").RECIPES[name]
        assert (scripts.optimizer, scripts.batch_size) == ("rmsprop", 256)
        assert (scripts.model, scripts.epochs, scripts.learning_rate) == (paper.model, 20, 0.001)
        assert (scripts.schedule, scripts.milestones) == ("steps", (0.6, 0.8))
        assert len(scripts.mean) == len(scripts.std) == 3
    assert Privacy() == Privacy(delta=1e-5, max_grad_norm=1.0, accountant="prv")
    quick = job("feldman_imagenet").QUICK
    private = private_recipe(quick, n_classes=1000, image_shape=(128, 128, 3))
    assert (private.model, private.precision) == ("resnet50-gn", "float32")


@pytest.mark.slow
def test_ray_trains_what_the_serial_engine_trains(tmp_path):
    found = []
    for engine in ("serial", "ray"):
        study = Study(
            examples=tiny(),
            recipe=Recipe(model="mlp-8", epochs=2, batch_size=10),
            store=tmp_path / engine,
            trials=4,
            epsilons=(8.0, math.inf),
            privacy=Privacy(accountant="rdp"),
        )
        assert study.train(engine=engine).done == 8
        store = Store(tmp_path / engine)
        found.append({key: store.provenance(key)["digest"] for key in store.done()})
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_digits_show_both_effects(tmp_path, digits):
    """Links 2 and 3 on digits with planted label noise: the job's recipe, three epsilons."""
    from raymem import flip_labels

    study = Study(
        examples=flip_labels(digits, 0.1),
        recipe=job("privacy_digits").RECIPE,
        store=tmp_path / "store",
        trials=20,
        subset_ratio=0.5,
        curvature=CurvatureRule(paper=None),
        epsilons=(0.5, 4.0, math.inf),
        privacy=Privacy(),
    )
    study.train()
    study.score()
    store = Store(study.store)
    low, middle, inf = link3(store)
    # Intervals over runs, not point estimates: memorization falls as epsilon falls.
    assert inf.pool.low > 0.4
    assert middle.pool.high < 0.1
    assert low.pool.high < 0.1
    for audit in (low, middle):
        assert not audit.refuted
        assert all(check.violations == 0 for check in audit.bounds)
    assert inf.pairs.low > middle.pairs.high
    # Curvature rises with epsilon, by many standard errors each time.
    seen = link2(store).observed
    assert [o.epsilon for o in seen] == [0.5, 4.0, math.inf]
    for before, after in itertools.pairwise(seen):
        assert after.curvature - before.curvature > 5 * (
            after.curvature_stderr + before.curvature_stderr
        )


def test_plans_have_a_seed_for_noise():
    seeds = [Plan(n=10).seeds(0, epsilon) for epsilon in (0.5, 1.0, math.inf)]
    assert len({s.noise for s in seeds}) == 3
    assert all(s.noise not in (s.init, s.order, s.augment) for s in seeds)


@pytest.mark.slow
def test_a_private_study_beside_the_first_gives_its_links_2_and_3(capsys, tmp_path):
    second = PrivateStudy(
        recipe=Recipe(model="mlp-8", epochs=2, batch_size=100, optimizer="adam"),
        trials=2,
        epsilons=(2, math.inf),
    )
    store = tmp_path / "first"
    text, code = run(capsys, "--store", str(store), private=second)
    assert code == 0
    # Its own report last, after that of the private study.
    assert f"report:  {store}/report.html\nprivate: {store}_private/report.html\n" in text
    other = Store(f"{store}_private")
    assert {key.epsilon for key in other.done()} == {2.0, math.inf}
    assert len(other.done()) == 4
    assert {key.epsilon for key in Store(store).done()} == {math.inf}
    links = Store(store).note("links")
    # The run ends with what it found, in a few lines.
    ending = text.split("What was found\n")[1]
    assert re.findall(r"^([A-Z][a-z ]+?)  ", ending, re.MULTILINE)[0] == "Memorization"
    assert "\nTrust " in ending
    assert len(ending.splitlines()) < 60
    assert links["links_2_and_3_from"] == other.url
    assert [row["epsilon"] for row in links["link_3_memorization_and_epsilon"]] == [2, "inf"]
    page = (store / "report.html").read_text()
    assert f"Measured in {other.url}." in page
    by_hand = {row["example_id"]: row for row in Store(store).scores().to_pylist()}
    for at in links["link_3_memorized_examples"]:
        epsilon = float(at["epsilon"])
        values = [
            (by_hand[row["example_id"]]["memorized"], row["memorization"])
            for row in other.scores().to_pylist()
            if row["epsilon"] == epsilon and row["memorization"] is not None
        ]
        for name, listed in (("memorized", True), ("others", False)):
            mean = np.mean([value for is_listed, value in values if is_listed is listed])
            assert at[name]["value"] == pytest.approx(mean)
    assert Store(store).note("command")["command"].startswith("python ")
    # A trial was trained again, once: not by every run of the same command.
    assert "trained again: the same" in text
    again, code = run(capsys, "--store", str(store), private=second)
    assert code == 0
    assert "trained again" not in again
    # --epsilons is the private study's: the first one is as it was.
    text, code = run(capsys, "train", "--store", str(store), "--epsilons", "4", private=second)
    assert code == 0, text
    assert {key.epsilon for key in other.done()} == {2.0, 4.0, math.inf}
    assert {key.epsilon for key in Store(store).done()} == {math.inf}
    # Without: one study, as for every other job.
    text, code = run(
        capsys, "--store", str(tmp_path / "alone"), "--private-trials", "0", private=second
    )
    assert code == 0
    assert not (tmp_path / "alone_private").exists()


def test_links_of_a_private_study_of_other_examples_are_refused(capsys, tmp_path):
    for name, more in (("a", []), ("b", ["--flip-labels", "0.1", "--epsilons", "2,inf"])):
        assert run(capsys, "--store", str(tmp_path / name), *more)[1] == 0
    report = ["report", str(tmp_path / "a"), "--private", str(tmp_path / "b")]
    refused = CliRunner().invoke(main, report)
    assert refused.exit_code == 1
    assert "other labels" in refused.output


def test_epsilons_are_those_that_folders_can_name(capsys, tmp_path):
    third = 10 / 3
    text, code = run(
        capsys, "train", "--store", str(tmp_path / "s"), "--epsilons", f"{third!r},inf"
    )
    assert code == 0, text
    assert {key.epsilon for key in Store(tmp_path / "s").done()} == {3.33333333333, math.inf}
    text, code = run(capsys, "plan", "--epsilons", "2,2.0000000000001")
    assert code == 1
    assert "epsilon 2 is given twice" in text
    assert Target(trials=1, epsilons=(third,)).wanted() == [TrialKey(3.33333333333, 0)]
