//! The guest's physical address map and its interrupt lines.
//!
//! ```text
//! 0            .. 0x9fc00      RAM: GDT, boot params, page tables, command line
//! 0x9fc00      .. 0x100000     reserved: MP table, ACPI tables, vmgenid page, random seed
//! 0x100000     .. min(RAM,3G)  RAM
//! 0xc0000000   .. 4G           MMIO: virtio-mmio slots, IOAPIC, KVM's own pages, LAPIC
//! 4G           ..              the rest of RAM; pmem above it, aligned to 1 GiB
//! ```
//!
//! RAM is contiguous in the guest's eyes except for the hole below 4 GiB: the first megabyte is RAM to
//! KVM as well (one memslot from 0), only the memory map given to the kernel reserves the part from
//! [`LOW_RAM_END`].

/// Smallest RAM a VM may have, in bytes: 64 MiB.
pub const MIN_RAM: u64 = 64 << 20;
/// Largest RAM a VM may have, in bytes: 64 GiB.
pub const MAX_RAM: u64 = 64 << 30;

/// Where the GDT that the boot registers point to lies.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info (Xen's `hvm_start_info`), its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux boot params, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// Initial stack pointer; the stack is only used until the kernel has its own.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit entry: one PML4, one PDPT, four page directories (identity map of 4 GiB). The PML4 is
/// aligned to 8 KiB: where kernel mode runs natively on PVM, bit 12 of CR3 is the mode.
pub const BOOT_PML4: u64 = 0xa000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x20000;
/// Room for the command line with its NUL, in bytes. Linux on x86 keeps 2048 (`COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;

/// End of the RAM below the legacy hole, and where the MP table lies: the last KiB of base memory,
/// one of the places where kernels look for it (MultiProcessor Specification 1.4, section 4).
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The MP table.
pub const MP_TABLE: u64 = LOW_RAM_END;
/// Room for the MP table.
pub const MP_TABLE_MAX: u64 = 0xa_0000 - MP_TABLE;
/// The ACPI RSDP; the other tables follow. In the area that a BIOS would use (ACPI 6.5, section 5.2.5.1).
pub const ACPI_RSDP: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_MAX: u64 = VMGENID_PAGE - ACPI_RSDP;
/// The page that holds the VM generation id.
pub const VMGENID_PAGE: u64 = 0xf_0000;
/// Length of the page that holds the VM generation id.
pub const VMGENID_LEN: u64 = 0x1000;
/// Seed of the kernel's random numbers, as a `setup_data` record. Not in what is RAM to the kernel: there the record
/// would split a range of its memory map, and early code walks that map for each page table entry.
pub const RNG_SEED: u64 = VMGENID_PAGE + VMGENID_LEN;
/// Start of the RAM above the first megabyte.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Start of the MMIO hole below 4 GiB.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of the MMIO hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// First virtio-mmio slot.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Distance between virtio-mmio slots, and length of each.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Number of virtio-mmio slots.
pub const VIRTIO_MMIO_SLOTS: u8 = 14;

/// KVM's IOAPIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// KVM's local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// Page for KVM's identity map, needed by Intel CPUs without unrestricted guest.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's TSS, needed by the same CPUs.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Start of RAM above the hole.
pub const RAM_ABOVE_4G: u64 = MMIO_HOLE_END;
/// Alignment of pmem regions.
pub const PMEM_ALIGN: u64 = 1 << 30;

/// First port of the serial console (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of the serial console's ports.
pub const SERIAL_PORTS: u16 = 8;
/// GSI of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// Data port of the i8042; the command port is 0x64.
pub const I8042_PORT: u16 = 0x60;
/// GSI of the ACPI generic event device, which tells the guest of a new generation id.
pub const GED_GSI: u32 = 20;
/// Number of IOAPIC pins, and so of GSIs.
pub const GSIS: u32 = 24;

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 16;

