.PHONY: help setup demo test lint clean
.DEFAULT_GOAL := help

# Only .venv counts: an active environment or a search path from outside must not show through.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
# Without compiled modules every actor would spend half a minute more on importing vLLM, Ray and DeepSpeed.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo    all stages on MovieLens 100K"
	@echo "make test    linters, type checker and tests"
	@echo "make lint    linters and type checker alone"
	@echo "make setup   the environment .venv alone; the other targets see to it themselves"
	@echo "make clean   remove .venv and caches; data/ and runs/ stay"

setup:
	@requirements/install.sh

demo: setup
	.venv/bin/gream data ml-100k
	.venv/bin/gream run --config configs/ml-100k.yaml

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	.venv/bin/python -m pytest

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
