# `make` lists the targets. Each but gpu makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize lint format bench scaling sweep readme sass gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --config-settings editable_mode=compat
	touch $@

demo: $(VENV)/installed  ## train the demo: a table, and a picture in out/
	$(BIN)/python python/demos/vit_rotations.py

test: $(VENV)/installed  ## all tests and docstring examples; threads that wait leave their core to the other worker
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2

SANITIZED := build/sanitized
sanitize: $(VENV)/installed  ## the native engine under AddressSanitizer and UBSan
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r hyperkernels $(SANITIZED)/ && rm -f $(SANITIZED)/hyperkernels/*.so
	HYPERKERNELS_CXXFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	  $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive PYTHONPATH=$(SANITIZED) \
	  $(BIN)/pytest -q -n 2 tests/test_native_cpu.py tests/test_at_once.py tests/test_moments.py -m "not slow" \
	  -k "instruction_set or drawn or threads or activations or share or nothing or second_call"

lint: $(VENV)/installed  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

RATIOS := tests/speed/ratios.py
bench: bench-conv bench-algebra bench-model  ## measure on this machine's CPU: cpu, conv, algebra, model .json in benchmarks/results
	$(BIN)/python -m pytest $(RATIOS) --benchmark-only -k "not conv and not algebra and not model" \
	  --benchmark-json benchmarks/results/cpu.json
	$(BIN)/python benchmarks/report.py benchmarks/results/cpu.json

bench-%: $(VENV)/installed
	$(BIN)/python -m pytest $(RATIOS) --benchmark-only -k $* --benchmark-json benchmarks/results/$*.json
	-$(BIN)/python benchmarks/report.py benchmarks/results/$*.json

scaling: $(VENV)/installed  ## time and memory from 1e5 to 1e10 generated weights: benchmarks/results/scaling.json
	$(BIN)/python benchmarks/scaling.py

sweep: $(VENV)/installed  ## measure every order over 240 shapes beside the planner's pick: benchmarks/results/sweep.json
	$(BIN)/python benchmarks/sweep.py

readme: $(VENV)/installed  ## write the saved results into the README's tables
	for name in cpu conv model; do \
	  $(BIN)/python benchmarks/report.py benchmarks/results/$$name.json --readme README.md; done

sass: $(VENV)/installed  ## the Triton kernels compiled for four chips: registers, spills, rooflines; no GPU
	for chip in sm_80 sm_90 sm_100 gfx942; do echo "$$chip"; $(BIN)/python benchmarks/compiled.py --chip $$chip || exit 1; done
	ALL_CHIPS=1 $(BIN)/python -m pytest -q -n 2 tests/test_compiled.py

gpu:  ## on a CUDA device, with the machine's own python3 and torch: tests, then benchmarks
	@$(PYTHON) -c "import torch" 2>/dev/null || { echo "make gpu: $(PYTHON) has no torch; set PYTHON=..." >&2; exit 2; }
	@PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --output $${OUT:-benchmarks/results}

clean:  ## remove what was made
	rm -rf $(VENV) build dist out *.egg-info
