#!/bin/sh
# Runs every fuzz target for SECONDS each, and fails if one finds a fault.
#
#   fuzz/run.sh SECONDS [TARGET...]
#
# Works with stable Rust: coverage instrumentation is an LLVM pass that stable rustc runs when asked.
# FORKD_FUZZ_ASAN=1 adds AddressSanitizer, which needs rustc's unstable options.
# What was learnt is kept in corpus/, inputs that fail in artifacts/; neither is committed.
set -eu

seconds=${1:?usage: fuzz/run.sh SECONDS [TARGET...]}
shift
case $seconds in
'' | *[!0-9]*)
    echo "fuzz/run.sh: \"$seconds\" is not a number of seconds" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")"
all=$(sed -n 's/^path = "targets\/\(.*\)\.rs"$/\1/p' Cargo.toml)
targets=${*:-$all}
triple=$(rustc -vV | sed -n 's/^host: //p')

# What cargo-fuzz passes, without its unstable options.
flags="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cforce-frame-pointers=yes"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    flags="$flags -Cllvm-args=-sanitizer-coverage-$option"
done
if [ "${FORKD_FUZZ_ASAN:-0}" = 1 ]; then
    export RUSTC_BOOTSTRAP=1
    flags="$flags -Zsanitizer=address"
fi

echo "fuzz: building $(echo $targets | wc -w) targets"
bins=
for target in $targets; do
    bins="$bins --bin $target"
done
# --target keeps the flags off build scripts and procedural macros.
# shellcheck disable=SC2086
RUSTFLAGS=$flags cargo build --quiet --locked --release --target "$triple" $bins
out=$(cargo metadata --format-version 1 --no-deps --offline |
    sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')

failed=
for target in $targets; do
    mkdir -p "corpus/$target" "artifacts/$target" "seeds/$target"
    log=artifacts/$target/log
    echo "fuzz: $target for $seconds s"
    status=0
    "$out/$triple/release/$target" \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=8192 \
        -print_final_stats=1 -artifact_prefix="artifacts/$target/" \
        "corpus/$target" "seeds/$target" >"$log" 2>&1 || status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    covered=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    echo "fuzz: $target: ${runs:-0} executions, ${covered:-0} edges covered"
    if [ "$status" -ne 0 ] || [ "${runs:-0}" -eq 0 ]; then
        failed="$failed $target"
        tail -n 40 "$log" >&2
    fi
done
if [ -n "$failed" ]; then
    echo "fuzz: faults found by:$failed; inputs are in fuzz/artifacts" >&2
    exit 1
fi
