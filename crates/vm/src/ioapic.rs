//! The I/O APIC, and how interrupts get from devices to vCPUs.
//!
//! KVM emulates the local APICs; the IOAPIC is here (KVM_CAP_SPLIT_IRQCHIP). All it does for a guest of forkd is to
//! turn a line's edge into the message that the guest put into the line's redirection entry, which KVM delivers
//! (KVM_SIGNAL_MSI). That a device in this process could as well be in the kernel is not worth what the kernel's
//! costs a fork: its PIT is a kernel thread, whose start takes 16 ms on a busy host, and the teardown of its devices
//! another 16 ms. Here the state is 24 words that fork(2) copies.
//!
//! There is no PIC and no PIT: with hardware-reduced ACPI no kernel looks for them, and without ACPI a kernel that
//! knows KVM's clock needs neither.
//!
//! Known holes: all lines are edge-triggered, whatever the entry says; destinations are 8 bits wide.
//! (Intel 82093AA datasheet; Intel SDM volume 3, "Message Signalled Interrupts")

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use crate::layout;

/// Number of lines.
const PINS: usize = layout::GSIS as usize;

/// Registers in the page: index, and the register that the index selects.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
/// Length of the page.
const LEN: u64 = 0x1000;

/// Indices: identification, version, arbitration, then two words for each line.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION: u8 = 0x10;
/// Version 0x11, as KVM's; above it, the number of the last line.
const VERSION_VALUE: u32 = 0x11 | ((PINS as u32 - 1) << 16);
/// The id's bits in its register.
const ID_MASK: u32 = 0x0f00_0000;

/// Bits of a redirection entry.
const MASKED: u64 = 1 << 16;
const LOGICAL: u64 = 1 << 11;
/// Delivery status and remote IRR are not the guest's to write.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
/// Delivery mode "ExtINT": the interrupt's vector would come from a PIC.
const EXTINT: u64 = 7;
/// Delivery mode "lowest priority".
const LOWEST_PRIORITY: u64 = 1;

/// A message as the local APICs take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    address: u32,
    data: u32,
}

/// Saved state of the IOAPIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Identification register.
    pub id: u32,
    /// Selected register.
    pub select: u8,
    /// Redirection entries.
    pub entries: [u64; PINS],
    /// Lines, as bits, that had an edge while they were masked.
    pub pending: u32,
}

impl Default for IoapicState {
    fn default() -> Self {
        Self { id: 0, select: 0, entries: [MASKED; PINS], pending: 0 }
    }
}

impl IoapicState {
    /// An edge on line `pin`: the message to deliver, if it is not masked. If it is, the edge waits: losing it, as
    /// the hardware does, could stop a virtqueue for good.
    fn raise(&mut self, pin: usize) -> Option<Message> {
        let entry = *self.entries.get(pin)?;
        if entry & MASKED != 0 {
            self.pending |= 1 << pin;
            return None;
        }
        message(entry)
    }

    fn read(&self, offset: u64) -> u32 {
        match (offset, self.select) {
            (IOREGSEL, select) => select.into(),
            (IOWIN, ID | ARBITRATION) => self.id,
            (IOWIN, VERSION) => VERSION_VALUE,
            (IOWIN, index) => match self.entry_of(index) {
                Some((pin, shift)) => (self.entries[pin] >> shift) as u32,
                None => 0,
            },
            _ => 0,
        }
    }

    /// The guest writes a register; what that lets out is returned.
    fn write(&mut self, offset: u64, value: u32) -> Option<Message> {
        match (offset, self.select) {
            (IOREGSEL, _) => self.select = value as u8,
            (IOWIN, ID) => self.id = value & ID_MASK,
            (IOWIN, index) => {
                let (pin, shift) = self.entry_of(index)?;
                let word = 0xffff_ffff << shift;
                let entry = (self.entries[pin] & !word) | (u64::from(value) << shift);
                self.entries[pin] = entry & !READ_ONLY;
                if entry & MASKED == 0 && self.pending & (1 << pin) != 0 {
                    self.pending &= !(1 << pin);
                    return message(entry);
                }
            }
            _ => {}
        }
        None
    }

    /// Line, and first bit within its entry, that register `index` stands for.
    fn entry_of(&self, index: u8) -> Option<(usize, u32)> {
        let word = usize::from(index.checked_sub(REDIRECTION)?);
        (word / 2 < PINS).then_some((word / 2, (word as u32 % 2) * 32))
    }
}

/// The message of a redirection entry that is not masked.
fn message(entry: u64) -> Option<Message> {
    let (vector, mode) = (entry & 0xff, (entry >> 8) & 7);
    if mode == EXTINT {
        return None;
    }
    let destination = entry >> 56;
    let logical = u64::from(entry & LOGICAL != 0);
    let hint = u64::from(mode == LOWEST_PRIORITY);
    let address = layout::LAPIC | (destination << 12) | (hint << 3) | (logical << 2);
    Some(Message { address: address as u32, data: (vector | (mode << 8)) as u32 })
}

/// The interrupt controller of one VM.
#[derive(Debug)]
pub(crate) struct Interrupts {
    /// Gone once the VM is.
    vm: Weak<VmFd>,
    ioapic: Mutex<IoapicState>,
}

