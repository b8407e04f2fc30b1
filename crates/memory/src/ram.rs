//! A guest's RAM as a whole.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkd_sys::mmap::Mapping;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::MemoryError;
use crate::backend::{
    Anonymous, Backend, BranchMode, FileBacked, FileExtent, ForkBehaviour, Memfd, MemoryBackend,
    PageSource, Sharing, Userfault, WorkingSet,
};
use crate::layout::{MMIO_HOLE_END, layout};
use crate::memfd::MemfdRegion;

/// Most RAM of a guest, in MiB.
pub const MAX_MEM_MIB: u32 = 65_536;

const MIB: u64 = 1 << 20;

/// How to make anonymous RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnonOptions {
    /// Use transparent huge pages.
    pub thp: bool,
}

impl Default for AnonOptions {
    fn default() -> Self {
        Self { thp: true }
    }
}

/// One region of RAM: what KVM calls a memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Number of the memory slot, from 0.
    pub slot: u32,
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// First address in this process, and in every process forked from it.
    pub host_addr: u64,
}

impl Region {
    fn contains(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_sub(self.gpa)
            .and_then(|offset| offset.checked_add(len))
            .is_some_and(|end| end <= self.len)
    }
}

/// A guest's RAM.
///
/// It may be used from any thread, and by a forked child at the same addresses. Clones of
/// [`Self::guest`] stay valid for as long as they live: if there are any when this value is dropped,
/// RAM stays mapped until the process ends, which for a VM process is how it is meant.
#[derive(Debug)]
pub struct GuestRam {
    guest: GuestMemoryMmap,
    /// The regions of `guest`, to see whether others still hold them.
    views: Vec<Arc<GuestRegionMmap>>,
    regions: Vec<Region>,
    backend: ManuallyDrop<Box<dyn Backend>>,
    mem_mib: u32,
    /// What was advised last.
    small_pages: AtomicBool,
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        self.guest = GuestMemoryMmap::new();
        // `Arc::into_inner` gives the value to the last holder only. A region shares its mapping's
        // description with whoever asked for it, which counts as well.
        let unused = self.views.drain(..).all(|view| {
            Arc::into_inner(view)
                .map(|region| region.get_mmap())
                .is_some_and(|mmap| Arc::into_inner(mmap).is_some())
        });
        if unused {
            // SAFETY: this is drop, and the backend is used nowhere after it.
            unsafe { ManuallyDrop::drop(&mut self.backend) };
        }
    }
}

impl GuestRam {
    /// Anonymous RAM: zeroed, private, copied on write by fork(2).
    ///
    /// # Errors
    /// [`MemoryError::Size`] for 0 or more than [`MAX_MEM_MIB`]; [`MemoryError::HostTooSmall`] for
    /// more than the host has available; [`MemoryError::Map`].
    pub fn anonymous(mem_mib: u32, options: AnonOptions) -> Result<Self, MemoryError> {
        let len = checked_len(mem_mib)?;
        let available_mib = host_available_mib().map_err(MemoryError::HostMemory)?;
        if u64::from(mem_mib) > available_mib {
            return Err(MemoryError::HostTooSmall { mem_mib, available_mib });
        }
        let backend = Anonymous::new(len, options.thp)
            .map_err(|source| MemoryError::Map { mem_mib, source })?;
        let mut ram = Self::over(Box::new(backend), mem_mib)?;
        *ram.small_pages.get_mut() = !options.thp;
        Ok(ram)
    }

    /// RAM from the memory files of a snapshot, mapped privately: `extents` say which bytes of which
    /// of `files` are where; the rest is zero. See [`FileBacked`]. The files need be open for reading
    /// only, and may be closed afterwards. `data` is where the extents have something, as offsets in RAM, ascending:
    /// elsewhere they are holes that read as zeroes. It is what [`Self::backed`] tells.
    ///
    /// # Errors
    /// [`MemoryError::Size`]; those of [`FileBacked::new`].
    pub fn from_file(
        mem_mib: u32,
        files: &[File],
        extents: &[FileExtent],
        data: Vec<Range<u64>>,
    ) -> Result<Self, MemoryError> {
        let backend = FileBacked::new(checked_len(mem_mib)?, files, extents, data)?;
        Self::over(Box::new(backend), mem_mib)
    }

