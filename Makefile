# make demo   installs into .venv and runs the main job
# make test   the same, then lint, types on the installed wheel, and all tests
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The tests use small tensors: two threads fighting over them cost more than they bring.
export OMP_NUM_THREADS ?= 2

.PHONY: install demo test lint types unit doctest examples native-libraries clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps rxnmapper==0.4.3
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install lint types unit doctest examples

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python docs/make_passes.py --check

# mypy reads the package as a user gets it: from the wheel, where the links are real folders.
types: install
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel/site build/wheel/dlqc-*.whl
	cd build/wheel/site && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p dlqc

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

doctest: install
	$(BIN)/python -m pytest -q --doctest-modules dlqc/passes dlqc/contract.py dlqc/recipe.py dlqc/errors.py dlqc/formats

examples: install
	$(BIN)/python examples/custom_pass.py

# For users without a compiler: a wheel that is built afterwards brings them along, and is for this platform alone.
native-libraries: install
	$(BIN)/python -m dlqc.kernels.cpu.prebuild

clean:
	rm -rf $(VENV) build dist dlqc/prebuilt *.egg-info
