# Each target sets up its own virtual environment; python3 and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-slow test-wheel test-newest test-pods test-app screenshots test-notebook tour test-devices gpu lint docs train-tiny reproduce ablation clean

# Reconstructs a real clip and turns a prompt into one, with the weights that
# ship with the package.
demo: $(VENV)/run
	$(BIN)/python -m launch.reconstruct --model=tiny \
	  --input=dcvideogen_jax/assets/demo.mp4 --output=out/demo
	$(BIN)/python -m launch.sample --model=tiny --output=out/demo/prompt \
	  --prompt="a large yellow circle moves right over desert"

# Each worker takes one file after the other, the longest first.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ELSEWHERE = gpu or devices or pods or app or nightly

# All that the README promises, parity with PyTorch included.
test: $(VENV)/parity
	$(PYTEST) -m "not slow and not ($(ELSEWHERE))"

# Further cases of it: other meshes, other phases, figures of docs/results.md.
test-slow: $(VENV)/parity
	$(PYTEST) -m "slow and not ($(ELSEWHERE))"

# What pip installs works without the checkout: the wheel, in an environment of
# its own, run in an empty folder that is its home too.
WHEEL = $(abspath .venv-wheel)
test-wheel:
	rm -rf $(WHEEL) build
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip --disable-pip-version-check wheel --quiet \
	  --no-deps --wheel-dir=$(WHEEL) .
	$(WHEEL)/bin/python -m pip --disable-pip-version-check install --quiet \
	  $(WHEEL)/*.whl
	cd $$(mktemp -d) && export HOME=$$PWD PATH=$(WHEEL)/bin:$$PATH && \
	  dcvideogen reconstruct --model=tiny --input=demo --max_frames=8 \
	    --height=64 --output=out/reconstruct && \
	  dcvideogen sample --model=tiny --config.steps=2 --output=out/sample \
	    --prompt="a large yellow circle moves right over desert" && \
	  ls out/*

# The tests without their torch part, for a newer Python: make test-newest
# PYTHON=python3.13 VENV=.venv-newest. Files that take longer run once.
test-newest: $(VENV)/test
	$(PYTEST) --at-most=$(AT_MOST) \
	  -m "not parity and not slow and not ($(ELSEWHERE))"
AT_MOST ?= 8

# The recipes of docs/pods.md, by the parsers of SkyPilot and xpk, which need an
# environment of their own, some 700 MB.
PODS ?= .venv-pods
test-pods: $(PODS)/done
	HOME=$(PODS) SKYPILOT_DISABLE_USAGE_COLLECTION=1 \
	  $(PODS)/bin/python -m pytest --noconftest tests/launch/test_pods.py

$(PODS)/done: requirements-pods.txt
	$(PYTHON) -m venv $(PODS)
	$(PODS)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	touch $@

# The page in a headless Chromium, which apt-get installs where it may.
APP ?= .venv-app
BROWSE = $(APP)/bin/python -m pytest --noconftest -m app tests/app/test_page.py
test-app: $(APP)/done
	command -v chromium || { [ $$(id -u) = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium; } || \
	  { echo "the tests of the page need chromium: apt-get install chromium"; \
	    exit 1; }
	$(BROWSE)

# The pictures of docs/app.md, by the same tests.
screenshots: $(APP)/done
	SCREENSHOTS=docs $(BROWSE)

$(APP)/done: requirements.txt requirements-app.txt requirements-app-test.txt
	$(PYTHON) -m venv $(APP)
	$(APP)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -r requirements-app-test.txt -e '.[app]'
	touch $@

# The notebook, from its first cell to its last; `tour` keeps what they print.
NOTEBOOK ?= .venv-notebook
EXECUTE = $(NOTEBOOK)/bin/jupyter-execute docs/tour.ipynb --timeout=170
test-notebook: $(NOTEBOOK)/done
	$(EXECUTE)

tour: $(NOTEBOOK)/done
	$(EXECUTE) --inplace

$(NOTEBOOK)/done: requirements.txt requirements-notebook.txt
	$(PYTHON) -m venv $(NOTEBOOK)
	$(NOTEBOOK)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -r requirements-notebook.txt -e .
	touch $@

# Compiles for an H100 and for TPUs, neither of which has to be there: training
# steps and attention kernels, with the newest jax too. jax's compilers for
# them need environments of their own, some 15 GB.
CUDA ?= .venv-cuda
TPU ?= .venv-tpu
NEWEST ?= .venv-cuda-newest
NEWEST_PYTHON ?= python3.13
DEVICES = python -m pytest -v -m devices tests/devices
test-devices: $(CUDA)/devices $(TPU)/devices $(NEWEST)/devices
	$(CUDA)/bin/$(DEVICES)/test_cuda.py
	$(TPU)/bin/$(DEVICES)/test_tpu.py
	$(NEWEST)/bin/$(DEVICES)/test_cuda.py

$(CUDA)/devices $(TPU)/devices: python = $(PYTHON)
$(NEWEST)/devices: python = $(NEWEST_PYTHON)
$(CUDA)/devices $(NEWEST)/devices: requirements-cuda.txt requirements-test.txt
$(TPU)/devices: requirements-tpu.txt requirements-test.txt
$(CUDA)/devices $(TPU)/devices $(NEWEST)/devices:
	$(python) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -r $< -r requirements-test.txt
	touch $@

# Times kernels and models on the GPU that jax finds, in at most eight minutes,
# and runs the tests marked `gpu`. Where $(PYTHON) has no jax, it is installed.
# Without a GPU: what would run, and every part at toy size.
NEEDS = jax, flax, optax, einops, jaxtyping, absl
gpu:
	@if $(PYTHON) -c "import $(NEEDS)" 2>/dev/null; \
	then $(PYTHON) -m benchmarks.gpu --output=out/gpu; \
	else $(MAKE) $(VENV)/test && $(BIN)/python -m benchmarks.gpu --output=out/gpu; \
	fi

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/ and of the docstrings, in site/. Sources are read without
# importing them, so its environment has neither jax nor torch.
DOCS ?= .venv-docs
docs: $(DOCS)/done
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/done: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	touch $@

# The tiny family, from clips to image to video: hours, continued when started
# again. What it makes lies outside the checkout.
WORKDIR ?= $(HOME)/.cache/dcvideogen_jax/tiny
reproduce: $(VENV)/run
	$(BIN)/python -m launch.reproduce --workdir=$(WORKDIR)

# Its autoencoder only, which ships, from fetching clips to exporting it.
train-tiny: $(VENV)/run
	$(BIN)/python -m launch.reproduce --workdir=$(WORKDIR) --until=autoencoder

# What AE-Adapt-V is compared with, from the base that `reproduce` made.
ablation: $(VENV)/run
	$(BIN)/python -m launch.reproduce --workdir=$(WORKDIR) --ablation

$(VENV)/run: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/test: $(VENV)/run requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

# torch comes first and alone, so that nothing else chooses its build.
$(VENV)/parity: $(VENV)/test requirements-parity.txt
	$(PIP) torch==2.13.0
	$(PIP) -r requirements-parity.txt
	touch $@

clean:
	rm -rf .venv* out build site *.egg-info
