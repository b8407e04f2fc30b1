//! Putting a kernel into a new VM's RAM.
//!
//! [`load`] reads a kernel image and an initramfs into RAM, writes what the boot protocol wants beside them (memory
//! map, command line, page tables, descriptors, ACPI tables, MP table), and returns where the first vCPU starts.
//! Three kinds of entry:
//!
//! | image | entry | state of the CPU |
//! |---|---|---|
//! | ELF (vmlinux) | `e_entry`, Linux's 64-bit protocol | long mode, identity map of 4 GiB |
//! | ELF with a PVH note | the note's address, Xen's PVH protocol | 32-bit protected mode, no paging |
//! | bzImage | 0x200 beyond its start, Linux's 64-bit protocol | as the first |
//!
//! An ELF kernel may be our flavour for PVM with native kernel mode, which a note tells ([`native_kernel`]): it is entered by
//! the first protocol, with pages that are the user's to the CPU.
//!
//! RAM must read as zeroes: nothing is cleared, so that no page is touched in vain.

pub mod acpi;
mod bzimage;
mod elf;
mod mptable;
mod params;
pub(crate) mod registers;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;
use crate::mode::GuestMode;
use crate::pvm::native::{NativeKernel, NoteError};

pub use acpi::AcpiError;

/// What to boot.
#[derive(Debug, Clone, Copy)]
pub struct LoadArgs<'a> {
    /// Kernel: ELF or bzImage.
    pub kernel: &'a Path,
    /// Initramfs.
    pub initrd: Option<&'a Path>,
    /// Command line, at most [`layout::CMDLINE_MAX`] bytes with its NUL.
    pub cmdline: &'a str,
    /// Number of vCPUs, 1 to [`layout::MAX_VCPUS`].
    pub vcpus: u8,
    /// The virtio-mmio slots that are occupied; ACPI tells the guest of each. See [`layout::virtio_mmio_addr`].
    pub virtio_slots: &'a [u8],
    /// Describe the generation id at [`layout::VMGENID_PAGE`] and the event device that announces a new one.
    pub vmgenid: bool,
    /// How to enter an ELF kernel.
    pub entry: ElfEntry,
    /// How the VM runs kernel mode: as [`crate::Host::mode_for`] said of this kernel.
    pub mode: GuestMode,
}

/// How to enter an ELF kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ElfEntry {
    /// Its ELF entry point by the 64-bit protocol: fewest instructions before the kernel proper.
    #[default]
    Linux64,
    /// Its PVH entry if it has one, else as above.
    Pvh,
}

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootEntry {
    /// State of the CPU.
    pub protocol: Protocol,
    /// First instruction's physical address.
    pub rip: u64,
    /// Of a kernel that runs natively on PVM: [`crate::pvm::native::MSR_CONTROL`] before the first instruction.
    pub control: Option<u64>,
}

/// Boot protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Linux, Documentation/arch/x86/boot.rst, "64-bit boot protocol".
    Linux64,
    /// Xen, docs/misc/pvh.pandoc.
    Pvh,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {}: {source}", .path.display())]
    File {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a kernel that can be booted.
    #[error("kernel {}: {reason}; give an x86-64 vmlinux (ELF) or bzImage", .path.display())]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The kernel's note on PVM is of no use.
    #[error("kernel {}: {source}", .path.display())]
    Note {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: NoteError,
    },
    /// The file is another than the one that the mode was chosen for.
    #[error("kernel {}: has changed since it was first looked at: try again", .path.display())]
    Changed {
        /// Its path.
        path: PathBuf,
    },
    /// The kernel does not fit.
    #[error("kernel {}: needs RAM up to {end:#x}, but the VM's ends at {ram_end:#x}: give it more memory", .path.display())]
    KernelTooBig {
        /// Its path.
        path: PathBuf,
        /// First address beyond the kernel.
        end: u64,
        /// First address beyond the RAM below 4 GiB.
        ram_end: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error(
        "initramfs {}: {len} bytes do not fit between the kernel's end at {kernel_end:#x} and {limit:#x}: give \
         the VM more memory or make it smaller", .path.display()
    )]
    InitrdTooBig {
        /// Its path.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// First address beyond the kernel.
        kernel_end: u64,
        /// First address beyond what it may occupy.
        limit: u64,
    },
    /// The host gave no random bytes.
    #[error("no random seed for the guest: {0}")]
    Random(io::Error),
    /// The command line is too long.
    #[error("kernel command line: {len} bytes, at most {max} are allowed: \"{start}...\"")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// Longest allowed.
        max: usize,
        /// How it begins.
        start: String,
    },
    /// The command line has a byte that it must not have.
    #[error("kernel command line: byte {byte:#04x} at position {at} is not printable ASCII")]
    CmdlineByte {
        /// The byte.
        byte: u8,
        /// Its position.
        at: usize,
    },
    /// Too little RAM, or RAM that does not begin at 0.
    #[error("{len} bytes of RAM at guest address 0: at least {} are needed", layout::MIN_RAM)]
    NoRam {
        /// What there is.
        len: u64,
    },
    /// ACPI tables cannot be made.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs: must be 1 to {most}", most = layout::MAX_VCPUS)]
    Vcpus(u8),
    /// RAM cannot be written.
    #[error("writing {what} to guest RAM: {source}")]
    Ram {
        /// What was to be written.
        what: &'static str,
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
}

