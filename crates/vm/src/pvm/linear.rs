//! Guest memory by linear address: a page walk in software.
//!
//! KVM_TRANSLATE would do for reads in kernel mode, but it says nothing of rights, sets no accessed or dirty
//! bit, and costs 5 us on PVM where a walk costs a fraction of one. The walk follows Intel SDM volume 3,
//! section 4.5 (4-level and 5-level paging), for long mode only. Protection keys are not looked at: PVM guests
//! have none.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::exception::{Exception, pf};

/// Control register bits.
pub(super) mod cr {
    pub(in super::super) const CR0_EM: u64 = 1 << 2;
    pub(in super::super) const CR0_TS: u64 = 1 << 3;
    pub(in super::super) const CR0_WP: u64 = 1 << 16;
    pub(in super::super) const CR4_LA57: u64 = 1 << 12;
    pub(in super::super) const CR4_OSXSAVE: u64 = 1 << 18;
    pub(in super::super) const CR4_SMEP: u64 = 1 << 20;
    pub(in super::super) const CR4_SMAP: u64 = 1 << 21;
    pub(in super::super) const EFER_NX: u64 = 1 << 11;
}

/// RFLAGS.AC.
pub(super) const RFLAGS_AC: u64 = 1 << 18;

const PAGE: u64 = 4096;

/// Page table entry bits.
pub(super) mod pte {
    pub(in super::super) const PRESENT: u64 = 1 << 0;
    pub(in super::super) const WRITE: u64 = 1 << 1;
    pub(in super::super) const USER: u64 = 1 << 2;
    pub(in super::super) const ACCESSED: u64 = 1 << 5;
    pub(in super::super) const DIRTY: u64 = 1 << 6;
    pub(in super::super) const LARGE: u64 = 1 << 7;
    pub(in super::super) const NX: u64 = 1 << 63;
    /// Bits 51:12.
    pub(in super::super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// What an access wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Fetch,
}

/// Why memory cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreachable {
    /// The guest's own fault.
    Fault(Exception),
    /// The guest's tables lead to an address that is no RAM.
    NotRam {
        /// The guest physical address.
        gpa: u64,
    },
}

impl From<Exception> for Unreachable {
    fn from(e: Exception) -> Self {
        Self::Fault(e)
    }
}

/// The state of the CPU that decides on an access.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub rflags: u64,
    pub user: bool,
}

impl Context {
    pub(super) fn new(sregs: &kvm_sregs, rflags: u64) -> Self {
        Self {
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            rflags,
            user: sregs.ss.dpl == 3,
        }
    }

    fn levels(&self) -> u32 {
        if self.cr4 & cr::CR4_LA57 == 0 { 4 } else { 5 }
    }

    /// Whether an address's upper bits are all equal to its highest translated one.
    pub(super) fn is_canonical(&self, address: u64) -> bool {
        let unused = 64 - (12 + 9 * self.levels());
        ((address << unused).cast_signed() >> unused).cast_unsigned() == address
    }
}

/// Where the walk for an address stops short of its leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// Physical address of the entry that is not present.
    pub gpa: u64,
    /// Its level: 1 for a page table, 3 for a page directory pointer table.
    pub level: u32,
}

/// Guest RAM with the walk over it.
#[derive(Debug, Clone)]
pub(super) struct LinearMemory(GuestMemoryMmap<()>);

impl LinearMemory {
    pub(super) fn new(ram: GuestMemoryMmap<()>) -> Self {
        Self(ram)
    }

    /// An aligned 64-bit word of guest RAM.
    pub(super) fn word(&self, gpa: u64) -> Result<&AtomicU64, Unreachable> {
        let not_ram = Unreachable::NotRam { gpa };
        if !gpa.is_multiple_of(8) {
            return Err(not_ram);
        }
        let slice = self.0.get_slice(GuestAddress(gpa), 8).map_err(|_| not_ram)?;
        let pointer = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the slice is 8 bytes of RAM mapped for as long as `self` keeps the mapping, aligned as checked
        // (mappings are page-aligned), and all accesses by other threads of this process are atomic or volatile.
        Ok(unsafe { AtomicU64::from_ptr(pointer.cast()) })
    }