    /// RAM in a memfd, which must have exactly that size. See [`Memfd`] for what sharing means.
    ///
    /// # Errors
    /// [`MemoryError::Size`]; those of [`Memfd::new`].
    pub fn memfd(mem_mib: u32, region: MemfdRegion, sharing: Sharing) -> Result<Self, MemoryError> {
        let backend = Memfd::new(checked_len(mem_mib)?, region, sharing)?;
        Self::over(Box::new(backend), mem_mib)
    }

    /// RAM that is loaded from `source` as it is touched, what is in `working_set` ahead. See
    /// [`Userfault`], which [`Self::lazy`] gives.
    ///
    /// # Errors
    /// [`MemoryError::Size`]; those of [`Userfault::new`].
    pub fn userfault(
        mem_mib: u32,
        source: Box<dyn PageSource>,
        working_set: Option<WorkingSet>,
    ) -> Result<Self, MemoryError> {
        let backend = Userfault::new(checked_len(mem_mib)?, source, working_set)?;
        Self::over(Box::new(backend), mem_mib)
    }

    fn over(backend: Box<dyn Backend>, mem_mib: u32) -> Result<Self, MemoryError> {
        let mapping = backend.mapping();
        let shared = backend.fork_behaviour() == ForkBehaviour::Shared;
        let mut regions = Vec::with_capacity(2);
        let mut views = Vec::with_capacity(2);
        let mut offset = 0u64;
        for (slot, (gpa, len)) in (0..).zip(layout(mapping.len() as u64)) {
            views.push(Arc::new(view(mapping, shared, offset, gpa, len)?));
            regions.push(Region { slot, gpa, len, host_addr: mapping.address() as u64 + offset });
            offset += len;
        }
        let guest = GuestMemoryMmap::from_arc_regions(views.clone())
            .map_err(|error| MemoryError::AddressSpace(error.to_string()))?;
        let (backend, small_pages) = (ManuallyDrop::new(backend), AtomicBool::new(false));
        Ok(Self { guest, views, regions, backend, mem_mib, small_pages })
    }