/// A kernel that has been loaded.
pub(crate) struct Loaded {
    entry: BootEntry,
    /// First address beyond what the kernel needs to start.
    end: u64,
    /// Last address that the initramfs may occupy.
    initrd_max: u64,
    /// Longest command line, without NUL.
    cmdline_max: usize,
    /// The setup header from a bzImage, which goes into the boot params: from 0x1f1 on.
    setup_header: Option<Vec<u8>>,
}

/// An initramfs that has been loaded: address and length in bytes.
pub(crate) type Initrd = Option<(u64, u64)>;

/// Puts a kernel, an initramfs and the boot protocol's tables into `ram`.
///
/// # Errors
///
/// Each names the file or the limit.
pub fn load(ram: &GuestMemoryMmap, args: &LoadArgs<'_>) -> Result<BootEntry, BootError> {
    if args.vcpus == 0 || args.vcpus > layout::MAX_VCPUS {
        return Err(BootError::Vcpus(args.vcpus));
    }
    let len = ram_len(ram);
    if len < layout::MIN_RAM {
        return Err(BootError::NoRam { len });
    }
    let low_end = len.min(layout::MMIO_HOLE_START);
    let mut kernel = Image::open("kernel", args.kernel)?;
    let loaded = if elf::is_elf(&mut kernel)? {
        elf::load(ram, &mut kernel, low_end, args.entry)?
    } else {
        bzimage::load(ram, &mut kernel, low_end)?
    };
    if loaded.entry.control.is_some() != (args.mode == GuestMode::PvmNative) {
        return Err(BootError::Changed { path: args.kernel.to_owned() });
    }
    let cmdline = check_cmdline(args.cmdline, loaded.cmdline_max)?;
    let initrd = load_initrd(ram, args.initrd, &loaded, low_end)?;

    write(ram, "the command line", layout::CMDLINE, &cmdline)?;
    let tables = acpi::build(args.vcpus, args.virtio_slots, args.vmgenid)?;
    write(ram, "ACPI tables", layout::ACPI_RSDP, &tables)?;
    write(ram, "the MP table", layout::MP_TABLE, &mptable::build(args.vcpus))?;
    registers::write_descriptors(ram)?;
    match loaded.entry.protocol {
        Protocol::Linux64 => {
            registers::write_page_tables(ram, args.mode)?;
            let zero_page =
                params::zero_page(len, initrd, &cmdline, loaded.setup_header.as_deref());
            write(ram, "boot params", layout::BOOT_PARAMS, &zero_page)?;
            let mut seed = [0; params::RNG_SEED_LEN];
            forkd_sys::random::fill(&mut seed).map_err(BootError::Random)?;
            write(ram, "the random seed", layout::RNG_SEED, &params::rng_seed(&seed))?;
        }
        Protocol::Pvh => {
            let info = params::pvh_start_info(len, initrd);
            write(ram, "PVH start info", layout::PVH_START_INFO, &info)?;
        }
    }
    Ok(loaded.entry)
}

