//! fork() for microVMs: the program.

use std::process::ExitCode;

fn main() -> ExitCode {
    forkd::run()
}
