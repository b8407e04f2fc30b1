//! What the two boot protocols hand to the kernel in memory: Linux's zero page and Xen's start info.

use crate::layout::{self, E820Entry};

use super::Initrd;

/// Offsets in the zero page (Linux, Documentation/arch/x86/zero-page.rst and boot.rst).
mod zp {
    pub const ACPI_RSDP: usize = 0x070;
    pub const E820_COUNT: usize = 0x1e8;
    pub const SETUP_HEADER: usize = 0x1f1;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const MAGIC: usize = 0x202;
    pub const LOADER: usize = 0x210;
    pub const RAMDISK_ADDR: usize = 0x218;
    pub const RAMDISK_LEN: usize = 0x21c;
    pub const CMDLINE: usize = 0x228;
    pub const ALIGNMENT: usize = 0x230;
    pub const CMDLINE_LEN: usize = 0x238;
    pub const SETUP_DATA: usize = 0x250;
    pub const E820: usize = 0x2d0;
}

/// `SETUP_RNG_SEED` (Linux, arch/x86/include/uapi/asm/setup_data.h).
const SETUP_RNG_SEED: u32 = 9;
/// Bytes of a seed: what the kernel credits as fully seeded.
pub const RNG_SEED_LEN: usize = 32;

/// A seed for the kernel's random numbers, to lie at [`layout::RNG_SEED`]. The kernel wipes it once it is used.
pub fn rng_seed(seed: &[u8; RNG_SEED_LEN]) -> Vec<u8> {
    let mut record = 0u64.to_le_bytes().to_vec();
    record.extend(SETUP_RNG_SEED.to_le_bytes());
    record.extend((seed.len() as u32).to_le_bytes());
    record.extend(seed);
    record
}

/// Boot loader type "undefined".
const LOADER_UNDEFINED: u8 = 0xff;

/// The zero page.
pub fn zero_page(ram: u64, initrd: Initrd, cmdline: &[u8], setup_header: Option<&[u8]>) -> Vec<u8> {
    let mut page = vec![0; 4096];
    if let Some(header) = setup_header {
        put(&mut page, zp::SETUP_HEADER, header);
    } else {
        put(&mut page, zp::BOOT_FLAG, &0xaa55u16.to_le_bytes());
        put(&mut page, zp::MAGIC, b"HdrS");
        put(&mut page, zp::ALIGNMENT, &0x100_0000u32.to_le_bytes());
        put(&mut page, zp::CMDLINE_LEN, &(cmdline.len() as u32).to_le_bytes());
    }
    put(&mut page, zp::LOADER, &[LOADER_UNDEFINED]);
    put(&mut page, zp::ACPI_RSDP, &layout::ACPI_RSDP.to_le_bytes());
    put(&mut page, zp::SETUP_DATA, &layout::RNG_SEED.to_le_bytes());
    put(&mut page, zp::CMDLINE, &(layout::CMDLINE as u32).to_le_bytes());
    if let Some((addr, len)) = initrd {
        // Both are below 4 GiB: the initramfs lies in the RAM below the MMIO hole.
        put(&mut page, zp::RAMDISK_ADDR, &(addr as u32).to_le_bytes());
        put(&mut page, zp::RAMDISK_LEN, &(len as u32).to_le_bytes());
    }
    let map = layout::e820(ram);
    page[zp::E820_COUNT] = map.len() as u8;
    for (i, entry) in map.iter().enumerate() {
        let mut bytes = range(entry);
        bytes.extend((entry.kind as u32).to_le_bytes());
        put(&mut page, zp::E820 + i * bytes.len(), &bytes);
    }
    page
}

/// `XEN_HVM_START_MAGIC_VALUE` (Xen, public/arch-x86/hvm/start_info.h).
const PVH_MAGIC: u32 = 0x336e_c578;
/// Version with a memory map.
const PVH_VERSION: u32 = 1;
const PVH_INFO_LEN: u64 = 56;
const PVH_MODULE_LEN: u64 = 32;

/// Xen's start info, its module list and its memory map, to lie at [`layout::PVH_START_INFO`].
pub fn pvh_start_info(ram: u64, initrd: Initrd) -> Vec<u8> {
    let modules = layout::PVH_START_INFO + PVH_INFO_LEN;
    let memmap = modules + PVH_MODULE_LEN;
    let map = layout::e820(ram);
    let mut out = Vec::new();
    let module_count = u32::from(initrd.is_some());
    for word in [PVH_MAGIC, PVH_VERSION, 0, module_count] {
        out.extend(word.to_le_bytes());
    }
    let module_list = if initrd.is_some() { modules } else { 0 };
    for word in [module_list, layout::CMDLINE, layout::ACPI_RSDP, memmap] {
        out.extend(word.to_le_bytes());
    }
    out.extend((map.len() as u32).to_le_bytes());
    out.extend(0u32.to_le_bytes());
    let (addr, len) = initrd.unwrap_or((0, 0));
    for word in [addr, len, 0, 0] {
        out.extend(word.to_le_bytes());
    }
    for entry in &map {
        out.extend(range(entry));
        out.extend((entry.kind as u32).to_le_bytes());
        out.extend(0u32.to_le_bytes());
    }
    out
}

fn range(entry: &E820Entry) -> Vec<u8> {
    [entry.start.to_le_bytes(), entry.len.to_le_bytes()].concat()
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}
