"""Parts of a study's trials, trained apart: disjoint, balanced, and the whole when merged."""

from __future__ import annotations

import math

import pytest

from raymem import Examples, JobSettings, Recipe, Store, Study, merge, run_job, score
from raymem.errors import DamagedObjectError, PlanError
from raymem.scores import Until
from raymem.show.terminal_status import describe_store
from raymem.store import Part, Target, TrialKey

N, M = 40, 12


@pytest.fixture
def study(digits, tmp_path):
    few = Examples(
        x_train=digits.x_train[:N], y_train=digits.y_train[:N],
        x_test=digits.x_test[:M], y_test=digits.y_test[:M],
    )  # fmt: skip

    def make(name, **more):
        recipe = Recipe(model="mlp-8", epochs=2)
        settings = {"trials": 50, "recipe": recipe, "store": tmp_path / name, **more}
        return Study(examples=few, **settings)

    return make


@pytest.mark.parametrize(("trials", "of"), [(50, 2), (400, 3), (60, 3), (1000, 7)])
def test_parts_are_whole_blocks_and_together_all(trials, of):
    epsilons = (2.0, math.inf)
    parts = [
        Target(trials=trials, epsilons=epsilons, part=Part(number=k, of=of, block=20)).wanted()
        for k in range(1, of + 1)
    ]
    everything = [key for part in parts for key in part]
    assert sorted(everything) == sorted(Target(trials=trials, epsilons=epsilons).wanted())
    assert len(set(everything)) == len(everything)
    for part in parts:
        blocks = {key.trial // 20 for key in part}
        whole = {t for b in blocks for t in range(20 * b, min(20 * b + 20, trials))}
        assert {key.trial for key in part} == whole
    # More trials move none to another part.
    more = Target(trials=trials + 60, part=Part(number=1, of=of, block=20)).wanted()
    assert {k for k in parts[0] if k.epsilon == math.inf} <= set(more)


def test_two_parts_merge_to_what_one_store_has(study, tmp_path):
    whole, halves = study("whole"), [study(f"half-{k}", part=(k, 2)) for k in (1, 2)]
    for each in (whole, *halves):
        each.train(engine="serial")
    first, second = (Store(half.store) for half in halves)
    assert {k.trial for k in first.done()} == {*range(20), *range(40, 50)}
    assert {k.trial for k in second.done()} == set(range(20, 40))
    assert "20 of 20 done of part 2/2 of 50 trials" in describe_store(second)
    # A part is a study of its own: balanced, and nothing in it is missing.
    halves[1].score()
    train = [r for r in halves[1].scores().to_pylist() if r["split"] == "train"]
    assert {(r["n_in"], r["n_out"]) for r in train} == {(14, 6)}
    assert halves[1].train(engine="serial").committed == 0
    summary = merge(first, second, tmp_path / "merged")
    assert (summary.trials, summary.missing) == (50, 0)
    merged = Store(tmp_path / "merged")
    assert merged.target == Target(trials=50)
    score(merged)
    whole.score()
    assert merged.scores().equals(Store(whole.store).scores())


def test_the_same_part_in_two_places_stays_that_part(study, tmp_path):
    stores = [study(name, part=(2, 2)) for name in ("a", "b")]
    for each in stores:
        each.train(engine="serial")
    summary = merge(*(Store(s.store) for s in stores), tmp_path / "merged")
    assert (summary.in_both, summary.missing) == (20, 0)
    assert Store(tmp_path / "merged").target.part == Part(number=2, of=2, block=20)


def test_what_is_no_part_is_refused(study, tmp_path, capsys):
    with pytest.raises(PlanError, match=r"part 2/2 has none of 20 trials, which are 1 blocks"):
        study("none", trials=20, part=(2, 2))
    with pytest.raises(PlanError, match="K/N with K from 1 to N"):
        study("none", part=(3, 2))
    half = study("half", part=(1, 2))
    with pytest.raises(PlanError, match="give --until or --part"):
        half.train_until(Until.parse("reliability=0.9"), engine="serial")
    assert not (tmp_path / "half").exists()
    for text in ("2", "0/2", "3/2", "1/0", "a/b", "1/2/3"):
        with pytest.raises(SystemExit) as stopped:
            job(tmp_path, "plan", "--part", text)
        assert stopped.value.code == 2
        assert f"invalid part {text!r}; give K/N" in capsys.readouterr().err


def job(store, *arguments):
    settings = JobSettings(data="digits", store=str(store), trials=60)
    run_job(settings, Recipe(model="mlp-8", epochs=1), arguments=arguments)


def test_a_job_trains_and_plans_its_part(tmp_path, capsys):
    for stage in ("train", "plan"):
        with pytest.raises(SystemExit) as stopped:
            job(tmp_path / "store", stage, "--part", "3/3", "--engine", "serial")
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "part 3/3 of 60 trials: 20" in out
    assert "time: 20 trials on this machine" in out
    assert "20 of 20 trials of part 3/3 are done" in out
    done = Store(tmp_path / "store").done()
    assert done == {TrialKey(math.inf, trial) for trial in range(40, 60)}


@pytest.mark.parametrize("part", ['{"number": 3, "of": 2, "block": 20}', '"1/2"', '{"of": 2}'])
def test_a_damaged_part_is_named(study, part):
    made = study("store", part=(1, 2))
    made.open_store().target = made.target
    files = Store(made.store).files
    body = files.read("target.json").decode()
    start = body.index('"part": ') + len('"part": ')
    files.replace("target.json", f"{body[:start]}{part}}}".encode())
    with pytest.raises(DamagedObjectError, match=r"target\.json is damaged"):
        _ = Store(made.store).target
