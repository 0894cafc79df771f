# `make demo` and `make test` need Python >= 3.10 with its venv module, and nothing else: the first run sets up .venv.

PYTHON  ?= python3
MINUTES ?= 15
RUN     ?= runs/demo
# Bytecode is written even where the environment says not to: many tests start processes, which would all compile PyTorch.
ALONE   := PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest
PYTEST  := $(ALONE) -n auto --maxprocesses 8 --dist worksteal

.PHONY: help demo test test-slow test-gpu lint docs clean

help:
	@echo 'make demo       pretrain, probe, fine-tune, sample and inpaint on emoji; writes $(RUN)/report.html'
	@echo '                (MINUTES=$(MINUTES) of training in all, RUN=$(RUN) to write to)'
	@echo 'make test       every test but the slow ones and those for a GPU'
	@echo 'make test-slow  the slow ones'
	@echo 'make test-gpu   those for a GPU'
	@echo 'make lint       ruff and mypy'
	@echo 'make docs       the book of docs/ as a site: site/index.html'
	@echo 'make clean      remove .venv and what tools left (runs/ stays)'
	@echo
	@echo 'The first of these sets up .venv (PYTHON=$(PYTHON)). For the small build of PyTorch without CUDA put before it'
	@echo 'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'

demo: .venv/installed
	.venv/bin/umd demo --minutes $(MINUTES) --out $(RUN)

test: .venv/installed
	$(PYTEST) -m 'not slow and not gpu'

test-slow: .venv/installed
	$(ALONE) -m 'slow and not gpu'

# -v: a run that is cut off has told what failed.
test-gpu: .venv/installed
	$(PYTEST) -m gpu -v

lint: .venv/installed umd/kernels umd/train umd/bench
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# A dead link or anchor fails.
docs: .venv/installed
	.venv/bin/python -m sphinx -b html -n -W --keep-going -q docs site
	@echo 'written: site/index.html'

# Links that show mypy and editors what umd/__init__.py does when Python runs; git ignores them.
umd/kernels umd/train umd/bench:
	ln -s ../$(@F) $@

# Made last, so that an installation that was interrupted is taken up again.
.venv/installed: setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	    { echo 'There is no $(PYTHON) here: install Python 3.10 or newer, or name one with PYTHON=.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and umd needs 3.10 or newer: name one with PYTHON=." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo '$(PYTHON) cannot make virtual environments: install its venv module (Debian: apt install python3-venv).' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e '.[demo,eval,dev]'
	@# InceptionV3 for tests, aside: torchmetrics would import it, and with it torchvision, which is of another torch.
	.venv/bin/python -m pip install --no-compile --disable-pip-version-check --no-deps --target .venv/fid torch-fidelity==0.4.0
	@# timm too, which exported networks are tried in.
	.venv/bin/python -m pip install --no-compile --disable-pip-version-check --no-deps --target .venv/timm timm==1.0.31
	@touch $@

clean:
	rm -rf .venv site build dist *.egg-info umd/kernels umd/train umd/bench .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
