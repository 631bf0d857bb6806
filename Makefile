# `make` answers both questions in full; `make test` runs the tests.
# BACKGROUNDS=DIR names a folder with BSDS500's training photographs.

PYTHON ?= python3
BACKGROUNDS ?=
PY := .venv/bin/python

.PHONY: all q1 q2 explorer styles quick data test clean

all: q1 explorer

q1: data
	$(PY) q1_cnn_autoencoder.py

q2: data
	$(PY) q2_aae.py

styles: data
	$(PY) -m extras.styles

explorer: q2
	$(PY) -m extras.explorer

quick: data
	$(PY) q1_cnn_autoencoder.py --quick
	$(PY) q2_aae.py --quick

data: .venv/installed
	$(PY) make_data.py $(if $(BACKGROUNDS),--backgrounds "$(BACKGROUNDS)")

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q -n 2 --dist worksteal

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
