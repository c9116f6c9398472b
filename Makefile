# Two commands: `make reproduce` trains and draws everything on a CPU; `make test` checks the code.
# The figures take other settings too, for example
#   make fig1a DATA=cifar100 ARCH=resnet56 RECIPE=short SEEDS="0 1 2"
PYTHON ?= python3
PY := .venv/bin/python

DATA ?= digits
ARCH ?= resnet8
RECIPE ?= quick
SEEDS ?= 0 1 2 3 4
FLAGS ?=
NAME ?= $(subst :,-,$(subst /,-,$(DATA)))-$(ARCH)-$(RECIPE)
COMMON := --data "$(DATA)" --arch $(ARCH) --recipe $(RECIPE) --seeds $(SEEDS) $(FLAGS)
# Several seeds get -s<seed> appended to their folder, one seed does not.
OF = $(if $(word 2,$(SEEDS)),$(foreach s,$(SEEDS),runs/$(NAME)-$(1)-s$(s)),runs/$(NAME)-$(1))
TEACHER := runs/$(NAME)-teacher$(if $(word 2,$(SEEDS)),-s{seed})

.PHONY: reproduce test fig1a clean

reproduce: fig1a
	@$(PY) -c 'import common; common.show_results("results")'

fig1a: .venv/ready
	$(PY) train_teacher.py $(COMMON) --quiet --out runs/$(NAME)-teacher
	$(PY) train_student.py $(COMMON) --quiet --teacher '$(TEACHER)' --out runs/$(NAME)-kd
	$(PY) train_student.py $(COMMON) --quiet --teacher '$(TEACHER)' --kd-weight 0 --ce-weight 1 --out runs/$(NAME)-onehot
	$(PY) analyze_deviation.py --teacher $(call OF,teacher) --student $(call OF,kd) --control $(call OF,onehot) \
	  --title '$(NAME)' --out results/$(NAME)/fig1a

test: .venv/ready
	$(PY) -m pytest -q test_smoke.py

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

clean:
	rm -rf .venv __pycache__ .pytest_cache
