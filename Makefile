# The environment lies in .venv, made by uv if it is on PATH, else by venv and pip: the same versions either way.
PYTHON ?= python3
ENVIRONMENT := .venv/.installed

.PHONY: figures test test-all lab

figures: $(ENVIRONMENT)  ## draw the figures into figures/ and print what they measure
	.venv/bin/dynattn figures --paper dat
	.venv/bin/dynattn figures --paper dgt
	.venv/bin/dynattn figures --paper debiformer
	.venv/bin/dynattn figures --paper sgformer
	.venv/bin/dynattn figures --paper setr
	.venv/bin/dynattn figures --paper hlg

test: $(ENVIRONMENT)  ## the tests of every day: five minutes on two cores
	.venv/bin/pytest -n 2

test-all: $(ENVIRONMENT)  ## also the slow tests, the notebooks and the browser
	.venv/bin/pytest -n 2 -m ""

lab: $(ENVIRONMENT)  ## JupyterLab on the tour
	.venv/bin/dynattn lab

# Stamped when complete, so an interrupted installation is taken up again and a finished one is not repeated.
$(ENVIRONMENT): pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing .venv && \
		uv pip install --python .venv/bin/python -c constraints.txt -e '.[all]'; \
	else \
		$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")' && \
		$(PYTHON) -m venv .venv && \
		.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[all]'; \
	fi
	@touch $@
