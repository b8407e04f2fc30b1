//! One microVM process: machine, event loop, fork.
