//! The entry point of the fuzz target.
