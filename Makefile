# Two commands: `make reproduce` trains and draws everything on a CPU; `make test` checks the code (`make smoke`: in a minute).
# The figures take other settings too, for example
#   make fig1a DATA=cifar100 ARCH=resnet56 RECIPE=short SEEDS="0 1 2"
PYTHON ?= python3
PY := .venv/bin/python

DATA ?= digits
ARCH ?= resnet8
RECIPE ?= quick
DATA_DIR ?= data
SEEDS ?= 0 1 2 3 4
FLAGS ?=
# Processes that share the seeds: 1 for a GPU that one run fills.
JOBS ?= 2
# Moments at which all runs keep their state, for the figures that go on from there: where the loss is switched, where a
# teacher is stopped (one of the four of when_it_pays.py, for time), and for the gradients.
SWITCH_AT ?= 0 0.5 0.9 1
STOP_AT := 0.1
KEPT := --snapshot-at 0.05 0.25 0.5 $(STOP_AT) $(filter-out 0 1,$(SWITCH_AT))
NAME ?= $(subst :,-,$(subst /,-,$(DATA)))-$(ARCH)-$(RECIPE)
COMMON := --data "$(DATA)" --data-dir "$(DATA_DIR)" --arch $(ARCH) --recipe $(RECIPE) --seeds $(SEEDS) --jobs $(JOBS) $(KEPT) $(FLAGS)
RUNS = $(foreach seed,$(SEEDS),"runs/$(NAME)-$(1)-s$(seed)")

IMAGES_CPU := cifar100-cpu cifar100-noisy-cpu cifar10-cpu tiny-imagenet-cpu

# Digits gain nothing from more threads, and one thread rounds alike on machines of any size.
ifeq ($(DATA),digits)
export OMP_NUM_THREADS ?= 1
endif

# Where this is set, as in many containers, each of a dozen processes compiles torch and scipy anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: reproduce test smoke lint soak fig1a fig1a-drawn fig1b fig-pays variants fig-eigenspace fig-denoise fig-glue $(IMAGES_CPU) cross-cpu sst-2-cpu paper benchmark gpu-check report docs clean clean-tables

# Two targets at a time, a process each. Those that share runs wait for fig1b, which trains them.
reproduce: .venv/ready
	@$(MAKE) --no-print-directory -j2 JOBS=1 fig-pays fig-denoise fig1a-drawn fig-eigenspace fig-glue
	@$(PY) report.py

define DRAW_FIG1A
$(PY) analyze_deviation.py --teacher $(call RUNS,teacher) --student $(call RUNS,kd) --control $(call RUNS,onehot) \
  --title "$(NAME), $(words $(SEEDS)) seed(s)" --out "results/$(NAME)/fig1a"
endef

fig1a: .venv/ready
	$(PY) train_teacher.py $(COMMON) --quiet --out "runs/$(NAME)-teacher-s{seed}"
	$(PY) train_student.py $(COMMON) --quiet --teacher "runs/$(NAME)-teacher-s{seed}" --out "runs/$(NAME)-kd-s{seed}"
	$(PY) train_student.py $(COMMON) --quiet --kd-weight 0 --ce-weight 1 --out "runs/$(NAME)-onehot-s{seed}"
	$(DRAW_FIG1A)

# Its runs are those of fig1b too.
fig1a-drawn: fig1b
	$(DRAW_FIG1A)

# Before the others in `reproduce`: its runs are theirs too. Fewer moments than `python switch_distill.py` takes, for time.
fig1b: .venv/ready
	$(PY) switch_distill.py $(COMMON) --quiet --switch-at $(SWITCH_AT) --out "runs/$(NAME)" --results "results/$(NAME)/fig1b"

# When does it pay to disobey? Students of teachers that are stopped on the way.
fig-pays: fig1b
	$(PY) when_it_pays.py $(COMMON) --quiet --stop-at $(STOP_AT) 1 --out "runs/$(NAME)" --results "results/$(NAME)/pays"

