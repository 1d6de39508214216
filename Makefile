.PHONY: format check test torture answers notebooks outputs tables badges package colab docs site-check links

format:  ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

check:  ## check style and types, as CI does
	ruff check .
	ruff format --check .
	mypy

test:  ## run the tests, as README says
	pytest

torture:  ## test thousands of runs that are killed, run out of disk space, lose their store, or find damaged files (more than an hour)
	pytest -n 0 -m nightly -s tests/experiments/test_trust.py tests/runs tests/test_fuzz.py

answers:  ## run the notebooks together with the answers to their exercises, on little data
	CTXKV_PRESET=ci pytest -m nightly tests/notebooks

notebooks:  ## run every notebook on little data and without a network
	CTXKV_PRESET=ci OMP_NUM_THREADS=1 pytest --nbmake --nbmake-timeout=600 $(NBMAKE) notebooks/

outputs:  ## execute the notebooks with preset offline and keep their outputs (an hour on 2 cores)
	CTXKV_PRESET=offline python notebooks/outputs.py

tables:  ## write the study's tables and figures and the story's pictures from the study's results
	python notebooks/study/tables.py
	python notebooks/study/figures.py
	python notebooks/study/story.py

REPO ?= $(shell git config --get remote.origin.url | sed -nE 's|^.*github\.com[:/]([^/]+/[^/]+)$$|\1|p' | sed 's|\.git$$||')

badges:  ## write the version and the repository (git's origin, or REPO=owner/name) into every file that names them
	python .ci/badges.py $(REPO)

package:  ## build and check wheel and sdist, install the wheel, and use it from an empty folder
	.ci/package

colab:  ## run every notebook with the versions on Colab; needs Python 3.13, or PYTHON=python3.12
	.ci/colab

# The site itself serves plotly's small bundle and MathJax, which is a single file.
SERVED = build/package/plotly-basic.min.js build/package/es5/tex-svg.js
build/package/plotly-basic.min.js: PACKAGE = plotly.js-basic-dist-min@4.1.1
build/package/es5/tex-svg.js: PACKAGE = mathjax@3.2.2
$(SERVED):
	mkdir -p build
	npm pack --silent --pack-destination build $(PACKAGE)
	tar -xzmf build/$(subst @,-,$(PACKAGE)).tgz -C build $(@:build/%=%)

docs: $(SERVED)  ## build the site into build/docs, with the notebooks' stored outputs; a warning is an error
	python -m sphinx -E -W --keep-going -b html docs build/docs

site-check: docs  ## open the built site in Chromium, try its controls, and look for errors; needs `pip install -e ".[site]"`
	python tests/site/browser.py build/docs

links:  ## check the site's links to other sites; needs a network
	python -m sphinx -E -b linkcheck docs build/links
