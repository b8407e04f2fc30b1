//! Versioned, checksummed save format.
#![forbid(unsafe_code)]
