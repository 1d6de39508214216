.PHONY: format check test torture notebooks outputs bench study badges package colab picture result docs links

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

outputs:  ## execute the notebooks with preset offline and keep their outputs: an hour on 2 cores
	CTXKV_PRESET=offline python notebooks/outputs.py

bench:  ## speed and memory, on a stream of about the published 100-sample size
	ctxkv bench --preset offline --samples 160

STUDY ?= answer baselines levers memory recall full fair phase1

study:  ## what recipe tuned is worth and why: days on 2 cores, each part at most two hours and then on from there
	for part in $(STUDY); do PYTHONPATH=notebooks/study ctxkv sweep --protocol notebooks/study/$$part.json \
	  --out notebooks/study/results/$$part --runs runs/study --hours 2; done
	python notebooks/study/evidence.py
	python notebooks/study/continuous_cache.py cache runs/evidence/tuned-* runs/evidence/exact-*
	python notebooks/study/scaling.py runs/study/figures
	python notebooks/study/search.py

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
