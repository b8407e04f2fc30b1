//! fork() for microVMs.
#![forbid(unsafe_code)]

fn main() {}
