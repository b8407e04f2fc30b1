//! ELF kernels (vmlinux): segments go to their physical addresses.

use vm_memory::GuestMemoryMmap;

use super::{BootEntry, BootError, ElfEntry, Image, Loaded, Protocol};
use crate::layout;

/// Sizes of the ELF64 header and of a program header.
const EHDR_LEN: usize = 64;
const PHDR_LEN: usize = 56;
/// Most program headers that are read; Linux has about five.
const PHDRS_MAX: u16 = 64;
/// Most bytes of a note segment that are read; Linux's is below 1 KiB.
const NOTES_MAX: u64 = 64 << 10;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_X86_64: u16 = 62;
/// Note of type `XEN_ELFNOTE_PHYS32_ENTRY` and name `Xen` (Xen, public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;
/// Linux has no limit of its own for a 64-bit entry, other than that it lies below 4 GiB.
const INITRD_MAX: u64 = u32::MAX as u64;

/// Whether this looks like an ELF file.
pub fn is_elf(kernel: &mut Image<'_>) -> Result<bool, BootError> {
    Ok(kernel.read(0, 4)? == b"\x7fELF")
}

struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

/// Loads the segments; `low_end` is the end of the RAM that starts at 0.
pub fn load(
    ram: &GuestMemoryMmap,
    kernel: &mut Image<'_>,
    low_end: u64,
    choice: ElfEntry,
) -> Result<Loaded, BootError> {
    let (entry, segments) = headers(kernel)?;
    let mut end = 0;
    let mut pvh = None;
    for segment in &segments {
        let in_file = segment.offset.checked_add(segment.filesz).is_some_and(|e| e <= kernel.len);
        match segment.kind {
            PT_LOAD | PT_NOTE if !in_file => {
                return Err(
                    kernel.not_a_kernel("the file is cut short: a segment lies beyond its end")
                );
            }
            PT_NOTE if segment.filesz <= NOTES_MAX => {
                let notes = kernel.read(segment.offset, segment.filesz as usize)?;
                pvh = pvh.or(pvh_entry(&notes));
            }
            PT_LOAD if segment.memsz > 0 => {
                end = end.max(load_segment(ram, kernel, segment, low_end)?);
            }
            _ => {}
        }
    }
    if end == 0 {
        return Err(kernel.not_a_kernel("the ELF file has no loadable segment"));
    }
    let (protocol, rip) = match (choice, pvh) {
        (ElfEntry::Pvh, Some(pvh)) => (Protocol::Pvh, pvh),
        _ => (Protocol::Linux64, entry),
    };
    let covered = |s: &Segment| {
        s.kind == PT_LOAD && (s.paddr..s.paddr.saturating_add(s.filesz)).contains(&rip)
    };
    if !segments.iter().any(covered) {
        return Err(kernel.not_a_kernel(format!("its entry point {rip:#x} lies in no segment")));
    }
    Ok(Loaded {
        entry: BootEntry { protocol, rip },
        end,
        initrd_max: INITRD_MAX,
        cmdline_max: layout::CMDLINE_MAX - 1,
        setup_header: None,
    })
}

fn headers(kernel: &mut Image<'_>) -> Result<(u64, Vec<Segment>), BootError> {
    let ehdr = kernel.read(0, EHDR_LEN)?;
    if ehdr.len() < EHDR_LEN {
        return Err(kernel.not_a_kernel("the ELF header is cut short"));
    }
    let field16 = |at: usize| u16::from_le_bytes([ehdr[at], ehdr[at + 1]]);
    if ehdr[4] != ELFCLASS64 || ehdr[5] != ELFDATA2LSB || field16(18) != EM_X86_64 {
        return Err(kernel.not_a_kernel("the ELF file is not for x86-64"));
    }
    let (count, size) = (field16(56), field16(54));
    if usize::from(size) != PHDR_LEN || count == 0 || count > PHDRS_MAX {
        let reason = format!("the ELF file has {count} program headers of {size} bytes");
        return Err(kernel.not_a_kernel(reason));
    }
    let table_len = usize::from(count) * PHDR_LEN;
    let table = kernel.read(u64_at(&ehdr, 32), table_len)?;
    if table.len() < table_len {
        return Err(kernel.not_a_kernel("the ELF program headers are cut short"));
    }
    let segments = table
        .chunks_exact(PHDR_LEN)
        .map(|p| Segment {
            kind: u32_at(p, 0),
            offset: u64_at(p, 8),
            paddr: u64_at(p, 24),
            filesz: u64_at(p, 32),
            memsz: u64_at(p, 40),
        })
        .collect();
    Ok((u64_at(&ehdr, 24), segments))
}

/// Loads one segment and returns its end.
fn load_segment(
    ram: &GuestMemoryMmap,
    kernel: &mut Image<'_>,
    segment: &Segment,
    low_end: u64,
) -> Result<u64, BootError> {
    let Some(end) = segment.paddr.checked_add(segment.memsz) else {
        return Err(kernel.not_a_kernel("a segment wraps around the address space"));
    };
    if segment.filesz > segment.memsz {
        return Err(kernel.not_a_kernel("a segment is longer in the file than in memory"));
    }
    if segment.paddr < layout::HIGH_RAM_START {
        let reason = format!("a segment wants address {:#x}, below 1 MiB", segment.paddr);
        return Err(kernel.not_a_kernel(reason));
    }
    if end > low_end {
        return Err(BootError::KernelTooBig {
            path: kernel.path.to_owned(),
            end,
            ram_end: low_end,
        });
    }
    kernel.read_to_ram(ram, segment.offset, segment.paddr, segment.filesz)?;
    Ok(end)
}

/// The PVH entry point, if the notes have one. Header, name and description are each padded to four bytes.
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while notes.len() >= 12 {
        let (namesz, descsz, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let padded = |n: u32| usize::try_from(n).ok().and_then(|n| n.checked_next_multiple_of(4));
        let name_end = padded(namesz)?.checked_add(12)?;
        let desc_end = padded(descsz)?.checked_add(name_end)?;
        if desc_end > notes.len() {
            return None;
        }
        if kind == PHYS32_ENTRY && notes[12..name_end] == *b"Xen\0" {
            return match descsz {
                4 => Some(u64::from(u32_at(notes, name_end))),
                8 => Some(u64_at(notes, name_end)).filter(|e| *e <= u64::from(u32::MAX)),
                _ => None,
            };
        }
        notes = &notes[desc_end..];
    }
    None
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |word, byte| (word << 8) | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
