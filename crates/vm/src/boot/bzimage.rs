//! bzImages: a setup part, whose header says what the kernel wants, then the compressed kernel, which
//! unpacks itself. (Linux, Documentation/arch/x86/boot.rst)

use vm_memory::GuestMemoryMmap;

use super::{BootEntry, BootError, Image, Loaded, Protocol};
use crate::layout;

/// Where the setup header starts, in the file and in the boot params.
pub const HEADER_START: usize = 0x1f1;
/// First byte that the header may not reach.
const HEADER_MAX: usize = 0x290;
/// First version with `xloadflags`.
const VERSION_64: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode code belongs at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// Loads the kernel at the address it prefers; `low_end` is the end of the RAM that starts at 0.
pub fn load(
    ram: &GuestMemoryMmap,
    kernel: &mut Image<'_>,
    low_end: u64,
) -> Result<Loaded, BootError> {
    let head = kernel.read(0, HEADER_MAX)?;
    if head.len() < HEADER_MAX || head[0x202..0x206] != *b"HdrS" {
        return Err(kernel.not_a_kernel("neither ELF nor bzImage"));
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let version = u16_at(0x206);
    if version < VERSION_64 || u16_at(0x236) & XLF_KERNEL_64 == 0 {
        let reason = format!(
            "this bzImage (boot protocol {}.{}) has no 64-bit entry",
            version >> 8,
            version & 0xff
        );
        return Err(kernel.not_a_kernel(reason));
    }
    if head[0x211] & LOADED_HIGH == 0 {
        return Err(kernel.not_a_kernel("this is a zImage, not a bzImage"));
    }
    let setup_sectors = match head[HEADER_START] {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (setup_sectors + 1) * SECTOR;
    let len = kernel.len.checked_sub(offset).filter(|l| *l > ENTRY_64);
    let Some(len) = len else {
        return Err(kernel.not_a_kernel("the bzImage is cut short"));
    };
    let start = u64::from(u32_at(0x258)) | u64::from(u32_at(0x25c)) << 32;
    let init_size = u64::from(u32_at(0x260));
    if start < layout::HIGH_RAM_START {
        return Err(kernel.not_a_kernel(format!("it wants address {start:#x}, below 1 MiB")));
    }
    let end = start.saturating_add(init_size.max(len));
    if end > low_end {
        return Err(BootError::KernelTooBig {
            path: kernel.path.to_owned(),
            end,
            ram_end: low_end,
        });
    }
    kernel.read_to_ram(ram, offset, start, len)?;
    // The byte before the magic is a short jump over the header: its operand tells where the header ends.
    let header_end = (0x202 + usize::from(head[0x201])).min(HEADER_MAX);
    Ok(Loaded {
        entry: BootEntry { protocol: Protocol::Linux64, rip: start + ENTRY_64, control: None },
        end,
        initrd_max: u64::from(u32_at(0x22c)),
        cmdline_max: u32_at(0x238) as usize,
        setup_header: Some(head[HEADER_START..header_end].to_vec()),
    })
}
