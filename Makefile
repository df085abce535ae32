# make install | test | demo | bench | bench-gpu | gallery | lint | doctor | clean
# Each target works alone on a fresh clone with Python >= 3.11 and a C++ compiler.

PYTHON ?= python3
VENV   ?= .venv
SIZE   ?= 2336x1750
WORKERS ?= 2
BIN    := $(VENV)/bin

# The backend looks for DeepSpeed's operators in the same folder when this is unset.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
# ninja comes with the packages
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install test demo bench bench-gpu gallery lint doctor clean

# One operator more where libaio's headers are: installed later, it is built by the next `make install`.
BUILT := $(TORCH_EXTENSIONS_DIR)/built$(if $(wildcard /usr/include/libaio.h),_with_aio).stamp

install: $(VENV)/packages.stamp $(BUILT)

$(VENV)/packages.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python >= 3.11 is needed; make install PYTHON=python3.11")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Built ahead because DeepSpeed would compile inside the first run, and hang for ever on the lock of a killed build.
$(BUILT): $(VENV)/packages.stamp cpikan_hr/training/operators.py
	$(BIN)/python -m cpikan_hr.training.operators
	touch $@

# Two workers of one thread each; processes of DeepSpeed spin while they wait, and have the cores alone.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore=tests/backends
	$(BIN)/python -m pytest tests/backends

# Packages alone: the main job needs none of the operators.
demo: $(VENV)/packages.stamp
	$(BIN)/python -m cpikan_hr.demo --size $(SIZE)

bench: install
	$(BIN)/python benchmarks/jets.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/render.py
	$(BIN)/python benchmarks/orders.py
	$(BIN)/python benchmarks/images.py
	$(BIN)/python benchmarks/heights.py
	$(BIN)/python benchmarks/pdes.py --peer

# Without a GPU it says so and measures nothing.
bench-gpu: install
	@if ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    echo "bench-gpu: there is no GPU here, nothing was measured"; \
	else \
	    $(BIN)/python benchmarks/jets.py --device cuda && \
	    $(BIN)/python benchmarks/render.py --device cuda && \
	    $(BIN)/python benchmarks/images.py --device cuda; \
	fi

gallery: install
	$(BIN)/python docs/gallery.py

lint: install
	$(BIN)/ruff check --select E,F,W,I,B,UP --line-length 120 .

doctor: install
	$(BIN)/python -m cpikan_hr.doctor

clean:
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .hypothesis .ruff_cache
