# `make serve` and `make test` are all that a fresh machine needs; they set up what they use.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A stamp for each set of packages, so that serving never waits for what only the tests need.
$(VENV)/runtime: requirements.lock pyproject.toml | $(VENV)/created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(VENV)/dev: requirements-dev.lock pyproject.toml | $(VENV)/created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@ $(VENV)/runtime

# What the tests of monitoring and of poolers run, from Debian's packages where the machine has not got it: unpacked,
# because installing would start daemons. Without apt, or where it fails, those tests say that they were skipped.
$(VENV)/prometheus: PROGRAMS := prometheus promtool prometheus-alertmanager amtool prometheus-postgres-exporter
$(VENV)/prometheus: PACKAGES := prometheus prometheus-alertmanager prometheus-postgres-exporter
$(VENV)/pgbouncer: PROGRAMS := pgbouncer
$(VENV)/pgbouncer: PACKAGES := pgbouncer libc-ares2

$(VENV)/prometheus $(VENV)/pgbouncer: | $(VENV)/created
	@rm -rf $@.new && mkdir -p $@.new
	@missing=; for program in $(PROGRAMS); do command -v $$program >/dev/null || missing=1; done; \
	if [ -z "$$missing" ] || { cd $@.new && \
	    { apt-get download $(PACKAGES) || { apt-get update && apt-get download $(PACKAGES); }; } && \
	    for package in *.deb; do dpkg --extract $$package . || exit 1; done && rm -- *.deb; } >$(abspath $@).log 2>&1; \
	then mv $(abspath $@).new $(abspath $@); \
	else echo "$(notdir $@) cannot be had from apt here, see $@.log: its tests are skipped."; fi

serve: $(VENV)/runtime  ## Run the service (PORT=8000) on the embedded database, or on QUOTES_DATABASE_URL
	$(BIN)/python -m app serve --port $(PORT)

demo: $(VENV)/runtime  ## Feed a believable market into the service that runs on PORT
	$(BIN)/python -m app demo --url http://127.0.0.1:$(PORT)

test: $(VENV)/dev $(VENV)/prometheus $(VENV)/pgbouncer  ## Run all tests, on every lane that this machine has
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(TESTARGS)

chaos: $(VENV)/dev  ## Kill, freeze and repeat under load, and compare what was acknowledged with what is stored (long)
	$(BIN)/python -m tests.chaos $(CHAOSARGS)

hostile: $(VENV)/dev  ## Attack the service with all that a client can send, and measure what others notice (long)
	$(BIN)/python -m tests.hostile $(HOSTILEARGS)

matrix: $(VENV)/dev $(VENV)/pgbouncer  ## Try settings of servers, databases and roles that others make (MATRIXARGS="--database-url …")
	$(BIN)/python -m tests.matrix $(MATRIXARGS)

test-long: $(VENV)/dev  ## Run the tests that `make test` leaves out because they take long (minutes)
	TEST_LONG=1 $(BIN)/python -m pytest -m long $(TESTARGS)

trades: $(VENV)/dev  ## Test a million trades, many in one millisecond, against polars on every lane (minutes)
	TEST_TRADES=1000000 $(BIN)/python -m pytest tests/test_trades.py $(TESTARGS)

oracle: $(VENV)/dev  ## Test the bars of every time zone around each change of its clocks (minutes)
	ORACLE=1 $(BIN)/python -m pytest --numprocesses 2 tests/test_days.py $(TESTARGS)

check: $(VENV)/dev  ## Lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev  ## Measure against psql and bare asyncpg, side by side in one run
	$(BIN)/python -m benchmarks.first

bench-ingest: $(VENV)/dev  ## Measure ingest beside its rivals; BENCHARGS="sustained --database-url …" for a part
	$(BIN)/python -m benchmarks.ingest $(BENCHARGS)

bench-storage: $(VENV)/dev  ## Measure the columnstore's ratio, on DATABASE_URL=… or the WebAssembly TimescaleDB
	$(BIN)/python -m benchmarks.storage $(if $(DATABASE_URL),--database-url $(DATABASE_URL),--wasm) $(BENCHARGS)

dashboards: $(VENV)/dev  ## Write Grafana's dashboards anew from grafana/build.py
	$(BIN)/python -m grafana.build

monitoring:  ## Pack rules and dashboards for another Prometheus and Grafana
	mkdir -p dist
	tar --create --gzip --file dist/opa-quotes-monitoring.tar.gz \
	    prometheus/rules prometheus/central grafana/dashboards docs/runbooks.md
	@echo dist/opa-quotes-monitoring.tar.gz

lock: | $(VENV)/created  ## Refresh both lock files
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --no-strip-extras --upgrade --generate-hashes --no-header pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --no-strip-extras --generate-hashes --no-header --all-extras -c requirements.lock pyproject.toml -o requirements-dev.lock

dev-up:  ## Start TimescaleDB and the service in containers
	docker compose up --build --detach --wait

dev-down:  ## Stop them; the data stay
	docker compose down

test-up:  ## Start a throw-away TimescaleDB for TEST_DATABASE_URL
	docker compose -f docker-compose.test.yml up --detach --wait

clean:  ## Remove what was built and installed here; the data of `make serve` stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* coverage.xml htmlcov dist tests/pglite/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help serve demo test test-long chaos hostile matrix trades oracle check bench bench-ingest bench-storage dashboards monitoring lock dev-up dev-down test-up clean
