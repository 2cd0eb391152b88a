# Two commands do everything on a fresh machine: `make retrain` and `make test`.

PYTHON ?= python3
PIPELINE ?= flights
VENV := .venv
BIN := $(VENV)/bin
STATE := $(abspath $(or $(ASSAY_HOME),.assay))
STAMP := $(VENV)/.installed
ENGINES := .engines/node_modules/.installed
NPM := $(shell command -v npm 2>/dev/null)
# Processes that share out the tests; 1 runs them in pytest's own.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup engines retrain test kill-test mlflow prefect serve lock clean help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## create .venv with the pinned dependencies

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "assay needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Run make with PYTHON=python3.11 or newer.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(STAMP)

engines: $(ENGINES) ## install the JavaScript engines that tests and ASSAY_SMOKE_ENGINES use
	@echo "ASSAY_NODE_MODULES=$(abspath .engines/node_modules)"

# No script of a package is run: onnxruntime-node's would download libraries for CUDA.
$(ENGINES): deploy/web/package.json
	@$(if $(NPM),,echo "make engines: npm must be installed; install Node.js 18 or newer with npm" >&2; exit 2)
	@mkdir -p .engines
	cp deploy/web/package.json .engines/package.json
	npm install --prefix .engines --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $(ENGINES)

retrain: setup ## retrain PIPELINE (flights); FORCE=1 trains anew, ARGS adds options
	@$(BIN)/assay run $(PIPELINE) $(if $(FORCE),--force) $(ARGS)

test: setup $(if $(NPM),$(ENGINES)) ## everything that must hold: style, types, layers, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses=$(patsubst 1,0,$(WORKERS))

kill-test: setup ## SIGKILL at 30 random moments of a run; it must end with the same bytes
	$(BIN)/python tests/reliability/kill_training.py --kills 30

mlflow: setup ## MLflow's pages on the embedded store, at http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///$(STATE)/mlflow/mlflow.db

prefect: setup ## Prefect's pages on the embedded database, at http://127.0.0.1:4200
	DO_NOT_TRACK=true PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_HOME=$(STATE)/prefect $(BIN)/prefect server start

serve: setup ## Prefect and MLflow servers and a worker with every deployment, until Ctrl-C
	@$(BIN)/honcho --procfile deploy/Procfile --app-root . start

lock: setup ## resolve requirements.lock anew
	$(BIN)/python -m pip install --quiet uv
	printf '# Versions that work together; made by "make lock", which leaves out what PyTorch pins by itself.\n' > requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade --no-emit-index-url --no-annotate --no-header --quiet | grep -vE '^(nvidia-|cuda-|triton)' >> requirements.lock

clean: ## delete the virtual environment; the state in .assay stays
	rm -rf $(VENV)
