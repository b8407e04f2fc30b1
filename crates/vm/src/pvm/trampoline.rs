//! A few instructions of ours in front of the guest's page-fault handler.
//!
//! They tell an unfinished `syscall` ([`super::entry`]) from a fault and finish it inside the guest, which saves an
//! exit for every system call and every page fault. In the guest's kernel mode all of them are emulated:
//!
//! ```text
//!     cmp  qword [rsp + 8], LSTAR      RIP of the frame; as a sign-extended 32-bit number
//!     jne  handler                     nearly every real fault: two instructions more than without us
//!     test byte [rsp + 25], 2          IF in the flags of the frame
//!     jnz  handler
//!     mov  rsp, [rsp + 32]             RSP of the frame; flags are masked already, CS is the kernel's
//!     jmp  LSTAR
//! ```
//!
//! IF tells a `syscall`, which has masked it, from user code that jumps to LSTAR with registers of its own making: user
//! mode cannot clear IF. Kernel mode never faults at LSTAR: the code there is mapped and begins without a memory
//! operand. SS stays null, as after any interrupt from user mode; kernels expect it where they load SS from a task's state.
//!
//! The code has to be mapped in the guest. Three pages at [`GPA`], which the memory map reserves, hold a page
//! directory, a page table and the code; they hang below the table that maps the kernel image, at [`ADDRESS`],
//! in a gigabyte that Linux never uses (Documentation/arch/x86/x86_64/mm.rst: "unused hole") and that all address
//! spaces share. Being guest RAM they fork and snapshot with it.
//!
//! It is not put in place, and the breakpoint stays, when LSTAR or the handler are not in the topmost 2 GiB, when
//! system calls do not mask IF, when the hole is in use, when the pages at [`GPA`] are no RAM or not zero, or when the kernel isolates its page
//! tables (its system call entry then loads CR3: the user's tables lack our mapping).

use std::ops::Range;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::cpu::Cpu;
use super::entry::{Gate, SyscallTarget};
use super::linear::{Access, Context, LinearMemory, Unreachable, pte};

/// Guest physical address of the three pages. The memory map given to the guest must reserve them.
pub const GPA: u64 = 0xd_0000;
/// Length of the three pages.
pub const LEN: u64 = 3 * PAGE;
const PAGE: u64 = 4096;
const DIRECTORY: u64 = GPA;
const TABLE: u64 = GPA + PAGE;
const CODE: u64 = GPA + 2 * PAGE;

/// Where the guest sees the code.
const ADDRESS: u64 = 0xffff_ffff_4000_0000;
/// Level of the table that gets a new entry: each covers 1 GiB.
const PDPT_LEVEL: u32 = 3;
/// Kernel image and modules: reachable from [`ADDRESS`] with 32-bit displacements, and equal to it in the upper
/// half of an address.
const REACHABLE: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_bfff_0000;

/// A kernel may change its handler (kexec): each gets code of its own, as another vCPU may be in the old one.
const SLOT: u64 = 64;
const SLOTS: u64 = PAGE / SLOT;

const RFLAGS_IF: u64 = 1 << 9;

/// Most instructions that are looked at for page table isolation.
const ENTRY_INSTRUCTIONS: usize = 16;

/// Whether a gate leads into the page of trampolines.
pub(super) fn contains(handler: u64) -> bool {
    (ADDRESS..ADDRESS + PAGE).contains(&handler)
}

/// Puts the trampoline before the handler of `gate`. False if it does not fit this guest; then nothing that the
/// guest uses has changed.
pub(super) fn install(
    cpu: &Cpu<'_>,
    gate: &Gate,
    target: &SyscallTarget,
) -> Result<bool, Unreachable> {
    let reachable = REACHABLE.contains(&target.lstar) && REACHABLE.contains(&gate.handler);
    if !reachable || target.sfmask & RFLAGS_IF == 0 {
        return Ok(false);
    }
    let context = Context { user: false, ..cpu.context() };
    let memory = cpu.memory();
    if isolates_page_tables(memory, &context, target.lstar) || !map(memory, &context)? {
        return Ok(false);
    }
    let Some(slot) = free_slot(memory)? else { return Ok(false) };
    let code = assemble(ADDRESS + slot, gate.handler, target.lstar);
    memory.write_physical(CODE + slot, &code)?;
    let new = gate.redirected(ADDRESS + slot);
    // One aligned 64-bit store: other vCPUs see the old or the new gate. It fails if the guest changes the gate now.
    let word = memory.word(gate.gpa)?;
    Ok(word.compare_exchange(gate.low, new, Ordering::AcqRel, Ordering::Relaxed).is_ok())
}

