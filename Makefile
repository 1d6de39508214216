.PHONY: format check test notebooks browser bench badges picture

format:  ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

check:  ## style and types, as CI runs them
	ruff check .
	ruff format --check .
	mypy

test:  ## the README's test command
	pytest

notebooks:  ## every notebook, small and without a network
	CTXKV_PRESET=ci pytest --nbmake --nbmake-timeout=600 notebooks/

browser:  ## one notebook in JupyterLab in headless Chromium (Debian: apt-get install chromium chromium-driver)
	pytest -n 0 -m browser -rs tests/notebooks

bench:  ## speed and memory, on a stream of about the published 100-sample size
	ctxkv bench --preset offline --samples 160

REPOSITORY = s|REPOSITORY = \\"[^"]*\\"|REPOSITORY = \\"$(REPO)\\"|
BADGE = s|(colab.research.google.com/github/)[^/]+/[^/]+(/blob/)|\1$(REPO)\2|

REPO ?= $(shell git config --get remote.origin.url | sed -nE 's|^.*github\.com[:/]([^/]+/[^/]+)$$|\1|p' | sed 's|\.git$$||')

badges:  ## where the Colab badges and the install cell point: git's origin, or REPO=owner/name
	@test -n "$(REPO)" || { echo "git's origin is not on github.com; name it: make badges REPO=owner/name"; exit 2; }
	sed -E -i.bak '$(REPOSITORY); $(BADGE)' notebooks/*.ipynb
	rm notebooks/*.ipynb.bak

picture:  ## the README's picture of the architecture
	python -c "from ctxkv_lib.model.config import ModelConfig; from ctxkv_lib.views.figures import architecture, save; save(architecture(ModelConfig()), '.github/architecture.png')"
