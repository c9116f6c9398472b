# Two commands: `make reproduce` trains and draws everything on a CPU; `make test` checks the code (`make smoke`: in a minute).
# What a figure is made of stands in Snakefile. The figures take other settings too, for example
#   make fig1a DATA=cifar100 ARCH=resnet56 RECIPE=short SEEDS="0 1 2" CORES=8
PYTHON ?= python3
PY := .venv/bin/python
CORES ?= 2

FIGURES := fig1a fig1b fig-pays fig-eigenspace fig-denoise fig-glue paper cpu
ROWS := cifar10 cifar100 cifar100-noisy tiny-imagenet resnet56 resnet56-resnet20 resnet56-mobilenetv2 sst-2 cola mrpc rte
# Given after `make` alone: an ARCH or FLAGS of the environment means something else.
DATA :=
DATA_DIR :=
ARCH :=
RECIPE :=
SEEDS :=
FLAGS :=
TASK :=
GLUE_FLAGS :=
SETTINGS = $(if $(DATA),data="$(DATA)") $(if $(DATA_DIR),data_dir="$(DATA_DIR)") $(if $(ARCH),arch="$(ARCH)") \
  $(if $(RECIPE),recipe="$(RECIPE)") $(if $(SEEDS),seeds="$(SEEDS)") $(if $(FLAGS),flags="$(FLAGS)") \
  $(if $(TASK),task="$(TASK)") $(if $(GLUE_FLAGS),glue_flags="$(GLUE_FLAGS)")

# Where this is set, as in many containers, each of a dozen processes compiles torch and scipy anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:  # two Snakemakes side by side would train the same networks; CORES is for that
.PHONY: reproduce $(FIGURES) $(ROWS) benchmark report docs smoke test lint soak clean

# Without Snakemake's lock, which a killed one leaves behind: two processes in one run folder are refused by the scripts.
# A job is run again when its command or common.py changed or what it needs is newer; a finished run is not trained again by that.
reproduce $(FIGURES) $(ROWS): .venv/ready
	.venv/bin/snakemake $@ --cores $(CORES) --nolock --rerun-incomplete --rerun-triggers mtime params \
	  --quiet host rules reason --config $(SETTINGS)
	@$(if $(filter reproduce,$@),$(PY) report.py)

benchmark: .venv/ready
	$(PY) benchmark.py

report: .venv/ready
	$(PY) report.py

# What README and docs/results.md say, from docs/results/*.json; that of the embedded data is what `make reproduce` left.
docs: .venv/ready
	$(PY) report.py --keep docs/results/digits.json --title "embedded digits (30% label noise) and texts" \
	  --runs runs/digits-resnet8-quick-* runs/sentiment-* --results results/digits-resnet8-quick results/glue-sentiment
	$(PY) report.py --docs docs

smoke: .venv/ready
	$(PY) -m pytest -q test_smoke.py

test: .venv/ready
	$(PY) -m pytest -q -n 2 --dist loadfile test_smoke.py tests

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/snakemake --dry-run --quiet all >/dev/null

# The tests of faults and of bad input at full size: twenty kills for each command, and thirty times the random input.
soak: .venv/ready
	DISOBEY_SOAK=1 $(PY) -m pytest -q tests -k "faults or fuzz or compiled"

# --no-compile: compiling every file would take as long as the installation; Python compiles what it imports.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-compile -r requirements.txt
	@touch $@

clean:
	rm -rf .venv __pycache__ .pytest_cache
