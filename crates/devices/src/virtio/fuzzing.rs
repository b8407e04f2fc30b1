//! Any device under any guest: bytes become register accesses and guest memory.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::bus::BusDevice;
use crate::virtio::block::{Block, BlockConfig, Disk, DiskConfig};
use crate::virtio::mmio::{MmioTransport, Transport};
use crate::virtio::pmem::{Pmem, PmemConfig};
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Counter, Guest};
use crate::virtio::vsock::Vsock;
use crate::virtio::{Memory, VirtioDevice};

/// All guest memory: small, so that random addresses often hit it.
const MEMORY: usize = 0x4_0000;
/// Steps of one run.
const MAX_STEPS: usize = 512;
/// Calls of `process_pending` after which a device must have come to rest.
const MAX_ROUNDS: usize = 4096;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }
}

/// Drives one device, chosen by the first byte, with all that follows. Panics if the device does, or if it
/// never comes to rest.
pub fn fuzz_queues(data: &[u8]) {
    let mut input = Input(data);
    let Some([which]) = input.take() else { return };
    match which % 4 {
        0 => run(Rng::new(), input),
        1 => run(Pmem::new(PmemConfig { start: 1 << 30, size: 1 << 21 }), input),
        2 => {
            let config = DiskConfig {
                base: None,
                size: Some(1 << 20),
                read_only: which & 4 != 0,
                layer_quota: 1 << 16,
            };
            let Ok(disk) = Disk::new(config) else { return };
            run(Block::new(disk, &BlockConfig::default()), input);
        }
        _ => run(Vsock::new(), input),
    }
}

fn run<D: VirtioDevice + 'static>(device: D, mut input: Input<'_>) {
    let Ok(mem) = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]) else { return };
    let transport = MmioTransport::new(
        device,
        mem.clone(),
        Arc::new(Counter::default()),
        Arc::new(Counter::default()),
    );
    let front = transport.front();
    // A device that runs is more interesting than one that was never started.
    start(&mem, &Guest::new(mem.clone(), Arc::clone(&front)));
    for _ in 0..MAX_STEPS {
        let Some([step, at_low, at_high, len]) = input.take() else { break };
        let at = u64::from(at_low) | u64::from(at_high) << 8;
        match step % 8 {
            // Guest memory: the rings are in the first pages.
            0..=3 => {
                let take = usize::from(len).min(input.0.len());
                let (bytes, rest) = input.0.split_at(take);
                input.0 = rest;
                let _out_of_memory = mem.write_slice(bytes, GuestAddress(at));
            }
            4 => write(&front, u64::from(at_low) << 2, &[len, at_high, 0, 0]),
            5 => write(&front, at % 0x200, &[len, at_high, step]),
            6 => write(&front, 0x50, &[at_low % 4, 0, 0, 0]),
            _ => {
                let mut bytes = [0; 8];
                let n = usize::from(len % 9);
                lock(&front).read(at % 0x200, &mut bytes[..n]);
            }
        }
        settle(&transport);
    }
    let state = transport.save();
    if transport.restore(&state).is_ok() {
        transport.resume();
        settle(&transport);
    }
    let _counters = transport.metrics();
}

fn lock(
    front: &std::sync::Mutex<dyn BusDevice>,
) -> std::sync::MutexGuard<'_, dyn BusDevice + 'static> {
    front.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write(front: &std::sync::Mutex<dyn BusDevice>, offset: u64, data: &[u8]) {
    lock(front).write(offset, data);
}

/// Lets the device work until nothing is pending.
fn settle(transport: &dyn Transport) {
    for _ in 0..MAX_ROUNDS {
        if !transport.has_pending() {
            return;
        }
        transport.process_pending();
    }
    panic!("the device never comes to rest");
}

/// Queues of 8 entries, with rings in page n, at 0x000, 0x400 and 0x800 of it.
fn start(mem: &Memory, guest: &Guest) {
    let _fits = mem.write_slice(&[0; 0x4000], GuestAddress(0));
    for status in [0, 1, 3] {
        guest.write(0x70, status);
    }
    guest.write(0x24, 1);
    guest.write(0x20, 1);
    guest.write(0x70, 11);
    for queue in 0..3 {
        guest.write(0x30, queue);
        guest.write(0x38, 8);
        for (register, part) in [(0x80, 0), (0x90, 0x400), (0xa0, 0x800)] {
            guest.write(register, queue * 0x1000 + part);
        }
        guest.write(0x44, 1);
    }
    guest.write(0x70, 15);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn no_guest_makes_a_device_panic_or_spin(
            which in 0u8..8,
            steps in prop::collection::vec(
                (any::<u8>(), prop_oneof![0u16..0x3000, any::<u16>()], prop::collection::vec(any::<u8>(), 0..40)),
                0..60,
            ),
        ) {
            let mut data = vec![which];
            for (step, at, bytes) in steps {
                data.push(step);
                data.extend(at.to_le_bytes());
                data.push(bytes.len() as u8);
                if step % 8 < 4 { data.extend(bytes); }
            }
            fuzz_queues(&data);
        }

        /// Chains of any shape, in rings that are well formed otherwise.
        #[test]
        fn no_descriptor_makes_a_device_panic_or_spin(
            which in 0u8..8,
            queue in 0u16..3,
            descriptors in prop::collection::vec(
                (prop_oneof![0u64..0x5_0000, any::<u64>()], prop_oneof![0u32..0x2000, any::<u32>()], 0u16..8, 0u16..10),
                8,
            ),
            heads in prop::collection::vec(0u16..9, 1..9),
            payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut data = vec![which];
            let mut memory = |at: u16, bytes: &[u8]| {
                data.extend([0, at as u8, (at >> 8) as u8, bytes.len() as u8]);
                data.extend(bytes);
            };
            let page = queue * 0x1000;
            for (n, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
                let mut desc = address.to_le_bytes().to_vec();
                desc.extend(len.to_le_bytes());
                desc.extend(flags.to_le_bytes());
                desc.extend(next.to_le_bytes());
                memory(page + 16 * n as u16, &desc);
            }
            memory(0x4000, &payload);
            let ring: Vec<u8> = heads.iter().flat_map(|h| h.to_le_bytes()).collect();
            memory(page + 0x404, &ring);
            memory(page + 0x402, &(heads.len() as u16).to_le_bytes());
            data.extend([6, queue as u8, 0, 0]);
            fuzz_queues(&data);
        }
    }
}
