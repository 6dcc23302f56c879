# Each target makes the environment that it needs, and does nothing for it the second time.
#   PYTHON=/path/to/python        another interpreter (3.11 or 3.12)
#   TORCH_INDEX=https://...       a package index for torch alone, which the tests compare with
PY := .venv/bin/python
PROMPT ?= The little red fox

.PHONY: help quickstart test check smoke parity-big pod bench constraints clean core dev

help:   ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

quickstart: core    ## train a small Qwen2 on real text and let it speak; MODEL=path-or-hub-id generates with real weights
ifdef MODEL
	$(PY) -m qwen2_jax generate --model "$(MODEL)" --prompt "$(PROMPT)"
else
	$(PY) -m experiments.quickstart
endif

test: dev    ## install everything and pass all tests
	@tools/make_venv.sh tf4 || echo "Going on without transformers 4; the tests that need it are skipped."
	$(PY) -m pytest

check: dev    ## lint, types, layers and the quick tests, in less than a minute
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -q -m "not slow and not parity"

smoke:    ## the small set of tests on Python 3.12 and a newer JAX
	@tools/make_venv.sh smoke
	.venv-smoke/bin/python -m pytest -m smoke $$(grep -rl --include='test_*.py' 'mark\.smoke' tests)

parity-big: dev    ## one-layer slices of the 72B and the 57B-A14B against transformers (16 GB of memory)
	$(PY) -m tools.parity_big

pod: dev    ## two families on 28 meshes of eight host devices against one device (20 minutes)
	$(PY) -m tools.sameness

bench: dev    ## Qwen2-0.5B at its true shape against transformers on this machine
	$(PY) -m tools.bench_transformers

constraints:    ## resolve the exact versions anew (Python 3.11 and 3.12)
	@"$$(tools/find_python.sh)" tools/constraints.py

clean:    ## remove what the targets above made
	rm -rf .venv .venv-tf4 .venv-smoke .pytest_cache .ruff_cache .hypothesis build dist runs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

core dev:
	@tools/make_venv.sh $@
