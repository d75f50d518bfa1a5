# The two that a newcomer needs: `make rehearsal` and `make test`. `make help` lists the rest.
STACK ?= prod
PYTHON := .venv/bin/python
REHEARSAL := $(PYTHON) -m rehearsal

# Where it is set, as in many container images, every process compiles every module anew: the
# SDKs of Pulumi's providers alone take longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help rehearsal contract test fast lint preview status verify down bootstrap

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.ready: pyproject.toml uv.lock tools/environment
	@tools/environment

rehearsal: .venv/.ready ## bring STACK (prod) up in a sealed network on this machine and run the quick checks
	$(REHEARSAL) up --stack $(STACK)
	$(REHEARSAL) verify --quick

contract: .venv/.ready ## every check of the mail contract, the disruptive ones too
	$(REHEARSAL) up --stack $(STACK)
	$(REHEARSAL) verify --all

# Most tests wait most of the time, so there are more of them than cores. Those of pairsync have
# seconds to keep, and those of the platform want the machine for themselves.
test: fast ## everything that CI runs
	$(PYTHON) -m pytest -n 4 --dist loadfile tests/render tests/agent tests/engine tests/rehearsal
	$(PYTHON) -m pytest -n 3 --dist loadfile tests/pairsync
	$(PYTHON) -m pytest tests/platform

fast: lint ## the tests that need neither root nor an engine
	$(PYTHON) -m pytest -n auto --dist worksteal tests/unit tests/graph

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

preview: .venv/.ready ## what would change in the rehearsal, file by file, line by line
	$(REHEARSAL) preview

status: .venv/.ready ## what of the rehearsal runs
	$(REHEARSAL) status

verify: .venv/.ready ## the checks that suit a live platform; PROBE=FILE holds the probe's password
	$(PYTHON) -m verify --stack $(STACK) --live $(if $(PROBE),--probe-password-file $(PROBE))

bootstrap: ## how to make an existing machine ready for the platform
	@sh agent/bootstrap.sh --help

down: .venv/.ready ## stop the rehearsal and remove everything but the cache
	$(REHEARSAL) down
