//! VM generation id: 16 random bytes in guest memory that change when the VM is forked.
//!
//! The guest finds the address by ACPI. On a change it gets an interrupt (through ACPI's generic event
//! device), and the guest kernel reseeds its random number generator before it uses it again.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::interrupt::{Interrupt, InterruptSlot};
use crate::virtio::Memory;

/// Length of the id in bytes.
pub const LEN: usize = 16;

/// Why an id was not written.
#[derive(Debug, Error)]
pub enum VmGenIdError {
    /// The address is no RAM.
    #[error("vmgenid address {0:#x} is no guest memory")]
    Memory(u64),
    /// The host kernel gave no random bytes.
    #[error("no random bytes for the vmgenid: {0}")]
    Random(#[from] std::io::Error),
}

/// Where the id lies, for a durable snapshot. The id itself is guest memory, and is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmGenIdState {
    /// Guest-physical address.
    pub address: u64,
}

/// The device.
#[derive(Debug)]
pub struct VmGenId {
    mem: Memory,
    address: u64,
    interrupt: InterruptSlot,
}

impl VmGenId {
    /// Writes a first id at `address` (a multiple of 8), without an interrupt.
    ///
    /// # Errors
    /// The address is no RAM, or there are no random bytes.
    pub fn new(
        mem: Memory,
        address: u64,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, VmGenIdError> {
        let device = Self { mem, address, interrupt: InterruptSlot::new(interrupt) };
        device.write_new_id()?;
        Ok(device)
    }

    /// A device over the memory of a restored guest: the id stays until [`VmGenId::renew`].
    pub fn from_state(mem: Memory, state: &VmGenIdState, interrupt: Arc<dyn Interrupt>) -> Self {
        Self { mem, address: state.address, interrupt: InterruptSlot::new(interrupt) }
    }

    fn write_new_id(&self) -> Result<(), VmGenIdError> {
        let mut id = [0; LEN];
        forkd_sys::random::fill(&mut id)?;
        self.mem
            .write_slice(&id, GuestAddress(self.address))
            .map_err(|_| VmGenIdError::Memory(self.address))
    }

    /// Writes a new id and tells the guest.
    ///
    /// # Errors
    /// As [`VmGenId::new`]; the guest is not told then.
    pub fn renew(&self) -> Result<(), VmGenIdError> {
        self.write_new_id()?;
        self.interrupt.trigger();
        Ok(())
    }

    /// Replaces the interrupt: for the child of a fork, before its vCPUs run.
    pub fn rewire(&self, interrupt: Arc<dyn Interrupt>) {
        self.interrupt.replace(interrupt);
    }

    /// Where the id lies.
    pub fn save(&self) -> VmGenIdState {
        VmGenIdState { address: self.address }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Count(AtomicUsize);
    impl Interrupt for Count {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn each_renewal_is_new_and_told() {
        let mem = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let id = |address| -> [u8; LEN] { mem.read_obj(GuestAddress(address)).unwrap() };
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let device = VmGenId::new(mem.clone(), 0x100, count.clone()).unwrap();
        let first = id(0x100);
        assert_ne!(first, [0; LEN]);
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        device.renew().unwrap();
        let second = id(0x100);
        assert_ne!(first, second);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(id(0x0f0), [0; LEN], "nothing else is written");

        let restored = VmGenId::from_state(mem.clone(), &device.save(), count.clone());
        assert_eq!(id(0x100), second);
        restored.renew().unwrap();
        assert_ne!(id(0x100), second);
    }

    #[test]
    fn address_out_of_memory_is_an_error() {
        let mem = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let interrupt = Arc::new(crate::interrupt::NoInterrupt);
        assert!(matches!(VmGenId::new(mem, 0xff8, interrupt), Err(VmGenIdError::Memory(0xff8))));
    }
}
