//! Operands: registers by number, effective addresses, values of memory.

use iced_x86::{Instruction, OpKind, Register};
use kvm_bindings::kvm_regs;

use super::{Machine, Trap};
use crate::pvm::exception::Exception;

/// A general register by its number in the encoding: RAX is 0, R15 is 15.
pub(in super::super) fn gpr(regs: &mut kvm_regs, number: usize) -> &mut u64 {
    match number & 15 {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

/// Low `bytes` bytes set.
pub(super) fn mask(bytes: usize) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 }
}

/// The value of a general register of any width, zero-extended.
pub(super) fn register<M: Machine>(machine: &mut M, register: Register) -> Result<u64, Trap> {
    if !register.is_gpr() {
        return Err(Trap::NoRemedy);
    }
    let full = *gpr(machine.regs(), register.full_register().number());
    let high = matches!(register, Register::AH | Register::BH | Register::CH | Register::DH);
    let value = if high { full >> 8 } else { full };
    Ok(value & mask(register.size()))
}

/// Writes a general register of 2, 4 or 8 bytes: 32-bit writes clear the upper half, 16-bit writes keep the
/// rest.
pub(super) fn set_register<M: Machine>(
    machine: &mut M,
    register: Register,
    value: u64,
) -> Result<(), Trap> {
    if !register.is_gpr() || register.size() < 2 {
        return Err(Trap::NoRemedy);
    }
    let full = gpr(machine.regs(), register.full_register().number());
    *full = match register.size() {
        2 => (*full & !0xffff) | (value & 0xffff),
        4 => value & 0xffff_ffff,
        _ => value,
    };
    Ok(())
}

/// Effective linear address of memory operand `operand`.
pub(super) fn address<M: Machine>(
    machine: &mut M,
    instruction: &Instruction,
    operand: u32,
) -> Result<u64, Trap> {
    let (fs, gs) = (machine.sregs().fs.base, machine.sregs().gs.base);
    let regs = machine.regs();
    let address = instruction.virtual_address(operand, 0, |register, _, _| match register {
        Register::FS => Some(fs),
        Register::GS => Some(gs),
        // Flat in 64-bit mode.
        Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
        r if r.is_gpr() => Some(*gpr(regs, r.full_register().number()) & mask(r.size())),
        _ => None,
    });
    address.ok_or(Trap::NoRemedy)
}

/// Size of operand `operand` in bytes: 1, 2, 4 or 8.
pub(super) fn size(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    }
}

/// Value of operand `operand`, zero-extended: register, memory or immediate.
pub(super) fn value<M: Machine>(
    machine: &mut M,
    instruction: &Instruction,
    operand: u32,
) -> Result<u64, Trap> {
    match instruction.op_kind(operand) {
        OpKind::Register => register(machine, instruction.op_register(operand)),
        OpKind::Memory => {
            let bytes = size(instruction, operand);
            let at = address(machine, instruction, operand)?;
            let mut data = [0; 8];
            let part = data.get_mut(..bytes).ok_or(Trap::NoRemedy)?;
            machine.read(at, part)?;
            Ok(u64::from_le_bytes(data))
        }
        OpKind::Immediate8 => Ok(u64::from(instruction.immediate8())),
        _ => Err(Trap::NoRemedy),
    }
}

/// Writes operand `operand`: register or memory.
pub(super) fn set_value<M: Machine>(
    machine: &mut M,
    instruction: &Instruction,
    operand: u32,
    value: u64,
) -> Result<(), Trap> {
    match instruction.op_kind(operand) {
        OpKind::Register => set_register(machine, instruction.op_register(operand), value),
        OpKind::Memory => {
            let bytes = size(instruction, operand);
            let at = address(machine, instruction, operand)?;
            let data = value.to_le_bytes();
            machine.write(at, data.get(..bytes).ok_or(Trap::NoRemedy)?)
        }
        _ => Err(Trap::NoRemedy),
    }
}

/// The address of operand `operand`, if it is a multiple of `align`; otherwise #GP.
pub(super) fn aligned_address<M: Machine>(
    machine: &mut M,
    instruction: &Instruction,
    operand: u32,
    align: u64,
) -> Result<u64, Trap> {
    let at = address(machine, instruction, operand)?;
    if at.is_multiple_of(align) { Ok(at) } else { Err(Exception::GP.into()) }
}