    /// Translates `address`, with the rights and the accessed and dirty bits of a CPU's access.
    pub(super) fn translate(
        &self,
        context: &Context,
        address: u64,
        access: Access,
    ) -> Result<u64, Unreachable> {
        if !context.is_canonical(address) {
            return Err(Exception::GP.into());
        }
        let mut table = context.cr3 & pte::ADDRESS;
        let (mut writable, mut user, mut no_execute) = (true, true, false);
        let mut path = [0u64; 5];
        for level in (1..=context.levels()).rev() {
            let shift = 12 + 9 * (level - 1);
            let gpa = table + ((address >> shift) & 0x1ff) * 8;
            let word = self.word(gpa)?;
            let entry = word.load(Ordering::Acquire);
            if entry & pte::PRESENT == 0 {
                return Err(fault(context, address, access, 0));
            }
            if context.efer & cr::EFER_NX == 0 && entry & pte::NX != 0 {
                let code = pf::PROTECTION | pf::RESERVED;
                return Err(fault(context, address, access, code));
            }
            writable &= entry & pte::WRITE != 0;
            user &= entry & pte::USER != 0;
            no_execute |= entry & pte::NX != 0;
            path[level as usize - 1] = gpa;
            let leaf = level == 1 || (level <= 3 && entry & pte::LARGE != 0);
            if !leaf {
                table = entry & pte::ADDRESS;
                continue;
            }
            if !allowed(context, access, writable, user, no_execute) {
                return Err(fault(context, address, access, pf::PROTECTION));
            }
            self.mark_path(&path, level, access)?;
            let offset = (1u64 << shift) - 1;
            return Ok((entry & pte::ADDRESS & !offset) | (address & offset));
        }
        Err(fault(context, address, access, 0))
    }

