//! `cmpxchg16b`.

use iced_x86::Instruction;

use super::{Machine, Trap, operand};

const RFLAGS_ZF: u64 = 1 << 6;

/// Compares RDX:RAX with 16 bytes of memory; if equal, stores RCX:RBX and sets ZF, otherwise loads them into
/// RDX:RAX and clears ZF. The operand must be aligned (Intel SDM volume 2, CMPXCHG16B). Done atomically with
/// or without a LOCK prefix.
pub(super) fn cmpxchg16b<M: Machine>(
    machine: &mut M,
    instruction: &Instruction,
) -> Result<(), Trap> {
    let at = operand::aligned_address(machine, instruction, 0, 16)?;
    let regs = machine.regs();
    let expected = join(regs.rdx, regs.rax);
    let new = join(regs.rcx, regs.rbx);
    let found = machine.compare_exchange(at, expected, new)?;
    let regs = machine.regs();
    if found == expected {
        regs.rflags |= RFLAGS_ZF;
    } else {
        regs.rflags &= !RFLAGS_ZF;
        regs.rax = found as u64;
        regs.rdx = (found >> 64) as u64;
    }
    Ok(())
}

fn join(high: u64, low: u64) -> u128 {
    (u128::from(high) << 64) | u128::from(low)
}
