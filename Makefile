.PHONY: format check test torture notebooks browser tables badges package colab picture result docs links

format:  ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

check:  ## style and types, as CI runs them
	ruff check .
	ruff format --check .
	mypy

test:  ## the README's test command
	pytest

torture:  ## hundreds of runs that are killed, starved of disk, or find their files damaged: half an hour
	pytest -n 0 -m torture -s tests/experiments/test_trust.py tests/test_fuzz.py

notebooks:  ## every notebook, small and without a network
	CTXKV_PRESET=ci pytest -n 0 --nbmake --nbmake-timeout=600 $(NBMAKE) notebooks/

browser:  ## one notebook in JupyterLab in headless Chromium (Debian: apt-get install chromium chromium-driver)
	pytest -n 0 -m browser -rs tests/notebooks

tables:  ## the study's tables and figures, from its results, in docs/study.md and README.md
	python notebooks/study/tables.py

REPO ?= $(shell git config --get remote.origin.url | sed -nE 's|^.*github\.com[:/]([^/]+/[^/]+)$$|\1|p' | sed 's|\.git$$||')

badges:  ## repository and version, in notebooks, README and CITATION.cff: git's origin, or REPO=owner/name
	python .ci/badges.py $(REPO)

package:  ## wheel and sdist, checked, installed, and used from an empty folder
	.ci/package

colab:  ## every notebook with the versions on Colab; needs Python 3.13, or PYTHON=python3.12
	.ci/colab

picture:  ## the drawings of the architecture and of the packages, for README and site
	python docs/diagram.py

result:  ## the site's pictures of a result; trains what it needs, minutes on 2 cores
	ctxkv compare --preset offline --recipe tuned --measure
	cp runs/offline-tuned-50-vs-10/figures/ppl_curves.png .github/result.png
	cp runs/offline-tuned-50/figures/probe.png .github/probe.png

docs:  ## the site, with the notebooks executed (CTXKV_PRESET=ci), into build/docs; a warning is an error
	python -m sphinx -E -W --keep-going -b html docs build/docs

links:  ## the addresses on the site that lead elsewhere; needs a network
	python -m sphinx -E -b linkcheck docs build/links
