//! ELF kernels (vmlinux): segments go to their physical addresses.

use vm_memory::GuestMemoryMmap;

use super::{BootEntry, BootError, ElfEntry, Image, Loaded, Protocol};
use crate::layout;
use crate::pvm::native::{NOTE_NAME, NOTE_TYPE, NativeKernel, NoteError};

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
    let notes = read_notes(kernel, &segments)?;
    let mut end = 0;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.memsz > 0) {
        end = end.max(load_segment(ram, kernel, segment, low_end)?);
    }
    if end == 0 {
        return Err(kernel.not_a_kernel("the ELF file has no loadable segment"));
    }
    let (protocol, rip) = match (choice, notes.pvh, notes.native) {
        // PVH enters without paging, which a kernel that runs natively on PVM cannot do.
        (ElfEntry::Pvh, Some(pvh), None) => (Protocol::Pvh, pvh),
        _ => (Protocol::Linux64, entry),
    };
    let covered = |s: &Segment| {
        s.kind == PT_LOAD && (s.paddr..s.paddr.saturating_add(s.filesz)).contains(&rip)
    };
    if !segments.iter().any(covered) {
        return Err(kernel.not_a_kernel(format!("its entry point {rip:#x} lies in no segment")));
    }
    Ok(Loaded {
        entry: BootEntry { protocol, rip, control: notes.native.map(|n| n.control) },
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

/// What the notes say that matters here.
#[derive(Default)]
struct Notes {
    /// The PVH entry point.
    pvh: Option<u64>,
    /// The kernel is ours for PVM with native kernel mode.
    native: Option<NativeKernel>,
}

/// What an ELF kernel says of native kernel mode on PVM.
pub fn native_kernel(kernel: &mut Image<'_>) -> Result<Option<NativeKernel>, BootError> {
    let (_, segments) = headers(kernel)?;
    Ok(read_notes(kernel, &segments)?.native)
}

/// Reads all notes. Segments must lie in the file, those to be loaded as well.
fn read_notes(kernel: &mut Image<'_>, segments: &[Segment]) -> Result<Notes, BootError> {
    let mut found = Notes::default();
    for segment in segments.iter().filter(|s| matches!(s.kind, PT_LOAD | PT_NOTE)) {
        if segment.offset.checked_add(segment.filesz).is_none_or(|end| end > kernel.len) {
            return Err(kernel.not_a_kernel("the file is cut short: a segment lies beyond its end"));
        }
        if segment.kind != PT_NOTE || segment.filesz > NOTES_MAX {
            continue;
        }
        let bytes = kernel.read(segment.offset, segment.filesz as usize)?;
        for note in notes(&bytes) {
            match (note.name, note.kind) {
                (b"Xen\0", PHYS32_ENTRY) => found.pvh = found.pvh.or(pvh_entry(note.description)),
                (NOTE_NAME, NOTE_TYPE) if found.native.is_none() => {
                    let native = NativeKernel::parse(note.description);
                    found.native = Some(native.map_err(|e| kernel.note(e))?);
                }
                _ => {}
            }
        }
    }
    if let Some(native) = found.native {
        check_vif_page(native, segments).map_err(|e| kernel.note(e))?;
    }
    Ok(found)
}

/// The page that the host is to share with the kernel must be the kernel's.
fn check_vif_page(native: NativeKernel, segments: &[Segment]) -> Result<(), NoteError> {
    let page = native.vif_page();
    let holds = |s: &Segment| {
        let end = s.paddr.saturating_add(s.memsz);
        s.kind == PT_LOAD
            && s.paddr <= page
            && page.checked_add(NativeKernel::VIF_LEN).is_some_and(|e| e <= end)
    };
    if segments.iter().any(holds) { Ok(()) } else { Err(NoteError::VifPage(page)) }
}

/// One ELF note.
struct Note<'a> {
    kind: u32,
    /// With its NUL.
    name: &'a [u8],
    description: &'a [u8],
}

/// The notes in a segment, up to the first that is cut short. Header, name and description are each padded to four
/// bytes.
fn notes(mut bytes: &[u8]) -> impl Iterator<Item = Note<'_>> {
    std::iter::from_fn(move || {
        let (head, rest) = bytes.split_at_checked(12)?;
        let len = |at| usize::try_from(u32_at(head, at)).ok();
        let (name_len, description_len) = (len(0)?, len(4)?);
        let (name, rest) = rest.split_at_checked(name_len.checked_next_multiple_of(4)?)?;
        let padded = description_len.checked_next_multiple_of(4)?;
        // The last one's padding may be missing.
        let description = rest.get(..description_len)?;
        bytes = rest.get(padded..).unwrap_or_default();
        Some(Note { kind: u32_at(head, 8), name: name.get(..name_len)?, description })
    })
}

/// The entry point that a PVH note has: 4 or 8 bytes.
fn pvh_entry(description: &[u8]) -> Option<u64> {
    match description.len() {
        4 => Some(u64::from(u32_at(description, 0))),
        8 => Some(u64_at(description, 0)).filter(|e| *e <= u64::from(u32::MAX)),
        _ => None,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |word, byte| (word << 8) | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
