# forkd: what can be made. `make help` lists it. Each target installs the Debian packages that it needs, and does
# nothing that has been done before.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
FORKD := $(TARGET_DIR)/release/forkd
MUSL := x86_64-unknown-linux-musl
GNU := x86_64-unknown-linux-gnu
PREFIX ?= /usr/local
# Seconds for each fuzz target of `make test` and `make fuzz`.
FUZZ_SECONDS ?= 10
# More arguments for `make bench-branch`: BENCH_ARGS="--mem 512 --rounds 5".
BENCH_ARGS ?=
# Flavour of the guest kernel: stock, pvm, or both. If empty, the one that this host needs.
FLAVOUR ?=

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: quickstart
quickstart: build kernel image ## build all, then run the main job
	@$(FORKD) quickstart

.PHONY: build
build: forkd agent ## build forkd and the guest agent

.PHONY: forkd
forkd: ## build forkd in release mode
	@packaging/debian-packages.sh build
	@cargo build --release --locked --package forkd

# Static, for it is PID 1 of guests that have no libraries of ours. Without the musl target, static glibc does.
.PHONY: agent
agent: ## build the guest agent, a static binary
	@packaging/debian-packages.sh build
	@build() { cargo build --locked --profile agent --package forkd-agent --bin forkd-agent --target "$$1"; }; \
	if rustup target list --installed 2>/dev/null | grep -qx $(MUSL) || rustup target add $(MUSL) 2>/dev/null; then \
		build $(MUSL); \
	else \
		echo "agent: no $(MUSL) target to be had, so it is linked with static glibc"; \
		RUSTFLAGS="-C target-feature=+crt-static" build $(GNU); \
	fi

# The host is asked. Where it has no answer (no KVM at all), the stock kernel is the one that boots everywhere.
.PHONY: kernel
kernel: forkd ## build the guest kernel that this host needs, or FLAVOUR=stock|pvm|both (minutes, once)
	@flavours="$(FLAVOUR)"; \
	if [[ -z $$flavours ]]; then flavours=$$($(FORKD) doctor --kernel-flavour 2>/dev/null) || flavours=stock; fi; \
	if [[ $$flavours == both ]]; then flavours="stock pvm"; fi; \
	for flavour in $$flavours; do guest/kernel/build.sh "$$flavour" >/dev/null; done

.PHONY: image
image: forkd ## build the root image: Debian with Python and numpy (a minute, once)
	@packaging/debian-packages.sh image
	@$(FORKD) image build >/dev/null

.PHONY: doctor
doctor: build ## check this host
	@$(FORKD) doctor

.PHONY: bench
bench: build image ## measure what forks cost here, on both flavours of the kernel where both run
	@if [[ $$($(FORKD) doctor --kernel-flavour) == pvm ]]; then \
		$(MAKE) kernel FLAVOUR=both; $(FORKD) bench; FORKD_PVM=emulated $(FORKD) bench --rounds 10; \
	else $(MAKE) kernel; $(FORKD) bench; fi

.PHONY: bench-branch
bench-branch: build kernel image ## measure branches and snapshots, and plot it (most of an hour)
	@packaging/debian-packages.sh plot
	@$(FORKD) bench branch $(BENCH_ARGS) --save bench/branch.json
	@bench/plot.py bench/branch.json

.PHONY: test
test: ## run all checks and tests
	@FUZZ_SECONDS=$(FUZZ_SECONDS) .ci/test.sh

.PHONY: unit
unit: ## run unit and property tests
	@.ci/test.sh unit

.PHONY: e2e
e2e: ## run the tests on real guests
	@.ci/test.sh e2e

.PHONY: matrix
matrix: ## branch in each mode, BRANCHES times (30), on each kind of RAM, up to 4 GiB, and check them (hours)
	@packaging/debian-packages.sh test
	@$(MAKE) build kernel image
	@FORKD_MATRIX=$(or $(BRANCHES),30) FORKD_BIN=$(FORKD) cargo test --locked --package forkd --test e2e -- \
		--test-threads=1 matrix:: leftovers::

.PHONY: native-soak
native-soak: ## fork a guest under load 200 times, and soak guests for FORKD_SOAK_SECONDS (600) and more (half an hour)
	@packaging/debian-packages.sh test
	@$(MAKE) build kernel image
	@FORKD_FORKS=$(or $(FORKD_FORKS),200) FORKD_SOAK_SECONDS=$(or $(FORKD_SOAK_SECONDS),600) FORKD_BIN=$(FORKD) \
		cargo test --locked --package forkd --test e2e -- --test-threads=1 guest_kernel:: soak::

.PHONY: lint
lint: ## check format, lints, scripts, dependencies and docs
	@.ci/test.sh format clippy scripts dependencies docs

.PHONY: fuzz
fuzz: ## fuzz for FUZZ_SECONDS each
	@FUZZ_SECONDS=$(FUZZ_SECONDS) .ci/test.sh fuzz

.PHONY: docs
docs: ## build the documentation of the code
	@cargo doc --workspace --no-deps --locked

.PHONY: install
install: build ## install forkd below PREFIX (/usr/local)
	@install -D -m 755 $(FORKD) $(DESTDIR)$(PREFIX)/bin/forkd
	@for target in $(GNU) $(MUSL); do \
		agent=$(TARGET_DIR)/$$target/agent/forkd-agent; \
		if [[ -e $$agent ]]; then install -D -m 755 "$$agent" $(DESTDIR)$(PREFIX)/lib/forkd/forkd-agent; fi; \
	done
	@for shell in bash zsh fish; do \
		case $$shell in \
		bash) file=share/bash-completion/completions/forkd ;; \
		zsh) file=share/zsh/site-functions/_forkd ;; \
		fish) file=share/fish/vendor_completions.d/forkd.fish ;; \
		esac; \
		mkdir -p "$$(dirname $(DESTDIR)$(PREFIX)/$$file)"; \
		$(FORKD) completions $$shell >$(DESTDIR)$(PREFIX)/$$file; \
	done
	@echo "installed below $(DESTDIR)$(PREFIX); the kernel comes by: make kernel"

.PHONY: clean
clean: ## remove what cargo built; caches of kernels and images stay
	@cargo clean
