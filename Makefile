# Each target makes .venv when it is missing, installs what it needs and reuses it afterwards.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt
# Two notices of the theme about the future of mkdocs, which is pinned here, are left out.
SITE := NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true .venv/bin/mkdocs

.PHONY: demo test soak registry conformance docs serve-docs screenshots links pictures models-table study study-quick evidence bench performance test-gpu bench-gpu package lint clean

demo: .venv/demo.stamp
	.venv/bin/python examples/train_text.py $(ARGS)

test: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

# The long runs and the fuzzing, of which `make test` does a short part: 15 to 25 minutes.
soak: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --soak tests/soak tests/registry tests/focus/test_compiled.py \
		tests/mathematics/test_triton.py $(ARGS)
	.venv/bin/python -m pytest -n 2 --soak -m long tests $(ARGS)

# docs/registry.md: every model of the registry of transformers. About an hour; an interrupted run goes on
# with ARGS=--resume.
registry: .venv/test.stamp
	.venv/bin/python tests/registry/run.py --page docs/registry.md $(ARGS)

# The own optimizer tests of PyTorch or torch-optimizer, wrapped: make conformance CHECKOUT=path
conformance: .venv/test.stamp
	.venv/bin/python -m pytest tests/conformance $(if $(CHECKOUT),--checkout $(CHECKOUT)) -rs $(ARGS)

# The site, into site/; warnings are errors. `make serve-docs` shows it while it is written.
docs: .venv/docs.stamp
	$(SITE) build --quiet

# The notebooks are not run again at each change.
serve-docs: .venv/docs.stamp
	EXECUTE_NOTEBOOKS=false $(SITE) serve

# Pictures of the built site in a headless browser, to be looked at; outside CI, since it needs chromium.
screenshots:
	.venv/bin/python docs/site/screenshots.py $(ARGS)

# Every link to other sites, which CI leaves out: they fail for reasons that are not ours.
links: .venv/docs.stamp
	.venv/bin/python docs/site/links.py

# The pictures of the method, of the floors and of the monitor, for light and for dark pages.
pictures: .venv/dev.stamp
	.venv/bin/python docs/pictures/method.py
	.venv/bin/python docs/pictures/architecture.py
	.venv/bin/python docs/pictures/monitor.py

# The table of tested models, from the tests that train them.
models-table: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --soak tests/libraries \
		--models-table docs/models.md

# A small part of the study, from the start, in minutes; the whole takes hours and resumes.
study-quick: .venv/study.stamp
	.venv/bin/python benchmarks/study.py quick $(ARGS)

study: .venv/study.stamp
	.venv/bin/python benchmarks/study.py run $(ARGS)

# docs/evidence.md and docs/focus.md, from the results.
evidence: .venv/study.stamp
	.venv/bin/python benchmarks/study.py report $(ARGS)
	.venv/bin/python benchmarks/focus_report.py

# The main part of the measurements of time and memory, in minutes.
bench: .venv/study.stamp
	.venv/bin/python benchmarks/bench.py run --quick $(ARGS)

# docs/performance.md, from the results of `python benchmarks/bench.py run`.
performance: .venv/study.stamp
	.venv/bin/python benchmarks/bench.py report $(ARGS)

# What wants a GPU; without one each test is skipped with a message.
test-gpu: .venv/test.stamp
	.venv/bin/python -m pytest tests/gpu tests/mathematics/test_triton.py -o addopts= -rs $(ARGS)

# Whole training steps on a GPU, into benchmarks/results/gpu, in at most 8 minutes.
bench-gpu: .venv/study.stamp
	.venv/bin/python benchmarks/gpu.py $(ARGS)

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/%.stamp: $(INPUTS) | .venv/bin/python
	$(PIP) -e . --group $*
	touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "spanopt needs Python 3.10 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) pip  # dependency groups need pip 25.1

# The wheel and the source distribution, into dist/; then, with the wheel alone: the README's first snippet, and
# whether every public type is known.
package: .venv/package.stamp
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	rm -rf dist build
	.venv/bin/python -m build --outdir dist .
	.venv/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	awk '/^```python/ {on = 1; next} /^```/ {if (on) exit} on' README.md > build/snippet.py
	cd build && fresh/bin/python -W error snippet.py && fresh/bin/spanopt --version
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"spanopt[all] @ file://$$(ls $$PWD/dist/*.whl)" transformers lightning  # what its types are made of
	cd build && PATH="$$PWD/fresh/bin:$$PATH" ../.venv/bin/pyright --verifytypes spanopt --ignoreexternal
	tar tzf dist/*.tar.gz | grep -q /tests/test_optimizer.py
	tar tzf dist/*.tar.gz | grep -q /docs/index.md

clean:
	rm -rf .venv runs site dist build