/// Why an interrupt could not be raised.
#[derive(Debug)]
pub(crate) enum RaiseError {
    /// The VM is gone.
    Gone,
    /// There is no such line.
    NoLine,
    /// KVM_SIGNAL_MSI failed.
    Signal(errno::Error),
}

impl Interrupts {
    pub(crate) fn new(vm: &Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm: Arc::downgrade(vm), ioapic: Mutex::default() })
    }

    fn ioapic(&self) -> MutexGuard<'_, IoapicState> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn save(&self) -> IoapicState {
        self.ioapic().clone()
    }

    pub(crate) fn restore(&self, state: &IoapicState) {
        self.ioapic().clone_from(state);
    }

    /// An edge on line `gsi`.
    pub(crate) fn raise(&self, gsi: u32) -> Result<(), RaiseError> {
        let pin = usize::try_from(gsi).ok().filter(|p| *p < PINS).ok_or(RaiseError::NoLine)?;
        let vm = self.vm.upgrade().ok_or(RaiseError::Gone)?;
        let message = self.ioapic().raise(pin);
        message.map_or(Ok(()), |m| deliver(&vm, m))
    }

    /// Whether `addr` is the IOAPIC's.
    pub(crate) fn claims(addr: u64) -> bool {
        (layout::IOAPIC..layout::IOAPIC + LEN).contains(&addr)
    }

    /// The guest reads at `addr`.
    pub(crate) fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        let word = self.ioapic().read(addr - layout::IOAPIC).to_le_bytes();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(word) {
            *to = from;
        }
    }

    /// The guest writes at `addr`.
    pub(crate) fn mmio_write(&self, addr: u64, data: &[u8]) -> Result<(), RaiseError> {
        // Registers are words; what is shorter is not for them.
        let Some(word) = data.first_chunk::<4>() else { return Ok(()) };
        let message = self.ioapic().write(addr - layout::IOAPIC, u32::from_le_bytes(*word));
        match message {
            Some(message) => deliver(&*self.vm.upgrade().ok_or(RaiseError::Gone)?, message),
            None => Ok(()),
        }
    }
}

fn deliver(vm: &VmFd, message: Message) -> Result<(), RaiseError> {
    let msi = kvm_msi { address_lo: message.address, data: message.data, ..Default::default() };
    // Zero means that no APIC took it, which is the guest's business.
    vm.signal_msi(msi).map(|_| ()).map_err(RaiseError::Signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ioapic: &mut IoapicState, pin: u8, entry: u64) -> Option<Message> {
        ioapic.write(IOREGSEL, u32::from(REDIRECTION + pin * 2 + 1));
        let first = ioapic.write(IOWIN, (entry >> 32) as u32);
        ioapic.write(IOREGSEL, u32::from(REDIRECTION + pin * 2));
        first.or(ioapic.write(IOWIN, entry as u32))
    }

    #[test]
    fn an_edge_becomes_the_message_of_its_entry() {
        let mut ioapic = IoapicState::default();
        assert_eq!(ioapic.raise(5), None, "masked at reset");
        let mut ioapic = IoapicState::default();
        assert_eq!(set(&mut ioapic, 5, 3 << 56 | LOGICAL | 0x41), None);
        let message = Message { address: 0xfee0_3004, data: 0x41 };
        assert_eq!(ioapic.raise(5), Some(message));
        assert_eq!(set(&mut ioapic, 6, 0xff << 56 | LOWEST_PRIORITY << 8 | 0x55), None);
        assert_eq!(ioapic.raise(6), Some(Message { address: 0xfeef_f008, data: 0x155 }));
        assert_eq!(set(&mut ioapic, 7, EXTINT << 8), None);
        assert_eq!(ioapic.raise(7), None, "there is no PIC to ask");
    }

    #[test]
    fn an_edge_on_a_masked_line_is_delivered_once_when_it_is_unmasked() {
        let mut ioapic = IoapicState::default();
        set(&mut ioapic, 5, MASKED | 0x41);
        assert_eq!(ioapic.raise(5), None);
        assert_eq!(ioapic.raise(5), None);
        assert!(set(&mut ioapic, 5, 0x41).is_some());
        assert_eq!(set(&mut ioapic, 5, 0x41), None);
    }

    #[test]
    fn registers_read_back_what_is_the_guests() {
        let mut ioapic = IoapicState::default();
        ioapic.write(IOREGSEL, ID.into());
        ioapic.write(IOWIN, 0xffff_ffff);
        assert_eq!(ioapic.read(IOWIN), ID_MASK);
        ioapic.write(IOREGSEL, VERSION.into());
        ioapic.write(IOWIN, 0);
        assert_eq!(ioapic.read(IOWIN), 0x0017_0011);
        set(&mut ioapic, 23, u64::MAX);
        assert_eq!(ioapic.read(IOWIN), !(READ_ONLY as u32));
        ioapic.write(IOREGSEL, 0x40);
        assert_eq!(ioapic.read(IOWIN), 0, "beyond the last line");
    }

    proptest::proptest! {
        #[test]
        fn no_access_is_harmful(
            accesses in proptest::collection::vec((0u64..0x1000, proptest::num::u32::ANY, 0usize..40), 0..200)
        ) {
            let mut ioapic = IoapicState::default();
            for (offset, value, pin) in accesses {
                ioapic.write(offset & !0xf, value);
                ioapic.read(offset);
                ioapic.raise(pin);
            }
        }
    }
}