/// Address of virtio-mmio slot `slot`, or none if there is no such slot.
pub fn virtio_mmio_addr(slot: u8) -> Option<u64> {
    (slot < VIRTIO_MMIO_SLOTS).then(|| VIRTIO_MMIO_BASE + u64::from(slot) * VIRTIO_MMIO_STRIDE)
}

/// GSI of virtio-mmio slot `slot`, or none if there is no such slot: 5 + slot, but GSI 9 is skipped (it is
/// ACPI's SCI by custom). So 5 to 8, then 10 to 19.
pub fn virtio_mmio_gsi(slot: u8) -> Option<u32> {
    if slot >= VIRTIO_MMIO_SLOTS {
        return None;
    }
    let gsi = 5 + u32::from(slot);
    Some(if gsi >= 9 { gsi + 1 } else { gsi })
}

/// Kind of an entry of the memory map that the kernel is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the kernel's use.
    Reserved = 2,
}

/// One entry of the memory map that the kernel is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// Where `ram` bytes of RAM lie: pairs of guest address and length, ascending. One below the MMIO hole, and
/// one above it when RAM does not fit below.
pub fn ram_ranges(ram: u64) -> Vec<(u64, u64)> {
    let low = ram.min(MMIO_HOLE_START);
    let mut ranges = vec![(0, low)];
    if ram > low {
        ranges.push((RAM_ABOVE_4G, ram - low));
    }
    ranges
}

/// The memory map for `ram` bytes of RAM.
pub fn e820(ram: u64) -> Vec<E820Entry> {
    let mut map = vec![
        E820Entry { start: 0, len: LOW_RAM_END, kind: E820Kind::Ram },
        E820Entry {
            start: LOW_RAM_END,
            len: HIGH_RAM_START - LOW_RAM_END,
            kind: E820Kind::Reserved,
        },
    ];
    for (start, len) in ram_ranges(ram) {
        let skip = HIGH_RAM_START.saturating_sub(start);
        if len > skip {
            map.push(E820Entry { start: start + skip, len: len - skip, kind: E820Kind::Ram });
        }
    }
    map
}

/// First address that may hold pmem for a VM with `ram` bytes of RAM.
pub fn pmem_start(ram: u64) -> u64 {
    let end = RAM_ABOVE_4G + ram.saturating_sub(MMIO_HOLE_START);
    end.next_multiple_of(PMEM_ALIGN)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn virtio_slots_share_no_interrupt_with_others() {
        let mut seen = vec![SERIAL_GSI, 9, GED_GSI];
        for slot in 0..VIRTIO_MMIO_SLOTS {
            let gsi = virtio_mmio_gsi(slot).unwrap();
            assert!(!seen.contains(&gsi) && gsi < GSIS, "slot {slot}: GSI {gsi}");
            seen.push(gsi);
            let addr = virtio_mmio_addr(slot).unwrap();
            assert!((MMIO_HOLE_START..IOAPIC).contains(&addr));
        }
        assert_eq!(virtio_mmio_gsi(VIRTIO_MMIO_SLOTS), None);
        assert_eq!(virtio_mmio_addr(VIRTIO_MMIO_SLOTS), None);
    }

    proptest! {
        #[test]
        fn the_memory_map_is_sorted_and_covers_ram_but_for_the_legacy_hole(
            mib in (MIN_RAM >> 20)..=(MAX_RAM >> 20)
        ) {
            let ram = mib << 20;
            let map = e820(ram);
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
            for e in &map {
                let end = e.start + e.len;
                prop_assert!(end <= MMIO_HOLE_START || e.start >= MMIO_HOLE_END);
            }
            let usable: u64 = map.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.len).sum();
            prop_assert_eq!(usable, ram - (HIGH_RAM_START - LOW_RAM_END));
            let total: u64 = ram_ranges(ram).iter().map(|r| r.1).sum();
            prop_assert_eq!(total, ram);
            let last = map.last().unwrap();
            prop_assert!(pmem_start(ram) >= last.start + last.len);
            prop_assert_eq!(pmem_start(ram) % PMEM_ALIGN, 0);
        }
    }
}
