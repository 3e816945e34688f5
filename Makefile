# `make demo` and `make test` set everything up on a fresh machine: they need Python 3.11 or newer, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROCESSES ?= 2
EVIDENCE := accuracy reaction fidelity published_laws motion_masks
QUICK := neuroflow-evidence

.PHONY: demo test check docs format bench bench-gpu drift evidence evidence-quick hub siglip-small wheel clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## what is in the shipped clips, when it changed, and what it cost to know
	$(BIN)/neuroflow run neuroflow_hf/assets/things.mp4 --labels "a dog, a bicycle, a cat, nothing" --out neuroflow-run-things
	$(BIN)/neuroflow run --out neuroflow-run

test: $(READY)  ## run the tests (no network but for the set-up, no model hub)
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not gpu and not alone"
	$(BIN)/python -m pytest -q -m alone tests/utils tests/app tests/archive

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

format: $(READY)  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## time modes, presets and other runtimes against dense: an hour on two idle cores
	$(BIN)/python -m eval.vision.benchmark_vision
	$(BIN)/python -m eval.vision.benchmark_streams
	$(BIN)/python -m eval.vision.benchmark_alternatives
	$(BIN)/python -m eval.vision.linear_costs
	$(BIN)/python -m eval.vision.compiled_frames

bench-gpu: $(READY)  ## tests and times on CUDA, in bfloat16; writes the tables of docs/results/speed.md
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python -m eval.vision.benchmark_vision --device cuda --dtypes bfloat16 --repeats 30 \
		--output eval/results/benchmark_vision_cuda.json
	$(BIN)/python -m eval.vision.benchmark_streams --device cuda --dtype bfloat16 --cameras 1,16,64 --repeats 30 \
		--output eval/results/benchmark_streams_cuda.json
	$(BIN)/python -m eval.docs.tables

drift: $(READY)  ## measure what a bypass changes in the text; run again to continue
	$(BIN)/python -m eval.language.token_drift --max-prompts 50 --batch-size 100
	$(BIN)/python -m eval.language.token_drift --max-prompts 50 --batch-size 100 --cascade
	$(BIN)/python -m eval.language.json_drift

evidence: $(READY)  ## labels, delays, fidelity, laws, masks on composed clips: hours on two cores; run again to continue
	for script in $(EVIDENCE); do \
		$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m eval.vision.$$script || exit 1; \
	done

evidence-quick: $(READY)  ## the same with a clip of each motion, into neuroflow-evidence/
	for script in $(EVIDENCE); do \
		$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m eval.vision.$$script --quick --output $(QUICK)/$$script.json \
			|| exit 1; \
	done

hub: $(READY)  ## write complete Hub repositories to dist/hub/
	$(BIN)/python -m recipes.hub

siglip-small: $(READY)  ## train models/neuroflow-siglip-small anew: about an hour on two cores; run again to continue
	$(BIN)/python -m recipes.siglip_small.train
	$(BIN)/python -m eval.vision.zero_shot_small

wheel: $(READY)  ## build the wheel
	$(BIN)/python -m build --wheel

clean:  ## remove what was built
	rm -rf build dist *.egg-info neuroflow-run neuroflow-tuned neuroflow-drift neuroflow-eval $(QUICK)
