# Everything that a checkout needs to be set up, shown, tested and checked. Only Python 3.10 or newer has to be there;
# the tests against remote stores also want Node.js with npm, and apt-get or an installed sshd, and skip themselves
# without. On CI (CI is set) they fail instead.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The servers of tests/servers.py that PyPI does not have. Debian's packages are unpacked, not installed.
NODE_PACKAGES := s3rver@3.7.1 azurite@3.37.0
DEBIAN_PACKAGES := openssh-server libwrap0

# Loaders of other packages, and what they import. They are installed without what they require: torchvision has no build
# for a CPU build of torch from PyPI, and would bring gigabytes of CUDA (tests/loader_packages.py).
LOADER_PACKAGES := litdata megatron-energon mosaicml-streaming braceexpand bracex brotli catalogue cramjam deprecation \
	filetype lark multi-storage-client obstore prettytable psutil python-snappy rapidyaml wcmatch webdataset xattr zstd

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format kill-matrix storm real-run bench bench-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(STAMP) ## set up .venv from PYTHON (default python3); every target below does this by itself
.PHONY: .venv

# An older virtual environment is kept and brought up to date. torch comes first and alone, so that a CPU build which
# pip's own settings offer is chosen before anything else asks for torch. -qq leaves only errors.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lightning-resume needs Python 3.10 or newer; name one: make PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch (a large download on a fresh machine)"
	@$(PIP) install -qq torch -c constraints.txt
	@echo "Installing lightning-resume and its tools"
	@$(PIP) install -qq -e ".[dev]" -c constraints.txt
	@$(PIP) install -qq --no-deps $(LOADER_PACKAGES) -c constraints.txt
	@echo "Installing the servers of the tests"
	@command -v npm >/dev/null || echo "  no npm: the tests of Azure and of a second S3 will be skipped"
	@! command -v npm >/dev/null || npm install --prefix $(VENV)/node --no-audit --no-fund --loglevel=error --silent \
		$(NODE_PACKAGES) || echo "  npm failed: the tests of Azure and of a second S3 will be skipped"
	@PATH="$$PATH:/usr/sbin" command -v sshd >/dev/null || $(MAKE) -s unpack-sshd \
		|| echo "  no sshd, and no apt-get to fetch it: the tests of SFTP will be skipped"
	@touch $@

# apt-get needs its lists, which a fresh image lacks and only root can fetch.
unpack-sshd:
	@mkdir -p $(VENV)/servers/packages
	@cd $(VENV)/servers/packages && rm -f *.deb && { apt-get download -qq $(DEBIAN_PACKAGES) >/dev/null 2>&1 \
		|| { apt-get update -qq && apt-get download -qq $(DEBIAN_PACKAGES); } >/dev/null 2>&1; }
	@for package in $(VENV)/servers/packages/*.deb; do dpkg -x "$$package" $(VENV)/servers || exit 1; done
.PHONY: unpack-sshd

demo: $(STAMP) ## kill a training run, resume it, and prove that it is the same run
	$(BIN)/python examples/demo.py

# A worker for each core, but few: each starts servers and ranks of its own. A file stays whole, for what its tests share.
test: $(STAMP) ## run the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code into its format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kill-matrix: $(STAMP) ## kill at every step, for every strategy, in both stacks (long)
	$(BIN)/python -m tests.kill_matrix --all

storm: $(STAMP) ## the large settings: random kills, crash points, flipped bits, hostile files (half an hour)
	$(BIN)/python -m tests.sigkill --kills 200 --seed 0
	$(BIN)/python -m tests.crash_model --large
	$(BIN)/python -m tests.test_corruption
	$(BIN)/python -m tests.test_hostile

real-run: $(STAMP) ## 400 MB of text, trained on by both stacks, killed, resumed at other topologies, and counted
	$(BIN)/python -m tests.real_run

bench: $(STAMP) ## everything that is to be fast, beside what others offer and the limits of the machine (three quarters of an hour)
	$(BIN)/python benchmarks/report.py

bench-quick: $(STAMP) ## the same, smaller and rougher (under three minutes)
	$(BIN)/python benchmarks/report.py --quick

clean: ## remove what the targets above made, .venv too
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info lightning_logs demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
