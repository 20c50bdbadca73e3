from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from learners import errs_at_known_odds, numbered_examples, recipe

from raymem import JobSettings, Store, Study, run_job
from raymem.cli import absolute_store, main
from raymem.errors import StoreError
from raymem.store import Target


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "store"
    study = Study(
        examples=numbered_examples(),
        recipe=recipe(errs_at_known_odds),
        store=folder,
        trials=20,
    )
    study.train(engine="serial")
    study.score()
    return folder


def raymem(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_every_command_has_help_with_an_example():
    for name, command in main.commands.items():
        text = raymem(name, "--help")
        assert f"raymem {name}" in text, name
        assert command.help


def test_status_says_what_is_done(store):
    text = raymem("status", store)
    assert "trials: 20 of 20 done" in text
    assert "driver: none" in text
    assert "cost so far" in text
    Store(store).target = Target(trials=40)
    assert "trials: 20 of 40 done" in raymem("status", store)
    Store(store).target = Target(trials=20)


def test_scores_are_sorted_and_chosen(store):
    expected = Store(store).scores().to_pandas()
    train = expected[expected["split"] == "train"]
    rows = raymem("scores", store, "--top", 5).splitlines()
    assert rows[0].split()[:4] == ["example", "label", "memorization", "[95%]"]
    assert len(rows) == 6
    best = train.sort_values("memorization", ascending=False, kind="stable").iloc[0]
    assert rows[1].split()[0] == best["example_id"]
    chosen = raymem("scores", store, "--where", "label == 2 and memorization > 0.5", "--all")
    wanted = train[(train["label"] == 2) & (train["memorization"] > 0.5)]
    assert len(chosen.splitlines()) - 1 == len(wanted) > 0
    low = raymem("scores", store, "--ascending", "--top", 1, "--where", "split = train")
    assert (
        low.splitlines()[1].split()[0]
        == train.sort_values("memorization", kind="stable").iloc[0]["example_id"]
    )


def test_csv_has_all_columns_and_all_digits(store):
    text = raymem("scores", store, "--csv", "--all", "--where", "split == train")
    rows = list(csv.DictReader(io.StringIO(text)))
    expected = Store(store).scores().to_pandas()
    assert list(rows[0]) == list(expected.columns)
    found = {row["example_id"]: float(row["memorization"]) for row in rows}
    train = expected[expected["split"] == "train"]
    assert found == dict(zip(train["example_id"], train["memorization"], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "/nowhere"), "there is no study"),
        (("scores", "/nowhere"), "there is no study in"),
        (("scores", "STORE", "--sort", "beauty"), "there is no column beauty"),
        (("scores", "STORE", "--where", "label ~ 3"), "is no condition"),
        (("scores", "STORE", "--where", "label == three"), "three is no value of label"),
    ],
)
def test_errors_are_one_line_with_cause_and_next_step(store, arguments, message):
    output = raymem(*(store if a == "STORE" else a for a in arguments), code=1)
    assert output.startswith("error: ")
    assert message in output
    assert len(output.strip().splitlines()) == 1


def test_wrong_usage_exits_with_two():
    raymem("scores", code=2)
    raymem("dance", code=2)


def test_verify_exits_with_one_until_repaired(store):
    assert "0 objects damaged" in raymem("verify", store)
    files = Store(store).files
    key = "trials/eps-inf/000002.parquet"
    whole = files.read(key)
    files.replace(key, whole[:-9])
    assert f"damaged: {key}" in raymem("verify", store, code=1)
    assert "moved to damaged/" in raymem("verify", store, "--repair")
    assert "1 missing" in raymem("verify", store)
    files.create(key, whole)


def job(*arguments, code=0):
    settings = JobSettings(data=numbered_examples(), store="runs/x", trials=20)
    with pytest.raises(SystemExit) as done:
        run_job(settings, recipe(errs_at_known_odds), arguments=[*map(str, arguments)])
    assert done.value.code == code


