# make demo, make test, make test-slow, make lint: each first makes the environment they share, unless it is there and
# unchanged. make test leaves out the tests that are marked slow; make test-slow runs those alone. make docs builds the
# documentation site into site/, in an environment of its own.
#
#   VENV=folder     where that environment lives (.venv)
#   PYTHON=python   use this interpreter's environment as it is, and install nothing: for a machine that has its own
#                   torch, for example one for its GPU
#   WORKERS=n       test processes (2)
#   THREADS=n       threads of each test process (1)
#   TRANSFORMERS=x  with this release of Transformers, such as 5.17.0, in an environment of its own (.venv-x), which
#                   takes everything else from the shared one
#   ARGS='...'      more arguments for pytest or the demo, for example ARGS='tests/test_routing.py -x'

VENV ?= .venv
DOCS_VENV ?= .venv-docs
WORKERS ?= 2
THREADS ?= 1
ARGS ?=

ifdef PYTHON
READY :=
else ifdef TRANSFORMERS
PYTHON := $(VENV)-$(TRANSFORMERS)/bin/python
READY := $(VENV)-$(TRANSFORMERS)/ready
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif

# one thread for each test process, unless THREADS says more: small tensors gain nothing from it, and processes would
# fight over the cores
TEST_THREADS = OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false
# what Python compiles is kept, whatever the environment says: tests start many processes. A test that takes ten minutes
# hangs: the log says where
PYTEST = $(TEST_THREADS) PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal \
	-o faulthandler_timeout=600

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs environment clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

# Threads that wait do not spin: beside other work the demo is done in half the time, alone in the same.
demo: $(READY)
	@OMP_WAIT_POLICY=PASSIVE PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) examples/demo.py $(ARGS)

test: $(READY)
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(READY)
	@$(PYTEST) -m slow $(ARGS)

lint: $(READY)
	@status=0; \
	$(PYTHON) -m ruff check --quiet . || status=1; \
	$(PYTHON) -m ruff format --quiet --check . || status=1; \
	$(PYTHON) -m mypy --no-error-summary || status=1; \
	[ $$status = 0 ] && echo "lint: style, format and types are clean" || exit 1

format: $(READY)
	@$(PYTHON) -m ruff check --quiet --fix .
	@$(PYTHON) -m ruff format --quiet .

docs: $(DOCS_VENV)/ready
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "docs: site/index.html; for its search: python3 -m http.server --directory site"

environment: $(READY)
	@:

$(DOCS_VENV)/ready: docs/requirements.txt
	@echo "docs: installing into $(DOCS_VENV)"
	@test -x $(DOCS_VENV)/bin/python || python3 -m venv $(DOCS_VENV)
	@# without what the packages ask for: the list is whole, and nothing large comes in by the way
	@$(DOCS_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps -r docs/requirements.txt
	@touch $@

# the version is read from __init__.py, which changes far more often than what is installed: it is no prerequisite
$(VENV)/ready: constraints.txt pyproject.toml setup.py
	@echo "environment: installing into $(VENV) (some minutes the first time)"
	@test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	@# -qq: pip's errors only. Modules are compiled when they are imported, which most never are. What builds the package
	@# comes first, pinned too, so that no build environment is fetched
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt setuptools
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt \
		--no-build-isolation -e ".[dev]"
	@touch $@
	@echo "environment: ready"

# a copy of everything would take 3 GB more. The line in shared.pth makes the packages of the shared environment visible
# behind this one's own; a release may want another release of its Hub's client, which then comes here too
$(VENV)-%/ready: $(VENV)/ready
	@echo "environment: Transformers $* into $(VENV)-$*"
	@$(VENV)/bin/python -m venv --without-pip $(VENV)-$*
	@$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$($(VENV)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@$(VENV)/bin/python -m pip --python $(VENV)-$*/bin/python install -qq --disable-pip-version-check --no-compile \
		transformers==$*
	@touch $@

clean:
	@rm -rf $(VENV) $(VENV)-* $(DOCS_VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .demo