/// Makes [`ADDRESS`] lead to the code page. False if it leads elsewhere, or the pages are in use.
fn map(memory: &LinearMemory, context: &Context) -> Result<bool, Unreachable> {
    let Some(slot) = memory.missing(context, ADDRESS)? else {
        let gpa = memory.translate_for_system(context, ADDRESS)?;
        return Ok(gpa == CODE);
    };
    let word = memory.word(slot.gpa)?;
    if slot.level != PDPT_LEVEL || word.load(Ordering::Acquire) != 0 {
        return Ok(false);
    }
    let mut pages = vec![0; LEN as usize];
    if memory.read_physical(GPA, &mut pages).is_err() {
        return Ok(false);
    }
    let table_bits = pte::PRESENT | pte::WRITE | pte::ACCESSED;
    let entries = [(DIRECTORY, TABLE | table_bits), (TABLE, CODE | pte::PRESENT | pte::ACCESSED)];
    let ours = entries.iter().all(|(at, entry)| {
        let offset = (at - GPA) as usize;
        pages.get(offset..offset + 8) == Some(&entry.to_le_bytes())
    });
    // A kernel before this one may have left them.
    if !ours && pages.iter().any(|b| *b != 0) {
        return Ok(false);
    }
    for (at, entry) in entries {
        memory.write_physical(at, &entry.to_le_bytes())?;
    }
    let entry = DIRECTORY | table_bits;
    Ok(word.compare_exchange(0, entry, Ordering::AcqRel, Ordering::Relaxed).is_ok())
}

/// Offset of a slot that holds no code yet.
fn free_slot(memory: &LinearMemory) -> Result<Option<u64>, Unreachable> {
    for slot in 0..SLOTS {
        let mut first = [0; 8];
        memory.read_physical(CODE + slot * SLOT, &mut first)?;
        if first == [0; 8] {
            return Ok(Some(slot * SLOT));
        }
    }
    Ok(None)
}

/// The code for `at`. Both targets must be within [`REACHABLE`].
fn assemble(at: u64, handler: u64, lstar: u64) -> Vec<u8> {
    let mut code = Vec::with_capacity(SLOT as usize);
    let jump = |code: &mut Vec<u8>, opcode: &[u8], to: u64| {
        code.extend_from_slice(opcode);
        let next = at + code.len() as u64 + 4;
        code.extend_from_slice(&(to.wrapping_sub(next) as u32).to_le_bytes());
    };
    // cmp qword [rsp + 8], imm32
    code.extend_from_slice(&[0x48, 0x81, 0x7c, 0x24, 0x08]);
    code.extend_from_slice(&(lstar as u32).to_le_bytes());
    jump(&mut code, &[0x0f, 0x85], handler);
    // test byte [rsp + 25], 2
    code.extend_from_slice(&[0xf6, 0x44, 0x24, 0x19, 0x02]);
    jump(&mut code, &[0x0f, 0x85], handler);
    // mov rsp, [rsp + 32]
    code.extend_from_slice(&[0x48, 0x8b, 0x64, 0x24, 0x20]);
    jump(&mut code, &[0xe9], lstar);
    code
}

/// Whether the system call entry at `lstar` reads CR3 near its beginning: kernels with page table isolation have
/// to. Only sure once the kernel has patched its code, which it has before user mode runs.
fn isolates_page_tables(memory: &LinearMemory, context: &Context, lstar: u64) -> bool {
    let mut at = lstar;
    for _ in 0..ENTRY_INSTRUCTIONS {
        let mut bytes = [0; 15];
        if memory.read(context, at, Access::Fetch, &mut bytes).is_err() {
            return true;
        }
        let mut decoder = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE);
        let i = decoder.decode();
        if reads_cr3(&i) {
            return true;
        }
        match i.flow_control() {
            FlowControl::Next => at = i.next_ip(),
            FlowControl::UnconditionalBranch => at = i.near_branch_target(),
            _ => return false,
        }
    }
    false
}