/// Whether the kernel in a file is our flavour for PVM with native kernel mode, and what it says of itself. None for
/// any other file, also for one that is no kernel: [`load`] will say so.
///
/// # Errors
///
/// The file cannot be read, or its note is of no use.
pub fn native_kernel(path: &Path) -> Result<Option<NativeKernel>, BootError> {
    let mut kernel = Image::open("kernel", path)?;
    if elf::is_elf(&mut kernel)? { elf::native_kernel(&mut kernel) } else { Ok(None) }
}

/// Length of the RAM in `ram`: the regions at 0 and at 4 GiB. What else it holds (pmem) is not RAM.
fn ram_len(ram: &GuestMemoryMmap) -> u64 {
    let region_at = |start: u64| {
        ram.iter().find(|r| r.start_addr() == GuestAddress(start)).map_or(0, GuestMemoryRegion::len)
    };
    region_at(0) + region_at(layout::RAM_ABOVE_4G)
}

fn write(
    ram: &GuestMemoryMmap,
    what: &'static str,
    addr: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(addr)).map_err(|source| BootError::Ram { what, source })
}

/// The command line with its NUL, if it may be given to the kernel.
fn check_cmdline(cmdline: &str, kernel_max: usize) -> Result<Vec<u8>, BootError> {
    let max = kernel_max.min(layout::CMDLINE_MAX - 1);
    if cmdline.len() > max {
        let start = cmdline.chars().take(60).collect();
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), max, start });
    }
    if let Some((at, byte)) = cmdline.bytes().enumerate().find(|(_, b)| !(0x20..0x7f).contains(b)) {
        return Err(BootError::CmdlineByte { byte, at });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

/// As high below the kernel's limit as it fits, on a page boundary.
fn load_initrd(
    ram: &GuestMemoryMmap,
    path: Option<&Path>,
    loaded: &Loaded,
    low_end: u64,
) -> Result<Initrd, BootError> {
    let Some(path) = path else { return Ok(None) };
    let mut image = Image::open("initramfs", path)?;
    let limit = low_end.min(loaded.initrd_max.saturating_add(1));
    let start = limit.checked_sub(image.len).map(|s| s & !0xfff);
    let Some(start) = start.filter(|s| *s >= loaded.end) else {
        return Err(BootError::InitrdTooBig {
            path: path.to_owned(),
            len: image.len,
            kernel_end: loaded.end,
            limit,
        });
    };
    let len = image.len;
    image.read_to_ram(ram, 0, start, len)?;
    Ok(Some((start, len)))
}

/// A file that is read into RAM, with its name for error messages.
pub(crate) struct Image<'a> {
    what: &'static str,
    path: &'a Path,
    file: File,
    len: u64,
}

impl<'a> Image<'a> {
    fn open(what: &'static str, path: &'a Path) -> Result<Self, BootError> {
        let fail = |source| BootError::File { what, path: path.to_owned(), source };
        let file = File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        Ok(Self { what, path, file, len: meta.len() })
    }

    fn error(&self, source: io::Error) -> BootError {
        BootError::File { what: self.what, path: self.path.to_owned(), source }
    }

    fn note(&self, source: NoteError) -> BootError {
        BootError::Note { path: self.path.to_owned(), source }
    }

    fn not_a_kernel(&self, reason: impl Into<String>) -> BootError {
        BootError::NotAKernel { path: self.path.to_owned(), reason: reason.into() }
    }

    /// Up to `len` bytes from `offset`; fewer at the file's end.
    fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, BootError> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match self.file.read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error(e)),
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// Reads `len` bytes from `offset` to RAM at `addr`.
    fn read_to_ram(
        &mut self,
        ram: &GuestMemoryMmap,
        offset: u64,
        addr: u64,
        len: u64,
    ) -> Result<(), BootError> {
        use std::io::Seek;
        self.file.seek(io::SeekFrom::Start(offset)).map_err(|e| self.error(e))?;
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        ram.read_exact_volatile_from(GuestAddress(addr), &mut self.file, count)
            .map_err(|source| BootError::Ram { what: self.what, source })
    }
}

#[cfg(test)]
mod tests;
