//! Arbitrary bytes as a guest: what it writes to a device's registers and puts into its memory.
//!
//! What must hold: no device panics, reads or writes outside of guest memory, or works without end.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| forkd_devices::virtio::fuzzing::fuzz_queues(data));