fn reads_cr3(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Mov
        && i.op1_kind() == OpKind::Register
        && i.op1_register() == Register::CR3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pvm::testing::Tables;

    const LSTAR: u64 = 0xffff_ffff_8180_0040;
    const HANDLER: u64 = 0xffff_ffff_8180_0b30;

    fn decode(at: u64, code: &[u8]) -> Vec<Instruction> {
        Decoder::with_ip(64, code, at, DecoderOptions::NONE).into_iter().collect()
    }

    #[test]
    fn the_code_is_what_the_module_says() {
        let code = assemble(ADDRESS + 3 * SLOT, HANDLER, LSTAR);
        assert!(code.len() as u64 <= SLOT);
        let all = decode(ADDRESS + 3 * SLOT, &code);
        let kinds: Vec<_> = all.iter().map(Instruction::mnemonic).collect();
        use Mnemonic::{Cmp, Jmp, Jne, Mov, Test};
        assert_eq!(kinds, [Cmp, Jne, Test, Jne, Mov, Jmp]);
        assert_eq!(all[0].immediate32to64().cast_unsigned(), LSTAR);
        assert_eq!((all[0].memory_base(), all[0].memory_displacement64()), (Register::RSP, 8));
        assert_eq!(all[1].near_branch_target(), HANDLER);
        // IF is bit 9 of RFLAGS, which lies at 24 in the frame.
        assert_eq!((all[2].memory_displacement64(), all[2].immediate8()), (25, 2));
        assert_eq!(all[3].near_branch_target(), HANDLER);
        assert_eq!((all[4].op0_register(), all[4].memory_displacement64()), (Register::RSP, 32));
        assert_eq!(all[5].near_branch_target(), LSTAR);
    }

    #[test]
    fn it_is_mapped_once_below_the_kernels_table_and_nowhere_else() {
        let tables = Tables::new();
        let (memory, context) = (tables.memory(), tables.context());
        assert!(memory.translate(&context, ADDRESS, Access::Fetch).is_err());
        assert_eq!(map(memory, &context), Ok(true));
        assert_eq!(memory.translate(&context, ADDRESS, Access::Fetch), Ok(CODE));
        // Not for writing, and not for user mode.
        let strict = Context { cr0: super::super::linear::cr::CR0_WP, ..context };
        assert!(memory.translate(&strict, ADDRESS, Access::Write).is_err());
        let user = Context { user: true, ..context };
        assert!(memory.translate(&user, ADDRESS, Access::Fetch).is_err());
        // The second time it is there already; a new kernel's tables get it again.
        assert_eq!(map(memory, &context), Ok(true));
        tables.clear_kernel_entry(ADDRESS);
        assert_eq!(map(memory, &context), Ok(true));
        assert_eq!(memory.translate(&context, ADDRESS, Access::Fetch), Ok(CODE));
    }

    #[test]
    fn it_stays_away_from_what_is_in_use() {
        let tables = Tables::new();
        let (memory, context) = (tables.memory(), tables.context());
        memory.write_physical(GPA + 100, &[1]).unwrap();
        assert_eq!(map(memory, &context), Ok(false));
        assert!(memory.translate(&context, ADDRESS, Access::Fetch).is_err());

        let tables = Tables::new();
        let (memory, context) = (tables.memory(), tables.context());
        tables.set_kernel_entry(ADDRESS, 0x2);
        assert_eq!(map(memory, &context), Ok(false), "an entry that is not zero");
    }

    #[test]
    fn slots_are_used_up_one_by_one() {
        let tables = Tables::new();
        let memory = tables.memory();
        for slot in 0..SLOTS {
            assert_eq!(free_slot(memory), Ok(Some(slot * SLOT)));
            let code = assemble(ADDRESS + slot * SLOT, HANDLER, LSTAR);
            memory.write_physical(CODE + slot * SLOT, &code).unwrap();
        }
        assert_eq!(free_slot(memory), Ok(None));
    }

    #[test]
    fn page_table_isolation_is_recognized() {
        let tables = Tables::new();
        let (memory, context) = (tables.memory(), tables.context());
        let at = Tables::KERNEL + 0x100;
        let check = |code: &[u8]| {
            let mut page = code.to_vec();
            page.resize(64, 0x90);
            memory.write_physical(Tables::KERNEL_GPA + 0x100, &page).unwrap();
            isolates_page_tables(memory, &context, at)
        };
        // swapgs; mov gs:[0x6014], rsp; mov rsp, cr3
        let pti =
            [0x0f, 0x01, 0xf8, 0x65, 0x48, 0x89, 0x24, 0x25, 0x14, 0x60, 0, 0, 0x0f, 0x20, 0xdc];
        assert!(check(&pti));
        // The same with a jump over it, as without isolation; then pushes and a call.
        let mut plain = pti.to_vec();
        plain.splice(12..12, [0xeb, 0x03]);
        plain.extend([0x50, 0x51, 0xe8, 0, 0, 0, 0]);
        assert!(!check(&plain));
        // Where it cannot be told, it is assumed.
        assert!(isolates_page_tables(memory, &context, 0xffff_ffff_0000_0000));
    }
}
