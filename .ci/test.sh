#!/usr/bin/env bash
# Runs checks and tests, and ends with one line: "N passed, N failed".
#
#   .ci/test.sh [STEP...]        by default all of them, in the order below
#
# A step that is no test run counts as one test. Logs are kept in target/test-logs. Each step that fails is
# named at the end, and the status is 1 then; the other steps are run all the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly ALL_STEPS=(format clippy scripts dependencies build unit e2e fuzz docs)
readonly FUZZ_SECONDS=${FUZZ_SECONDS:-10}
target=${CARGO_TARGET_DIR:-$PWD/target}
readonly target LOGS=$target/test-logs
# Real guests boot in these tests: a test must not meet what a user runs on this host.
unset FORKD_HOME FORKD_KERNEL FORKD_AGENT
export FORKD_BIN=$target/release/forkd
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}

step_format() {
    cargo fmt --all --check
    cargo fmt --manifest-path fuzz/Cargo.toml --check
}

step_clippy() { cargo clippy --workspace --all-targets --locked -- -D warnings; }

step_scripts() { shellcheck --severity=warning .ci/run .ci/*.sh packaging/*.sh guest/kernel/*.sh fuzz/*.sh; }

# The database of advisories is not among the package registries, so it is not asked.
step_dependencies() {
    # The fuzz targets are a workspace of their own, whose lock file follows the dependencies of the crates.
    cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
    if ! command -v cargo-deny >/dev/null; then
        # A debug build is there sooner, and quick enough for one graph.
        echo "installing cargo-deny (minutes, once)"
        cargo install --debug --locked --quiet cargo-deny
    fi
    cargo deny --locked check --hide-inclusion-graph bans licenses sources
}

# The flavour of the guest kernel that this host runs.
kernel_flavour() { "$FORKD_BIN" doctor --kernel-flavour 2>/dev/null || echo stock; }

# Both flavours where there are tests of both.
step_build() {
    make build
    if [[ $(kernel_flavour) == pvm ]]; then make kernel FLAVOUR=both; else make kernel FLAVOUR=stock; fi
    make image
}

step_unit() { cargo test --workspace --locked --no-fail-fast --lib --bins --tests --exclude forkd &&
    cargo test --package forkd --lib --bins --locked --no-fail-fast &&
    cargo test --workspace --locked --no-fail-fast --doc; }

# One at a time: they measure, and each guest boot wants a CPU for itself. Where guests are native on PVM, a few of the
# tests are run on the stock kernel as well, emulated, so that this path does not rot.
step_e2e() {
    local status=0 stock
    cargo test --package forkd --test '*' --locked --no-fail-fast -- --test-threads=1 || status=$?
    if [[ $(kernel_flavour) == pvm ]]; then
        stock=$(guest/kernel/build.sh stock)
        FORKD_KERNEL=$stock cargo test --package forkd --test e2e --locked -- --test-threads=1 \
            fork:: exec:: smp:: leftovers:: || status=$?
    fi
    return "$status"
}

step_fuzz() { fuzz/run.sh "$FUZZ_SECONDS"; }

step_docs() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked; }

# Adds up the lines with which cargo's test runners close: prints passed and failed.
count_tests() {
    sed 's/\x1b\[[0-9;]*m//g' "$1" |
        awk '/^test result: / { for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i-1); if ($i ~ /^failed/) f += $(i-1) } }
             END { printf "%d %d\n", p, f }'
}

passed=0 failed=0
failures=()

run_step() {
    local name=$1 log=$LOGS/$1.log started=$SECONDS status=0 good bad
    printf '== %s\n' "$name"
    # In a shell of its own: under `if`, `set -e` would not hold within the step.
    "$BASH" "${BASH_SOURCE[0]}" --step "$name" 2>&1 | tee "$log" || status=$?
    read -r good bad < <(count_tests "$log")
    case $name in
    unit | e2e)
        # A step that failed without a failed test did not get to its tests, or lost some.
        if ((status != 0 && bad == 0)); then bad=1; fi
        if ((status == 0 && good == 0)); then status=1 bad=1; fi
        ;;
    *) if ((status == 0)); then good=1 bad=0; else good=0 bad=1; fi ;;
    esac
    passed=$((passed + good)) failed=$((failed + bad))
    if ((bad > 0 || status != 0)); then failures+=("$name"); fi
    printf '== %s: %s, %d s\n' "$name" "$( ((bad == 0)) && echo ok || echo FAILED)" "$((SECONDS - started))"
}

if [[ ${1:-} == --step ]]; then
    "step_$2"
    exit
fi

steps=("$@")
if ((${#steps[@]} == 0)); then steps=("${ALL_STEPS[@]}"); fi
for step in "${steps[@]}"; do
    if [[ " ${ALL_STEPS[*]} " != *" $step "* ]]; then
        printf 'test: unknown step "%s"; there are: %s\n' "$step" "${ALL_STEPS[*]}" >&2
        exit 2
    fi
done

mkdir -p "$LOGS"
packaging/debian-packages.sh build image test
# Guests are what most of it needs; whoever asks for one step of them gets what that needs.
if [[ " ${steps[*]} " == *" e2e "* && " ${steps[*]} " != *" build "* ]]; then steps=(build "${steps[@]}"); fi
for step in "${steps[@]}"; do run_step "$step"; done

if ((${#failures[@]} > 0)); then
    printf 'failed steps: %s (logs in %s)\n' "${failures[*]}" "$LOGS"
fi
printf '%d passed, %d failed\n' "$passed" "$failed"
((${#failures[@]} == 0))
