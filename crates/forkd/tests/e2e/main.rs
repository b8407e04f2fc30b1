//! forkd end to end: the real binary, on real guests.
//!
//! Booting and warming a guest takes half a minute where kernel mode is emulated, so one warm snapshot is made for all
//! tests, and each test forks its own VMs of it. That is why this is one binary with a runner of its own ([`runner`]).
//!
//!     cargo test -p forkd --test e2e [-- [--list] [FILTER...]]
//!
//! | to | read |
//! |---|---|
//! | see what the tests share | [`fixture`], [`vm`], [`command`] |
//! | see what must be gone at the end | [`leftovers`] |
//! | add a test | a module of its subject, whose `TESTS` lists it with its deadline |
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

mod backends;
mod bad_boots;
mod bad_input;
mod bench;
mod branch;
mod cli;
mod collapse;
mod command;
mod diffs;
mod durable;
mod emulated;
mod eval;
mod exec;
mod fixture;
mod forced_failures;
mod fork;
mod guest_kernel;
mod identity;
mod io_under_load;
mod isolation;
mod kernel_mode;
mod leftovers;
mod lifecycle;
mod live;
mod matrix;
mod max_pause;
mod memory;
mod runner;
mod simd;
mod smp;
mod snapshots;
mod soak;
mod strace;
mod vm;
mod writing;

use std::process::ExitCode;

/// All tests, in the order in which they run: first those that need no guest, last the guests that must not come up.
fn tests() -> Vec<runner::Test> {
    [
        cli::WITHOUT_GUEST,
        durable::TESTS,
        bad_input::TESTS,
        bench::WITHOUT_GUEST,
        cli::WITH_GUEST,
        fork::TESTS,
        isolation::TESTS,
        kernel_mode::TESTS,
        identity::TESTS,
        eval::TESTS,
        exec::TESTS,
        branch::TESTS,
        live::TESTS,
        writing::TESTS,
        forced_failures::TESTS,
        max_pause::TESTS,
        collapse::TESTS,
        backends::TESTS,
        simd::TESTS,
        memory::TESTS,
        io_under_load::TESTS,
        lifecycle::TESTS,
        snapshots::TESTS,
        diffs::TESTS,
        smp::TESTS,
        guest_kernel::TESTS,
        emulated::TESTS,
        matrix::TESTS,
        soak::TESTS,
        bench::TESTS,
        bad_boots::TESTS,
    ]
    .concat()
}

fn main() -> ExitCode {
    runner::run(&tests())
}
