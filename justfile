# Commands for people and agents who work on the code. Each runs as it is written here without just, too.

set positional-arguments

# list the commands
default:
    @just --list --unsorted

# make the environment that uv.lock describes
setup:
    uv sync --locked

# all tests; those of other libraries and of vLLM download several GB the first time
test *args:
    uv run pytest "$@"

# all tests but those of other libraries and of vLLM
test-fast *args:
    uv run pytest -m "not readers and not vllm" "$@"

# formatting and lint
lint:
    uv run ruff format --check .
    uv run ruff check .

# mend formatting and lint where that can be done by itself
format:
    uv run ruff format .
    uv run ruff check --fix .

# types
types:
    uv run mypy inference tests tools

# write docs/options.md anew
docs:
    uv run python tools/options_page.py

# the documentation against the program
docs-check:
    uv run python tools/options_page.py --check
    uv run pytest tests/test_docs.py

# known vulnerabilities of the locked packages
audit:
    .ci/audit

# all that a change must pass: install, audit, lint, types, tests
ci:
    .ci/run

# time and memory at a 7B shape, on a GPU
bench *args:
    uv run python benchmarks/stages.py "$@"

# kernels against their floors, on a GPU
bench-kernels:
    uv run python benchmarks/inner_loops.py

# this program beside the other libraries
bench-compare *args:
    uv run python benchmarks/compare.py "$@"

# what each part of the method is worth: MODEL --calib FILE --heldout FILE
bench-quality *args:
    uv run python benchmarks/quality.py "$@"

# a hundred kills at random moments, and one at every file-system call
kills count="100":
    LLM_QUANTIZE_KILLS={{ count }} uv run pytest tests/test_killed.py

# new examples in every reader of untrusted files, so many seconds each
fuzz seconds="30":
    LLM_QUANTIZE_FUZZ={{ seconds }} uv run pytest -n 0 -s tests/test_fuzz.py
