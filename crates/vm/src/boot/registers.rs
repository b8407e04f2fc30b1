//! The first vCPU's registers at entry, with the descriptors and page tables they point to.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryMmap;

use super::{BootEntry, BootError, Protocol, write};
use crate::layout;
use crate::mode::GuestMode;

/// Selectors: `__BOOT_CS` and `__BOOT_DS` of the Linux boot protocol, then a TSS.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;
/// 32-bit code for PVH.
const BOOT_CS32: u16 = 0x28;
const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // code, 64-bit
    0x00cf_9300_0000_ffff, // data
    0x008f_8b00_0000_ffff, // TSS
    0x00cf_9b00_0000_ffff, // code, 32-bit
];

/// Segment types: executed and readable, written and readable, busy 32-bit TSS.
const TYPE_CODE: u8 = 11;
const TYPE_DATA: u8 = 3;
const TYPE_TSS: u8 = 11;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set; interrupts are off.
const RFLAGS_FIXED: u64 = 2;

const PAGE: u64 = 4096;
const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 2;
const PAGE_USER: u64 = 4;
const PAGE_LARGE: u64 = 1 << 7;
/// Page directories of the identity map: 1 GiB each.
const DIRECTORIES: u64 = 4;

/// General registers at `entry`.
pub fn general(entry: &BootEntry) -> kvm_regs {
    let mut regs = kvm_regs { rip: entry.rip, rflags: RFLAGS_FIXED, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => {
            regs.rsi = layout::BOOT_PARAMS;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
        }
        Protocol::Pvh => regs.rbx = layout::PVH_START_INFO,
    }
    regs
}

/// Segment and control registers at `entry`; the rest of `sregs` stays as it is at reset.
pub fn special(entry: &BootEntry, sregs: &mut kvm_sregs) {
    let long = entry.protocol == Protocol::Linux64;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        selector: BOOT_DS,
        type_: TYPE_DATA,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: if long { BOOT_CS } else { BOOT_CS32 },
        type_: TYPE_CODE,
        l: long.into(),
        db: (!long).into(),
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    sregs.tr =
        kvm_segment { selector: BOOT_TSS, type_: TYPE_TSS, limit: 0xf_ffff, s: 0, db: 0, ..flat };
    let gdt_limit = (size_of_val(&GDT) - 1) as u16;
    sregs.gdt = kvm_dtable { base: layout::BOOT_GDT, limit: gdt_limit, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::BOOT_PML4;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
}

/// Writes the GDT.
pub fn write_descriptors(ram: &GuestMemoryMmap) -> Result<(), BootError> {
    write(ram, "the GDT", layout::BOOT_GDT, &words(GDT))
}

/// Writes page tables that map the first 4 GiB to themselves, in pages of 2 MiB. A kernel that runs natively on PVM does
/// so at CPL 3: its pages are the user's to the CPU.
pub fn write_page_tables(ram: &GuestMemoryMmap, mode: GuestMode) -> Result<(), BootError> {
    let user = if mode == GuestMode::PvmNative { PAGE_USER } else { 0 };
    let table = PAGE_PRESENT | PAGE_WRITABLE | user;
    let pdpt = layout::BOOT_PML4 + PAGE;
    let directories = pdpt + PAGE;
    let what = "page tables";
    write(ram, what, layout::BOOT_PML4, &words([pdpt | table]))?;
    let entries = (0..DIRECTORIES).map(|i| (directories + i * PAGE) | table);
    write(ram, what, pdpt, &words(entries))?;
    let pages = (0..DIRECTORIES * 512).map(|i| (i << 21) | table | PAGE_LARGE);
    write(ram, what, directories, &words(pages))
}

fn words(list: impl IntoIterator<Item = u64>) -> Vec<u8> {
    list.into_iter().flat_map(u64::to_le_bytes).collect()
}