def test_a_job_plans_without_making_anything(tmp_path, capsys):
    job("plan", "--store", tmp_path / "new", "--trials", 30)
    text = capsys.readouterr().out
    for words in (
        "blocks of 20 trials: each drawn example is in 14 of them",
        "30 trials are not whole blocks, 40 would be",
        "standard error of an example's memorization 0.199 at worst",
        "disk:",
        "a trial took",
        "not made yet",
    ):
        assert words in text, words
    assert not (tmp_path / "new").exists()


def test_a_job_runs_all_stages_or_one(tmp_path, capsys):
    job("train", "--store", tmp_path, "--engine", "serial")
    assert "20 trials trained" in capsys.readouterr().out
    assert not Store(tmp_path).files.exists("scores/examples.parquet")
    job("score", "--store", tmp_path)
    text = capsys.readouterr().out
    assert "The ten most memorized" in text
    assert len(re.findall(r"^train-\d+ +\d+ +[\d.]+ \[", text, re.MULTILINE)) == 10
    assert str(tmp_path / "scores" / "examples.parquet") in text
    job("--store", tmp_path, "--engine", "serial", "--trials", 25)
    text = capsys.readouterr().out
    # What was found and where it is; tables only when asked for.
    assert "over 25 models" in " ".join(text.split())
    assert f"report:  {tmp_path / 'report.html'}" in text
    assert "models in/out" not in text
    assert len(text.splitlines()) < 60
    job("--store", tmp_path, "--engine", "serial", "--trials", 25, "--verbose")
    text = capsys.readouterr().out
    assert "25 trials; mean accuracy" in text
    assert "models in/out" in text
    job("plan", "--store", tmp_path, "--trials", 40)
    assert "25 of 40 trials are done" in capsys.readouterr().out


def test_a_job_refuses_in_one_line(tmp_path, capsys):
    job("train", "--store", tmp_path, "--engine", "serial")
    job("--store", tmp_path, "--seed", 7, "--engine", "serial", code=1)
    assert "plan.seed: store has 0, this run has 7" in capsys.readouterr().err
    job("--subset-ratio", "1.5", "--store", tmp_path, code=1)
    assert "subset_ratio must be" in capsys.readouterr().err
    job("--trials", "0", code=2)
    job("imagine", code=2)


def test_relative_stores_are_kept_at_home_and_refused_in_a_submitted_job(monkeypatch):
    assert absolute_store("runs/x") == str(Path.cwd() / "runs" / "x")
    assert absolute_store("s3://bucket/x") == "s3://bucket/x"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert absolute_store("/data/x") == "/data/x"
    with pytest.raises(StoreError, match="relative"):
        absolute_store("runs/x")


def test_the_job_file_of_digits_reads_its_options(monkeypatch, capsys):
    import runpy

    path = Path(__file__).parents[1] / "jobs" / "feldman_digits.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    for option in ("--data", "--store", "--trials", "--subset-ratio", "--seed", "plan"):
        assert option in text


def test_pairs_are_sorted_and_chosen(store):
    table = Store(store).scores("influence").to_pandas()
    assert len(table) > 10
    rows = raymem("pairs", store, "--top", 3).splitlines()
    assert rows[0].split()[:3] == ["training", "example", "label"]
    assert len(rows) == 4
    first = table.sort_values("influence", ascending=False, kind="stable").iloc[0]
    assert rows[1].split()[0] == first["train_id"]
    floor = float(table["influence"].median())
    text = raymem("pairs", store, "--min-influence", floor, "--min-memorization", 0.6, "--all")
    wanted = table[(table["influence"] >= floor) & (table["memorization"] >= 0.6)]
    assert len(text.splitlines()) - 1 == len(wanted) > 0
    strong = raymem("pairs", store, "--strong", "--all").splitlines()[1:]
    assert len(strong) == table["strong"].sum()
    exact = list(csv.DictReader(io.StringIO(raymem("pairs", store, "--csv", "--all"))))
    assert len(exact) == len(table)


def test_the_memorized_list_is_one_option(store):
    table = Store(store).scores().to_pandas()
    rows = raymem("scores", store, "--memorized", "--all").splitlines()[1:]
    assert len(rows) == (table["memorized"] == True).sum() > 0  # noqa: E712


