# The developer's loop. CI runs `make test`, verbatim.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-latest check bench soak gpu-check docs figures clean

demo: .venv/installed
	$(BIN)/python jobs/feldman_digits.py

# Tests that only count are run in two processes, in the order of their files: the doctests, which are
# short, even out the end. Those that wait for others are run by themselves.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not alone'
	$(BIN)/python -m pytest -m 'alone and not slow'

test-all: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/python -m pytest -m alone

# What depends on Ray's and opacus' internals, with the newest versions that pyproject.toml admits.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	.venv-latest/bin/python -m pip list --disable-pip-version-check | grep -iE '^(ray|opacus|torch) '
	.venv-latest/bin/python -m pytest tests/test_upgrades.py tests/test_placement.py \
		tests/test_fleet.py tests/test_shards.py tests/test_privacy.py tests/test_per_example.py

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

# Half an hour of a study through a stream of faults, and a quarter more to check what came of it.
soak: .venv/installed-dev
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),0)

# Is training on this machine's GPU right, and how fast is it? Six minutes at most.
gpu-check: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu $(if $(DATA),--data $(DATA))

# The documentation as a website in site/, which opens from disk; fails on a broken link.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Remakes the pages and figures that come from code: from a fleet that is trained here, from the
# demo's store, and from jobs/feldman_mnist.py --data fashion-mnist --store runs/fashion_mnist --trials 240.
figures: .venv/installed-dev
	$(BIN)/python -c "from raymem.store.columns import as_markdown as m; print(m(), end='')" > docs/columns.md
	$(BIN)/python docs/make_figures.py
	$(BIN)/python docs/make_picture.py runs/feldman_digits docs/most_memorized.png
	$(BIN)/python docs/make_pairs_picture.py runs/fashion_mnist fashion-mnist docs/strong_pairs.png

# constraints.txt is the set of versions that was tested; `pip install .` works without it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv .venv-latest build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
