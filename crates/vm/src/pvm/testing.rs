//! For the tests: guest RAM with page tables like a Linux kernel's.

use std::sync::atomic::Ordering;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::linear::{Context, LinearMemory, cr, pte};

const PML4: u64 = 0x1000;
const KERNEL_PDPT: u64 = 0x2000;
const KERNEL_PD: u64 = 0x3000;
const USER_PDPT: u64 = 0x4000;
const USER_PD: u64 = 0x5000;
const USER_PT: u64 = 0x6000;

/// 8 MiB of RAM; 2 MiB of it mapped for the kernel, some pages for a user.
pub(super) struct Tables(LinearMemory, GuestMemoryMmap<()>);

impl Tables {
    /// Linear address of the kernel's 2 MiB.
    pub const KERNEL: u64 = 0xffff_ffff_8000_0000;
    /// Where they lie.
    pub const KERNEL_GPA: u64 = 0x20_0000;
    /// Linear address of the user's pages: writable, read-only, writable, then none.
    pub const USER: u64 = 0x40_0000;
    /// Where the user's pages lie: in this order, not adjacent.
    pub const USER_GPAS: [u64; 3] = [0x40_3000, 0x40_1000, 0x40_6000];

    pub fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let tables = Self(LinearMemory::new(ram.clone()), ram);
        let table = pte::PRESENT | pte::WRITE;
        let user = table | pte::USER;
        tables.set(PML4 + 511 * 8, KERNEL_PDPT | table);
        tables.set(KERNEL_PDPT + 510 * 8, KERNEL_PD | table);
        tables.set(KERNEL_PD, Self::KERNEL_GPA | table | pte::LARGE);
        tables.set(PML4, USER_PDPT | user);
        tables.set(USER_PDPT, USER_PD | user);
        tables.set(USER_PD + 2 * 8, USER_PT | user);
        let [a, b, c] = Self::USER_GPAS;
        tables.set(USER_PT, a | user | pte::NX);
        tables.set(USER_PT + 8, b | pte::PRESENT | pte::USER);
        tables.set(USER_PT + 16, c | user);
        tables
    }

    fn set(&self, gpa: u64, entry: u64) {
        self.0.word(gpa).unwrap().store(entry, Ordering::Relaxed);
    }

    /// The entry of the user's page `index`.
    pub fn user_entry(&self, index: u64) -> u64 {
        self.0.word(USER_PT + 8 * index).unwrap().load(Ordering::Relaxed)
    }

    /// Sets the entry of the kernel's page directory pointer table that covers `address`.
    pub fn set_kernel_entry(&self, address: u64, entry: u64) {
        self.set(KERNEL_PDPT + ((address >> 30) & 0x1ff) * 8, entry);
    }

    pub fn clear_kernel_entry(&self, address: u64) {
        self.set_kernel_entry(address, 0);
    }

    pub fn ram(&self) -> &GuestMemoryMmap<()> {
        &self.1
    }

    pub fn memory(&self) -> &LinearMemory {
        &self.0
    }

    /// Kernel mode, with write protection and NX.
    pub fn context(&self) -> Context {
        Context { cr0: cr::CR0_WP, cr3: PML4, cr4: 0, efer: cr::EFER_NX, rflags: 2, user: false }
    }
}
