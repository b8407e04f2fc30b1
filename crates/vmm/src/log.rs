//! The VM process's log: lines on standard error, which leads to `vmm.log` in the run directory.
//!
//! It is for what no request can be answered with. What goes into it is bounded by what can go wrong, not
//! by what a guest does: callers that a guest can make repeat themselves say a thing once.

/// Writes a line.
#[expect(clippy::print_stderr, reason = "standard error is the log")]
pub fn line(text: &str) {
    let seconds = forkd_sys::clock::realtime_ns() / 1_000_000;
    eprintln!("[{}.{:03}] forkd: {text}", seconds / 1000, seconds % 1000);
}
