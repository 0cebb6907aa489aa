# Two commands: `make quickstart` and `make test`. Both can be repeated; the second time nothing is installed.

VENV   := .venv
PYTHON := $(VENV)/bin/python
BASE   ?= python3
# Test files go to this many processes; each holds up to 3 GiB.
WORKERS ?= 2

.PHONY: quickstart test lint unit install clean

quickstart: $(VENV)/installed-run
	$(VENV)/bin/edgealign run quickstart

test: $(VENV)/installed-dev lint
	$(PYTHON) -m pytest -q -m "not gpu" --support check -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 40

# The tier to keep open in another window: no native runtime, no browser, no slow test.
unit: $(VENV)/installed-dev
	$(PYTHON) -m pytest -q -m "not gpu and not slow and not runtime and not browser"

lint: $(VENV)/installed-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

install: $(VENV)/installed-run

# llama-cpp-python compiles here; its default build crashes on some CPUs, so the flags are chosen by looking
# at this one (edgealign/runtimes/llama_flags.py says which and why).
$(VENV)/installed-run: pyproject.toml constraints.txt
	test -x $(PYTHON) || $(BASE) -m venv $(VENV)
	@echo "installing into $(VENV); the first time llama.cpp is compiled, about 5 minutes on 2 cores"
	CMAKE_ARGS="$$($(PYTHON) edgealign/runtimes/llama_flags.py)" $(PYTHON) -m pip install --quiet -c constraints.txt -e ".[gguf,onnx,executorch,merge,app]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-run
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[gguf,onnx,executorch,merge,app,dev]"
	@# The page is tested in the system's browser; without one those tests are skipped, and in CI that is a failure.
	@if [ "$$CI" = true ] && ! command -v chromium-headless-shell >/dev/null; then \
		apt-get install -y -q chromium-headless-shell || { apt-get update -q && apt-get install -y -q chromium-headless-shell; } || true; fi
	touch $@

clean:
	rm -rf runs
