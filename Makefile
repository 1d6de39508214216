.PHONY: format check test picture

format:  ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

check:  ## style and types, as CI runs them
	ruff check .
	ruff format --check .
	mypy

test:  ## the README's test command
	pytest

picture:  ## the README's picture of the architecture
	python -c "from ctxkv_lib.config import ModelConfig; from ctxkv_lib.figures import architecture, save; save(architecture(ModelConfig()), '.github/architecture.png')"