def test_one_example_with_its_relations_in_both_directions(store):
    pair = Store(store).scores("influence").to_pylist()[0]
    text = raymem("example", store, pair["train_id"])
    assert f"{pair['train_id']}: train example {pair['train_index']}, label" in text
    assert re.search(r"rank \d+ of 60 by memorization", text)
    assert "test examples that it makes right" in text
    assert pair["test_id"] in text
    text = raymem("example", store, pair["test_id"])
    assert "training examples that make it right" in text
    assert pair["train_id"] in text
    assert "near duplicates:" in text  # the numbered images differ by their number only
    wrong = raymem("example", store, "train-0000", code=1)
    assert "did you mean train-00000" in wrong


def test_a_fleet_from_elsewhere_is_imported_and_looked_at(tmp_path):
    generator = np.random.default_rng(0)
    masks = generator.random((20, 12)) < 0.5
    np.savez(tmp_path / "fleet.npz", masks=masks, correct=masks, correct_test=masks[:, :3])
    text = raymem("import", "npz", tmp_path / "fleet.npz", tmp_path / "store")
    assert "20 trials" in text
    assert "list of those memorized above 0.25: 12 training examples" in text
    assert "imported" in raymem("status", tmp_path / "store")
    assert "1.000" in raymem("scores", tmp_path / "store", "--top", 1)
    assert "train-00001" in raymem("pairs", tmp_path / "store")
    assert "label none" in raymem("example", tmp_path / "store", "train-00001")
    assert "0 objects damaged" in raymem("verify", tmp_path / "store")
    assert "lacks" in raymem("import", "npz", empty(tmp_path), tmp_path / "other", code=1)


def empty(folder):
    np.savez(folder / "empty.npz", masks=np.zeros((2, 2), bool))
    return folder / "empty.npz"


def test_commands_leave_cleanly(store):
    """With torch loaded before pyarrow, two of five processes aborted as they exited."""
    program = "import sys; sys.argv[0] = 'raymem'; from raymem.cli import main; main()"
    for _ in range(5):
        command = [sys.executable, "-c", program, "scores", str(store), "--top", "1"]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")


def test_wrong_paths_are_one_line(store, tmp_path):
    for command in (["scores"], ["pairs"], ["status"], ["verify"], ["example"]):
        more = ["train-00001"] if command == ["example"] else []
        for path in (tmp_path / "nothing", store / "scores" / "examples.parquet"):
            text = raymem(*command, path, *more, code=1)
            assert "there is no study in" in text
            assert len(text.splitlines()) == 1


def test_a_stray_file_is_no_trial_and_a_torn_target_is_repaired(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    trial = copy / "trials" / "eps-inf" / "000003.parquet"
    trial.rename(trial.with_suffix(".parquet.bak"))
    assert "1 missing" in raymem("verify", copy, code=1)
    assert len(Store(copy).done()) == 19
    (copy / "target.json").write_text('{"trials": ')
    assert "target.json is damaged" in raymem("status", copy, code=1)
    assert "damaged: target.json" in raymem("verify", copy, "--repair", code=1)
    assert (copy / "damaged" / "target.json").exists()
    assert Store(copy).target.trials == 0


def test_conditions_may_quote_the_word_and(store):
    assert (
        raymem("scores", store, "--where", "example_id == 'a and b' and label == 1").count("\n")
        == 1
    )


def test_an_example_is_told_in_words(store):
    row = next(r for r in Store(store).scores().to_pylist() if r["memorization"] is not None)
    text = raymem("example", store, row["example_id"])
    right = [round(row[f"accuracy_{arm}"] * row[f"n_{arm}"]) for arm in ("in", "out")]
    assert (
        f"{right[0]} of {row['n_in']} models that trained on it get it right, {right[1]} of "
        f"{row['n_out']} that did not"
    ) in text
    assert re.search(r"\n  loss_out +[\d.]+  mean cross entropy over out-trials\n", text)
    assert re.search(r"\n  memorization +-?[\d.]+  accuracy_in - accuracy_out\n", text)