    /// Sets the accessed bits along `path`, and the dirty bit of the leaf at `level` for a write. Setting bits
    /// that KVM has not seen only makes its shadow entries stricter than needed.
    fn mark_path(&self, path: &[u64; 5], level: u32, access: Access) -> Result<(), Unreachable> {
        for (index, gpa) in path.iter().enumerate().filter(|(_, gpa)| **gpa != 0) {
            let leaf = index + 1 == level as usize;
            let dirty = if leaf && access == Access::Write { pte::DIRTY } else { 0 };
            let bits = pte::ACCESSED | dirty;
            let word = self.word(*gpa)?;
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// Where the entry is missing that would map `address`; none if it is mapped.
    pub(super) fn missing(
        &self,
        context: &Context,
        address: u64,
    ) -> Result<Option<Slot>, Unreachable> {
        let mut table = context.cr3 & pte::ADDRESS;
        for level in (1..=context.levels()).rev() {
            let gpa = table + ((address >> (12 + 9 * (level - 1))) & 0x1ff) * 8;
            let entry = self.word(gpa)?.load(Ordering::Acquire);
            if entry & pte::PRESENT == 0 {
                return Ok(Some(Slot { gpa, level }));
            }
            if level <= 3 && entry & pte::LARGE != 0 {
                break;
            }
            table = entry & pte::ADDRESS;
        }
        Ok(None)
    }

    /// Calls `each` with the guest physical address and the range of `0..len` of every page that
    /// `address..address + len` touches.
    fn pages(
        &self,
        context: &Context,
        address: u64,
        len: usize,
        access: Access,
        mut each: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), Unreachable>,
    ) -> Result<(), Unreachable> {
        let mut done = 0;
        while done < len {
            let at = address.wrapping_add(done as u64);
            let left = (PAGE - at % PAGE) as usize;
            let end = len.min(done + left);
            let gpa = self.translate(context, at, access)?;
            each(gpa, done..end)?;
            done = end;
        }
        Ok(())
    }

    /// Reads `data.len()` bytes. On an error some bytes may have been read.
    pub(super) fn read(
        &self,
        context: &Context,
        address: u64,
        access: Access,
        data: &mut [u8],
    ) -> Result<(), Unreachable> {
        self.pages(context, address, data.len(), access, |gpa, range| {
            let Some(part) = data.get_mut(range) else { return Ok(()) };
            self.0.read_slice(part, GuestAddress(gpa)).map_err(|_| Unreachable::NotRam { gpa })
        })
    }

    /// Writes `data`: all of it or, if a page may not be written, nothing.
    pub(super) fn write(
        &self,
        context: &Context,
        address: u64,
        data: &[u8],
    ) -> Result<(), Unreachable> {
        self.pages(context, address, data.len(), Access::Write, |_, _| Ok(()))?;
        self.pages(context, address, data.len(), Access::Write, |gpa, range| {
            let Some(part) = data.get(range) else { return Ok(()) };
            self.0.write_slice(part, GuestAddress(gpa)).map_err(|_| Unreachable::NotRam { gpa })
        })
    }

    /// Compares the 16 bytes at `address`, a multiple of 16, with `expected` and, if equal, replaces them by
    /// `new`, atomically. Gives what was there; none if this CPU cannot do it.
    pub(super) fn compare_exchange(
        &self,
        context: &Context,
        address: u64,
        expected: u128,
        new: u128,
    ) -> Result<Option<u128>, Unreachable> {
        let gpa = self.translate(context, address, Access::Write)?;
        let not_ram = Unreachable::NotRam { gpa };
        if !gpa.is_multiple_of(16) {
            return Err(not_ram);
        }
        let slice = self.0.get_slice(GuestAddress(gpa), 16).map_err(|_| not_ram)?;
        if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
            return Ok(None);
        }
        let pointer = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the CPU has the instruction; the slice is 16 bytes of RAM, aligned as checked (mappings are
        // page-aligned), mapped for as long as `self` is.
        Ok(Some(unsafe { cmpxchg16b(pointer, expected, new) }))
    }

    /// Translates as the CPU itself does to read its own tables: in kernel mode, whoever runs.
    pub(super) fn translate_for_system(
        &self,
        context: &Context,
        address: u64,
    ) -> Result<u64, Unreachable> {
        let system = Context { user: false, rflags: context.rflags | RFLAGS_AC, ..*context };
        self.translate(&system, address, Access::Read)
    }

    /// Reads a word, as [`Self::translate_for_system`].
    pub(super) fn system_word(&self, context: &Context, address: u64) -> Result<u64, Unreachable> {
        let system = Context { user: false, rflags: context.rflags | RFLAGS_AC, ..*context };
        let mut bytes = [0; 8];
        self.read(&system, address, Access::Read, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Bytes of guest RAM by physical address.
    pub(super) fn read_physical(&self, gpa: u64, data: &mut [u8]) -> Result<(), Unreachable> {
        self.0.read_slice(data, GuestAddress(gpa)).map_err(|_| Unreachable::NotRam { gpa })
    }

    /// As [`Self::read_physical`].
    pub(super) fn write_physical(&self, gpa: u64, data: &[u8]) -> Result<(), Unreachable> {
        self.0.write_slice(data, GuestAddress(gpa)).map_err(|_| Unreachable::NotRam { gpa })
    }
}

fn allowed(context: &Context, access: Access, writable: bool, user: bool, nx: bool) -> bool {
    if context.user {
        return user
            && match access {
                Access::Read => true,
                Access::Write => writable,
                Access::Fetch => !nx,
            };
    }
    let smap = user && context.cr4 & cr::CR4_SMAP != 0 && context.rflags & RFLAGS_AC == 0;
    match access {
        Access::Read => !smap,
        Access::Write => !smap && (writable || context.cr0 & cr::CR0_WP == 0),
        Access::Fetch => !(nx || user && context.cr4 & cr::CR4_SMEP != 0),
    }
}

fn fault(context: &Context, address: u64, access: Access, code: u32) -> Unreachable {
    let user = if context.user { pf::USER } else { 0 };
    let fetch_is_reported = context.efer & cr::EFER_NX != 0 || context.cr4 & cr::CR4_SMEP != 0;
    let kind = match access {
        Access::Read => 0,
        Access::Write => pf::WRITE,
        Access::Fetch if fetch_is_reported => pf::FETCH,
        Access::Fetch => 0,
    };
    Unreachable::Fault(Exception::page_fault(address, code | user | kind))
}

/// `lock cmpxchg16b`, written out: the intrinsic falls back to a library call where it is not inlined.
///
/// # Safety
///
/// The CPU has the instruction, and `pointer` is valid for reads and writes of 16 bytes and a multiple of 16.
unsafe fn cmpxchg16b(pointer: *mut u8, expected: u128, new: u128) -> u128 {
    let (low, high): (u64, u64);
    // SAFETY: as the caller promises. RBX is reserved by the compiler: it is swapped in and back. No operand may
    // be in it meanwhile, so each has a register by name.
    unsafe {
        std::arch::asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") pointer,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") expected as u64 => low,
            inout("rdx") (expected >> 64) as u64 => high,
            options(nostack),
        );
    }
    (u128::from(high) << 64) | u128::from(low)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pvm::testing::Tables;

    fn fault_of<T: std::fmt::Debug>(result: Result<T, Unreachable>) -> (u64, u32) {
        match result {
            Err(Unreachable::Fault(e)) => (e.cr2.unwrap_or(0), e.error_code.unwrap_or(0)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rights_and_error_codes_are_those_of_the_architecture() {
        let tables = Tables::new();
        let memory = tables.memory();
        let kernel = tables.context();
        let user = Context { user: true, ..kernel };
        let (rw, ro, none) = (Tables::USER, Tables::USER + 0x1000, Tables::USER + 0x3000);
        let code = |c: &Context, address, access| fault_of(memory.translate(c, address, access));

        assert_eq!(memory.translate(&user, rw + 5, Access::Write), Ok(Tables::USER_GPAS[0] + 5));
        assert_eq!(code(&user, ro, Access::Write), (ro, 0b111));
        assert_eq!(code(&kernel, ro, Access::Write), (ro, 0b011));
        assert_eq!(code(&user, none + 1, Access::Read), (none + 1, 0b100));
        assert_eq!(code(&kernel, none, Access::Write), (none, 0b010));
        // NX; and the kernel's pages.
        assert_eq!(code(&user, rw, Access::Fetch), (rw, 0b1_0101));
        assert_eq!(code(&user, Tables::KERNEL, Access::Fetch), (Tables::KERNEL, 0b1_0101));
        assert_eq!(code(&user, Tables::KERNEL, Access::Read), (Tables::KERNEL, 0b101));
        let at = Tables::KERNEL + 0x1f_fff8;
        assert_eq!(
            memory.translate(&kernel, at, Access::Write),
            Ok(Tables::KERNEL_GPA + 0x1f_fff8)
        );
        // Without write protection the kernel may write anywhere; with SMAP it needs AC.
        let unprotected = Context { cr0: 0, ..kernel };
        assert_eq!(memory.translate(&unprotected, ro, Access::Write), Ok(Tables::USER_GPAS[1]));
        let smap = Context { cr4: cr::CR4_SMAP, ..kernel };
        assert_eq!(code(&smap, rw, Access::Read), (rw, 0b001));
        let stac = Context { rflags: RFLAGS_AC, ..smap };
        assert!(memory.translate(&stac, rw, Access::Read).is_ok());
        let smep = Context { cr4: cr::CR4_SMEP, ..kernel };
        assert_eq!(code(&smep, ro, Access::Fetch), (ro, 0b1_0001));
        // Not canonical.
        let e = memory.translate(&kernel, 0x8000_0000_0000, Access::Read);
        assert_eq!(e, Err(Unreachable::Fault(Exception::GP)));
    }

    #[test]
    fn accessed_and_dirty_bits_are_set_as_by_a_cpu() {
        let tables = Tables::new();
        let memory = tables.memory();
        let user = Context { user: true, ..tables.context() };
        let bits = |index| tables.user_entry(index) & (pte::ACCESSED | pte::DIRTY);
        memory.translate(&user, Tables::USER, Access::Read).unwrap();
        assert_eq!((bits(0), bits(1)), (pte::ACCESSED, 0));
        memory.translate(&user, Tables::USER, Access::Write).unwrap();
        assert_eq!(bits(0), pte::ACCESSED | pte::DIRTY);
        // A refused access leaves no trace.
        assert!(memory.translate(&user, Tables::USER + 0x1000, Access::Write).is_err());
        assert_eq!(bits(1), 0);
    }

    #[test]
    fn a_write_that_faults_on_its_second_page_writes_nothing() {
        let tables = Tables::new();
        let memory = tables.memory();
        let user = Context { user: true, ..tables.context() };
        let end = Tables::USER + 0x1000;
        let result = memory.write(&user, end - 8, &[0xaa; 16]);
        assert_eq!(fault_of(result), (end, 0b111));
        let mut data = [0; 8];
        memory.read(&user, end - 8, Access::Read, &mut data).unwrap();
        assert_eq!(data, [0; 8]);
    }

    #[test]
    fn tables_that_lead_out_of_ram_are_no_panic() {
        let tables = Tables::new();
        tables.set_kernel_entry(0xffff_ffff_4000_0000, 0x00ff_ffff_f000 | pte::PRESENT);
        let result =
            tables.memory().translate(&tables.context(), 0xffff_ffff_4000_0000, Access::Read);
        assert!(matches!(result, Err(Unreachable::NotRam { .. })), "{result:?}");
        let lost = Context { cr3: 0x000f_ffff_ffff_f000, ..tables.context() };
        assert!(matches!(
            tables.memory().translate(&lost, 0, Access::Read),
            Err(Unreachable::NotRam { .. })
        ));
    }

    #[test]
    fn compare_exchange_is_atomic_between_threads() {
        let tables = Tables::new();
        let context = tables.context();
        let at = Tables::KERNEL + 0x40;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let mut seen = 0u128;
                        // Both halves count: a torn update would part them.
                        loop {
                            let next = seen + 1 + (1u128 << 64);
                            let found = tables
                                .memory()
                                .compare_exchange(&context, at, seen, next)
                                .unwrap()
                                .unwrap();
                            if found == seen {
                                break;
                            }
                            seen = found;
                        }
                    }
                });
            }
        });
        let mut data = [0; 16];
        tables.memory().read(&context, at, Access::Read, &mut data).unwrap();
        assert_eq!(u128::from_le_bytes(data), 8000 + (8000 << 64));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_across_pages(
            offset in 0u64..0x2000, data in proptest::collection::vec(any::<u8>(), 0..4096),
        ) {
            let tables = Tables::new();
            let memory = tables.memory();
            // The middle page is read-only, but not for a kernel without write protection.
            let context = Context { cr0: 0, ..tables.context() };
            let at = Tables::USER + offset;
            let result = memory.write(&context, at, &data);
            if offset + data.len() as u64 > 0x3000 {
                prop_assert_eq!(fault_of(result).0, Tables::USER + 0x3000);
                return Ok(());
            }
            result.unwrap();
            let mut back = vec![0; data.len()];
            memory.read(&context, at, Access::Read, &mut back).unwrap();
            prop_assert_eq!(back, data);
        }
    }
}