# The same for whole teachers in other settings of digits: how far they fit decides what is seen. 20 minutes.
variants: .venv/ready
	for setting in "0.3 50 1 0" "0.3 100 1 0" "0.3 150 1 0" "0.3 150 2 0" "0.1 150 1 0" "0 200 1 200"; do set -- $$setting; \
	  name="noise$$1-epochs$$2-width$$3-subset$$4"; \
	  $(PY) when_it_pays.py --label-noise $$1 --epochs $$2 --width $$3 --subset $$4 --stop-at 1 --seeds $(SEEDS) --jobs $(JOBS) --quiet \
	    --out runs/variants/$$name --results results/variants/$$name || exit $$?; done
	@for table in results/variants/*/pays.md; do echo "$$table"; cat $$table; done

fig-eigenspace: .venv/ready
	$(PY) eigenspace.py --data "$(DATA)" --data-dir "$(DATA_DIR)" --seeds $(SEEDS) --jobs $(JOBS) $(FLAGS) --out "results/$(NAME)/eigenspace"

# A third of the points, for time: `python denoise_gradients.py` takes all.
fig-denoise: fig1b
	$(PY) denoise_gradients.py $(COMMON) --points 512 --out "runs/$(NAME)" --results "results/$(NAME)/denoise"

# Less than `python glue_distill.py` trains, for time: without the smaller student and the reverse switch, and a quarter of
# the pretraining, after which the teacher fits as much.
TASK ?= sentiment
GLUE_SEEDS ?= 0 1 2
GLUE_FLAGS ?= --student tiny --mode onehot kd onehot2kd --mlm-epochs 2

fig-glue: .venv/ready
	$(PY) glue_distill.py --task "$(TASK)" --seeds $(GLUE_SEEDS) --jobs $(JOBS) --quiet $(GLUE_FLAGS)

# Figures 1a and 1b of 10,000 real images (or a RoBERTa from scratch) on two CPU cores, hours each: paper.py --recipe cpu.
$(IMAGES_CPU): ONLY = image/$(@:-cpu=)/resnet20
cross-cpu: ONLY = image/cifar100/resnet56
sst-2-cpu: ONLY = language/sst-2/
$(IMAGES_CPU) cross-cpu sst-2-cpu: .venv/ready
	env -u OMP_NUM_THREADS $(PY) paper.py --recipe cpu --only $(ONLY) --data-dir "$(DATA_DIR)"

# The paper's whole grid, as it stands at the top of paper.py. `make paper PAPER_FLAGS=--dry-run` says what it would take here.
# It needs all threads, and so not the setting for digits above.
PAPER_FLAGS ?=

paper: .venv/ready
	$(if $(filter file,$(origin OMP_NUM_THREADS)),env -u OMP_NUM_THREADS )$(PY) paper.py --data-dir "$(DATA_DIR)" $(PAPER_FLAGS)

benchmark: .venv/ready
	$(PY) benchmark.py

# For an issue, where CUDA is: its tests, and speed of ResNet-56 at batch 512 and 1024, as one JSON.
gpu-check: .venv/ready
	$(PY) benchmark.py --gpu-check

report: .venv/ready
	$(PY) report.py

# What README and docs/results.md say, from docs/results/*.json; those of digits are what is in runs/ and results/ now.
docs: .venv/ready
	$(PY) report.py --keep docs/results/digits.json --title "digits, 30% label noise"
	$(PY) report.py --docs docs

smoke: .venv/ready
	$(PY) -m pytest -q test_smoke.py

test: .venv/ready
	$(PY) -m pytest -q -n 2 --dist loadfile test_smoke.py tests

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The tests of faults and of bad input at full size: twenty kills for each command, and thirty times the random input.
soak: .venv/ready
	DISOBEY_SOAK=1 $(PY) -m pytest -q tests -k "faults or fuzz"

# Without compiling: what is imported is compiled then, and all of it takes as long as the installation itself.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-compile -r requirements.txt
	@touch $@

# Teacher logits that runs share, made again when they are needed.
clean-tables:
	rm -rf runs/teacher-logits

clean:
	rm -rf .venv __pycache__ .pytest_cache
