# Needs make and Python 3.10 or 3.11 (any Python from 3.10 on, with VGGT set). Everything else is installed here.
#
#   make demo    compare VGGT-mini, stock and accelerated, on the clip that comes with the package
#   make test    linters, type checker, tests
#   make floors  the tests once more, with every dependency at the oldest version that pyproject.toml allows
#                (needs Python 3.11)
#
# Variables:
#   PYTHON   interpreter that makes the environment
#   TORCH    what pip installs as torch, e.g. TORCH="torch==2.4.1"
#   CLIP     folder of images, or video, for `make demo`, instead of the bundled clip
#   VGGT     a git checkout of vggt to run with, instead of the copy in the feature-3dgs wheel

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VGGT ?=

VENV := .venv
BIN := $(VENV)/bin
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Two processes with two threads each collapse on two cores, so every process gets one.
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest

ifneq ($(VGGT),)
export PYTHONPATH := $(abspath $(VGGT))$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# One stamp for each choice of these: another choice sets the environment up again.
STAMP := $(VENV)/.set-up-$(shell printf '%s' '$(PYTHON) $(TORCH) $(VGGT)' | cksum | cut -d' ' -f1)

.PHONY: demo test setup lint floors wheel-test clean

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
ifeq ($(VGGT),)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' || { \
	  echo "feature-3dgs, which brings vggt, has wheels for Python 3.10 and 3.11 only:"; \
	  echo "run make with PYTHON=python3.11, or with VGGT=path/to/a/git/checkout/of/vggt"; exit 1; }
endif
	$(BIN)/python -m pip install --quiet --disable-pip-version-check einops -e ".[compare,colmap,view,video,eval,test,dev]"
ifeq ($(VGGT),)
	@# Its dependencies would bring another torch; vggt itself needs none of them.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps feature-3dgs==1.15.1
endif
	@rm -f $(VENV)/.set-up-*
	@touch $@

demo: setup
	$(BIN)/pacevggt demo $(if $(CLIP),--clip "$(CLIP)")

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check --python $(VENV)

test: lint
	$(PYTEST) -n 2

# Every dependency of the package and of its tests as "name==oldest".
OLDEST = $(shell $(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  extras = p["optional-dependencies"]; print(*(n.replace(">=", "==") for n in \
  [*p["dependencies"], *(n for name in ("compare", "colmap", "view", "video", "eval", "test") for n in extras[name])]))')

floors:
	rm -rf .venv-floors
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install --quiet --disable-pip-version-check einops $(OLDEST)
	.venv-floors/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	.venv-floors/bin/python -m pip install --quiet --disable-pip-version-check --no-deps feature-3dgs==1.15.1
	$(ONE_THREAD) .venv-floors/bin/python -m pytest -n 2

# The tests once more, against the built wheel instead of the checkout.
wheel-test: setup
	rm -rf .wheel-test
	$(BIN)/python -m build --wheel --no-isolation --outdir .wheel-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .wheel-test/site .wheel-test/*.whl
	cd .wheel-test && PYTHONPATH="$(abspath .wheel-test/site)$(if $(PYTHONPATH),:$(PYTHONPATH))" sh -c '\
	  $(abspath $(BIN))/python -c "import pacevggt_patch as p; print(p.__file__); assert \".wheel-test\" in p.__file__" && \
	  $(ONE_THREAD) $(abspath $(BIN))/python -m pytest -n 2 ../tests'

clean:
	rm -rf $(VENV) .venv-floors .wheel-test dist runs