    /// RAM as devices and loaders see it. A clone is cheap and means the same memory.
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// The regions, ascending, for KVM's memory slots.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = Region> + '_ {
        self.regions.iter().copied()
    }

    /// Size in MiB.
    pub fn mem_mib(&self) -> u32 {
        self.mem_mib
    }

    /// Whether `len` bytes from `gpa` lie within one region.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.regions.iter().any(|region| region.contains(gpa, len))
    }

    /// First guest-physical address after the last region.
    pub fn end_gpa(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.gpa + region.len)
    }

    /// First guest-physical address above both RAM and the MMIO hole that is a multiple of `align`,
    /// a power of two: where pmem may go.
    pub fn free_gpa_above(&self, align: u64) -> u64 {
        self.end_gpa().max(MMIO_HOLE_END).next_multiple_of(align.max(1))
    }

    /// Where it comes from.
    pub fn kind(&self) -> MemoryBackend {
        self.backend.kind()
    }

    /// Name of the backend.
    pub fn backend_name(&self) -> &'static str {
        self.backend.kind().name()
    }

    /// The memfd that RAM is in, or was copied from.
    pub fn memfd_region(&self) -> Option<&MemfdRegion> {
        self.backend.memfd()
    }

    /// The parts of RAM that may hold bytes of which this process's page tables do not tell: offsets from the start of
    /// RAM (no guest-physical addresses), ascending. What is in none of them and was never touched here is zero.
    ///
    /// # Errors
    /// The memfd that it is in cannot be asked.
    pub fn backed(&self) -> io::Result<Vec<Range<u64>>> {
        self.backend.backed()
    }

    /// The controls of RAM that is loaded as it is touched; `None` for any other.
    pub fn lazy(&self) -> Option<&Userfault> {
        self.backend.userfault()
    }

    /// The modes in which a VM with this RAM can be branched now, the preferred one first.
    pub fn branch_modes(&self) -> &'static [BranchMode] {
        self.backend.branch_modes()
    }

    /// Why the VM cannot be branched in that mode now, and what to do instead; `None` if it can.
    pub fn why_not(&self, mode: BranchMode) -> Option<&'static str> {
        self.backend.why_not(mode)
    }

    /// Whether fork(2) now gives a child RAM of its own: to be asked before forking a VM.
    ///
    /// # Errors
    /// [`MemoryError::NotForkable`] says why not, and what to do instead.
    pub fn check_fork(&self) -> Result<(), MemoryError> {
        self.backend.check_fork()
    }

    /// What fork(2) does to this RAM.
    pub fn fork_behaviour(&self) -> ForkBehaviour {
        self.backend.fork_behaviour()
    }

    /// Called in a forked child before anything touches RAM.
    ///
    /// # Errors
    /// The child cannot have RAM of its own; it must end.
    pub fn detach_child(&mut self) -> Result<(), MemoryError> {
        self.backend.detach_child()
    }

    /// Asks the kernel to make no more huge pages here: what a zygote's child wants, where a write
    /// should copy 4 KiB. Huge pages that are there stay until written to.
    ///
    /// # Errors
    /// [`MemoryError::Advise`]; not for a kernel without huge pages.
    pub fn prefer_small_pages(&self) -> Result<(), MemoryError> {
        self.advise_all("ask for small pages in", Mapping::advise_small_pages)?;
        self.small_pages.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether [`Self::prefer_small_pages`] is what was asked last.
    pub fn prefers_small_pages(&self) -> bool {
        self.small_pages.load(Ordering::Relaxed)
    }

    /// Whether small pages can be made huge ones ([`crate::collapse`]): of private memory without a file. A userfault
    /// that waits for pages keeps the kernel from it, so all has to be loaded.
    pub fn can_collapse(&self) -> bool {
        match self.kind() {
            MemoryBackend::Anonymous => true,
            MemoryBackend::Userfault => self.check_fork().is_ok(),
            _ => false,
        }
    }

    /// Asks the kernel to use huge pages here: what a booting VM wants.
    ///
    /// # Errors
    /// [`MemoryError::Advise`]; not for a kernel without huge pages.
    pub fn prefer_huge_pages(&self) -> Result<(), MemoryError> {
        self.advise_all("ask for huge pages in", Mapping::advise_huge_pages)?;
        self.small_pages.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the pages of a range present and writable now, so that the guest's first writes do not
    /// fault. In a forked child this copies the pages that it shares. The range is widened to whole
    /// pages.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] unless the range lies within one region; [`MemoryError::Advise`].
    pub fn populate_write(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let page = forkd_sys::mmap::page_size() as u64;
        let start = gpa - gpa % page;
        let end = gpa.checked_add(len).and_then(|end| end.checked_next_multiple_of(page));
        let len = end.ok_or(MemoryError::NotRam { gpa, len })? - start;
        self.advise("populate", start, len, |ram, at, len| ram.populate_write(at, len))
    }

    /// Gives the pages of a range back to the host; the guest reads zeroes there afterwards. Only
    /// whole pages within the range are given back.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] unless the range lies within one region; [`MemoryError::Advise`].
    pub fn discard(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let page = forkd_sys::mmap::page_size() as u64;
        self.offset_of(gpa, len)?;
        // Both within RAM, which is far from the end of u64.
        let start = gpa.next_multiple_of(page);
        let end = (gpa + len) - (gpa + len) % page;
        if end <= start {
            return Ok(());
        }
        self.advise("discard", start, end - start, |ram, at, len| ram.discard(at, len))
    }

    fn offset_of(&self, gpa: u64, len: u64) -> Result<u64, MemoryError> {
        let region = self.regions.iter().find(|region| region.contains(gpa, len));
        let region = region.ok_or(MemoryError::NotRam { gpa, len })?;
        Ok(region.host_addr - self.backend.mapping().address() as u64 + (gpa - region.gpa))
    }

    fn advise(
        &self,
        action: &'static str,
        gpa: u64,
        len: u64,
        call: impl FnOnce(&dyn Backend, usize, usize) -> io::Result<()>,
    ) -> Result<(), MemoryError> {
        let not_ram = |_| MemoryError::NotRam { gpa, len };
        let offset = usize::try_from(self.offset_of(gpa, len)?).map_err(not_ram)?;
        let bytes = usize::try_from(len).map_err(not_ram)?;
        call(&**self.backend, offset, bytes).map_err(|source| MemoryError::Advise {
            action,
            gpa,
            len,
            source,
        })
    }

    fn advise_all(
        &self,
        action: &'static str,
        call: impl FnOnce(&Mapping) -> io::Result<()>,
    ) -> Result<(), MemoryError> {
        match call(self.backend.mapping()) {
            // EINVAL: a kernel without transparent huge pages, or memory that is huge pages anyway.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            Err(source) => Err(MemoryError::Advise { action, gpa: 0, len: self.end_gpa(), source }),
            Ok(()) => Ok(()),
        }
    }
}

fn checked_len(mem_mib: u32) -> Result<usize, MemoryError> {
    let wrong = MemoryError::Size { mem_mib, max_mib: MAX_MEM_MIB };
    if mem_mib == 0 || mem_mib > MAX_MEM_MIB {
        return Err(wrong);
    }
    usize::try_from(u64::from(mem_mib) * MIB).map_err(|_| wrong)
}

/// `len` bytes of the mapping from `offset` as a region of vm-memory at `gpa`, which does not own
/// them.
fn view(
    mapping: &Mapping,
    shared: bool,
    offset: u64,
    gpa: u64,
    len: u64,
) -> Result<GuestRegionMmap, MemoryError> {
    let fault = |text: String| MemoryError::AddressSpace(text);
    let offset = usize::try_from(offset).map_err(|e| fault(e.to_string()))?;
    let len = usize::try_from(len).map_err(|e| fault(e.to_string()))?;
    if offset.checked_add(len).is_none_or(|end| end > mapping.len()) {
        return Err(fault(format!("a region of {len:#x} bytes at {offset:#x} exceeds RAM")));
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // Of these, vm-memory looks at the sharing only. Private RAM may be of several mappings, of files
    // and of none: all that is true of it as a whole is said.
    let sharing = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let flags = sharing | libc::MAP_NORESERVE;
    // SAFETY: offset and length are within the mapping (checked above), which is readable and
    // writable. It stays mapped while any holder of the view lives: see GuestRam's drop. (On an
    // error before a GuestRam exists, the views are dropped with it and nobody has had them.)
    let region = unsafe {
        MmapRegion::<()>::build_raw(mapping.as_ptr().add(offset), len, protection, flags)
    };
    let region = region.map_err(|error| fault(error.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(gpa))
        .ok_or_else(|| fault(format!("a region of {len:#x} bytes at {gpa:#x} wraps around")))
}

/// What the host can give without swapping: `MemAvailable` of /proc/meminfo, in MiB.
///
/// # Errors
/// It cannot be read, or has no such line.
pub fn host_available_mib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    parse_available_mib(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no MemAvailable line"))
}

fn parse_available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_sys::fork::{Fork, exit_now, fork};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn ram(mem_mib: u32) -> GuestRam {
        GuestRam::anonymous(mem_mib, AnonOptions::default()).expect("RAM")
    }

    #[test]
    fn the_guest_sees_all_of_it_and_no_more() {
        let ram = ram(64);
        assert_eq!(ram.end_gpa(), 64 * MIB);
        assert_eq!(ram.guest().last_addr(), GuestAddress(64 * MIB - 1));
        let last = GuestAddress(64 * MIB - 8);
        ram.guest().write_obj(0x1122_3344_5566_7788u64, last).expect("the last bytes");
        assert_eq!(ram.guest().read_obj::<u64>(last).expect("read"), 0x1122_3344_5566_7788);
        assert!(ram.guest().write_obj(1u64, GuestAddress(64 * MIB - 7)).is_err());
        assert_eq!(ram.free_gpa_above(1 << 30), 4 << 30);
    }

    #[test]
    fn ram_goes_on_above_the_hole() {
        let ram = ram(3 * 1024 + 64);
        let regions: Vec<Region> = ram.regions().collect();
        assert_eq!(regions.len(), 2);
        assert_eq!((regions[1].slot, regions[1].gpa, regions[1].len), (1, 4 << 30, 64 * MIB));
        assert_eq!(regions[1].host_addr, regions[0].host_addr + regions[0].len);
        ram.guest().write_obj(7u8, GuestAddress((4 << 30) + 64 * MIB - 1)).expect("last byte");
        assert!(ram.guest().write_obj(7u8, GuestAddress(3 << 30)).is_err(), "the hole is no RAM");
        assert!(matches!(
            ram.discard((3 << 30) - 4096, 8192),
            Err(MemoryError::NotRam { gpa: 0xbfff_f000, len: 8192 })
        ));
        assert_eq!(ram.free_gpa_above(1 << 30), 5 << 30);
    }

    fn is_mapped(address: u64) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        maps.lines().any(|line| {
            let mut ends = line.split([' ', '-']).map(|hex| u64::from_str_radix(hex, 16));
            matches!((ends.next(), ends.next()), (Some(Ok(a)), Some(Ok(b))) if (a..b).contains(&address))
        })
    }

    #[test]
    fn ram_outlives_its_owner_while_it_is_seen() {
        let ram = ram(64);
        let address = ram.regions[0].host_addr;
        let seen = ram.guest().clone();
        drop(ram);
        assert!(is_mapped(address));
        seen.write_obj(5u8, GuestAddress(77)).expect("still there");
    }

    #[test]
    fn ram_is_unmapped_when_nobody_sees_it() {
        // In a child of one thread, so that nothing is mapped in its place in between.
        // SAFETY: the child maps, unmaps, reads a file and ends by _exit.
        match unsafe { fork() }.expect("fork") {
            Fork::Child => {
                let Ok(ram) = GuestRam::anonymous(64, AnonOptions::default()) else { exit_now(1) };
                let address = ram.regions[0].host_addr + 32 * MIB;
                if !is_mapped(address) {
                    exit_now(2);
                }
                drop(ram.guest().clone());
                drop(ram);
                exit_now(if is_mapped(address) { 3 } else { 0 });
            }
            Fork::Parent(mut child) => {
                assert_eq!(child.wait().expect("wait").code(), Some(0));
            }
        }
    }

    #[test]
    fn a_fork_shares_until_written() {
        let mut ram = ram(64);
        let at = GuestAddress(0x1000);
        ram.guest().write_obj(1u32, at).expect("write");
        let (host, mut pipe) = (ram.regions[0].host_addr, std::io::pipe().expect("a pipe"));
        // SAFETY: the child touches RAM and its pipe, and ends by _exit.
        match unsafe { fork() }.expect("fork") {
            Fork::Child => {
                let seen = ram.guest().read_obj::<u32>(at).unwrap_or(0);
                let wrote = ram.detach_child().is_ok() && ram.guest().write_obj(2u32, at).is_ok();
                let same = ram.regions[0].host_addr == host;
                use std::io::Write;
                let told = pipe.1.write_all(&[1]).is_ok();
                exit_now(if seen == 1 && wrote && same && told { 0 } else { 1 });
            }
            Fork::Parent(mut child) => {
                use std::io::Read;
                pipe.0.read_exact(&mut [0]).expect("the child wrote");
                assert_eq!(ram.guest().read_obj::<u32>(at).expect("read"), 1);
                assert_eq!(child.wait().expect("wait").code(), Some(0));
            }
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for bad in [0, MAX_MEM_MIB + 1, u32::MAX] {
            let error = GuestRam::anonymous(bad, AnonOptions::default()).expect_err("refused");
            assert!(matches!(error, MemoryError::Size { mem_mib, .. } if mem_mib == bad));
        }
        let available = host_available_mib().expect("meminfo");
        if let Ok(more) = u32::try_from(available + 4096)
            && more <= MAX_MEM_MIB
        {
            let error = GuestRam::anonymous(more, AnonOptions::default()).expect_err("refused");
            assert!(error.to_string().contains(&more.to_string()), "{error}");
            assert!(matches!(error, MemoryError::HostTooSmall { .. }), "{error}");
        }
    }

    #[test]
    fn populated_discarded_and_advised() {
        let ram = GuestRam::anonymous(16, AnonOptions { thp: false }).expect("RAM");
        ram.populate_write(5, 4096).expect("widened to two pages");
        ram.guest().write_obj(9u8, GuestAddress(4096)).expect("write");
        ram.guest().write_obj(9u8, GuestAddress(100)).expect("write");
        ram.discard(1, 8191).expect("discard");
        assert_eq!(ram.guest().read_obj::<u8>(GuestAddress(4096)).expect("read"), 0);
        assert_eq!(ram.guest().read_obj::<u8>(GuestAddress(100)).expect("read"), 9, "a part page");
        ram.discard(1, 100).expect("no whole page");
        ram.prefer_huge_pages().expect("huge");
        ram.prefer_small_pages().expect("small");
        assert!(ram.populate_write(u64::MAX, 2).is_err());
        assert!(ram.populate_write(16 * MIB - 1, 2).is_err());
    }

    #[test]
    fn meminfo_is_parsed() {
        let text = "MemTotal:  100 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(parse_available_mib(text), Some(2048));
        assert_eq!(parse_available_mib("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_available_mib("MemAvailable: x kB\n"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn ranges_never_escape_ram(gpa: u64, len: u64, near in 0u64..(20 * MIB)) {
            let ram = ram(16);
            for gpa in [gpa, near] {
                for len in [len, len % (4 * MIB)] {
                    let inside = gpa.checked_add(len).is_some_and(|end| end <= 16 * MIB);
                    prop_assert_eq!(ram.discard(gpa, len).is_ok(), inside);
                }
            }
        }
    }
}
