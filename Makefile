# Each target sets up its own virtual environment; python3 and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-newest lint train-tiny reproduce ablation clean

# Reconstructs a real clip and turns a prompt into one, with the weights that
# ship with the package.
demo: $(VENV)/run
	$(BIN)/python -m launch.reconstruct --model=tiny \
	  --input=dcvideogen_jax/assets/demo.mp4 --output=out/demo
	$(BIN)/python -m launch.sample --model=tiny --output=out/demo/prompt \
	  --prompt="a large yellow circle moves right over desert"

# Everything but what needs a GPU or minutes: parity with PyTorch included.
test: $(VENV)/parity
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow"

# The same without its torch part, for a newer Python: make test-newest
# PYTHON=python3.13 VENV=.venv-newest
test-newest: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist loadfile \
	  -m "not parity and not gpu and not slow"

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
	rm -rf .venv* out build *.egg-info
