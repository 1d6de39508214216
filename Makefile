.PHONY: format check test torture notebooks outputs tables badges package colab docs links

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
	CTXKV_PRESET=ci OMP_NUM_THREADS=1 pytest --nbmake --nbmake-timeout=600 $(NBMAKE) notebooks/

outputs:  ## execute the notebooks with preset offline and keep their outputs: an hour on 2 cores
	CTXKV_PRESET=offline python notebooks/outputs.py

tables:  ## the study's tables and figures and the story's pictures, from the study's results
	python notebooks/study/tables.py
	python notebooks/study/figures.py
	python notebooks/study/story.py

REPO ?= $(shell git config --get remote.origin.url | sed -nE 's|^.*github\.com[:/]([^/]+/[^/]+)$$|\1|p' | sed 's|\.git$$||')

badges:  ## repository and version, in notebooks, README and CITATION.cff: git's origin, or REPO=owner/name
	python .ci/badges.py $(REPO)

package:  ## wheel and sdist, checked, installed, and used from an empty folder
	.ci/package

colab:  ## every notebook with the versions on Colab; needs Python 3.13, or PYTHON=python3.12
	.ci/colab

# plotly in its small bundle, which the site serves itself
build/package/plotly-basic.min.js:
	mkdir -p build
	npm pack --silent --pack-destination build plotly.js-basic-dist-min@4.1.1
	tar -xzmf build/plotly.js-basic-dist-min-4.1.1.tgz -C build $(@:build/%=%)

docs: build/package/plotly-basic.min.js  ## the site, with the outputs that the notebooks hold, into build/docs; a warning is an error
	python -m sphinx -E -W --keep-going -b html docs build/docs

links:  ## the addresses on the site that lead elsewhere; needs a network
	python -m sphinx -E -b linkcheck docs build/links
