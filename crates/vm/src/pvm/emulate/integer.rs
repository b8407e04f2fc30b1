//! Integer instructions on general registers: bit counting, BMI1, BMI2, ADX, `movbe`, `crc32`.

use iced_x86::{Instruction, Mnemonic};

use super::{Machine, Trap, operand};

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// Whether this file does `mnemonic`.
pub(super) fn knows(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Popcnt
            | Mnemonic::Tzcnt
            | Mnemonic::Lzcnt
            | Mnemonic::Andn
            | Mnemonic::Bextr
            | Mnemonic::Blsi
            | Mnemonic::Blsmsk
            | Mnemonic::Blsr
            | Mnemonic::Bzhi
            | Mnemonic::Pdep
            | Mnemonic::Pext
            | Mnemonic::Rorx
            | Mnemonic::Sarx
            | Mnemonic::Shlx
            | Mnemonic::Shrx
            | Mnemonic::Mulx
            | Mnemonic::Adcx
            | Mnemonic::Adox
            | Mnemonic::Movbe
            | Mnemonic::Crc32
    )
}

/// What an instruction gives: the value of operand 0, and the status flags where it defines them. AF and PF are
/// left as they are where the architecture leaves them undefined.
struct Given {
    value: u64,
    set: u64,
    clear: u64,
}

impl Given {
    fn value(value: u64) -> Self {
        Self { value, set: 0, clear: 0 }
    }

    /// `flags` are the ones that hold; all of `defined` that are not among them are cleared.
    fn flags(self, defined: u64, flags: u64) -> Self {
        Self { set: flags & defined, clear: defined & !flags, ..self }
    }
}

/// `flag` if `condition` holds.
fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// Does one of them.
pub(super) fn execute<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    match i.mnemonic() {
        Mnemonic::Mulx => return mulx(machine, i),
        Mnemonic::Adcx | Mnemonic::Adox => return add_with(machine, i),
        Mnemonic::Crc32 => return crc32(machine, i),
        _ => {}
    }
    let given = if i.op_count() == 2 { unary(machine, i)? } else { binary(machine, i)? };
    operand::set_value(machine, i, 0, given.value)?;
    let regs = machine.regs();
    regs.rflags = (regs.rflags & !given.clear) | given.set;
    Ok(())
}

/// Those with one source: operand 1.
fn unary<M: Machine>(machine: &mut M, i: &Instruction) -> Result<Given, Trap> {
    let bytes = operand::size(i, 0);
    let bits = 8 * bytes as u32;
    let mask = operand::mask(bytes);
    let top = 1u64 << (bits - 1);
    let source = operand::value(machine, i, 1)?;
    let sign_zero = |value: u64| when(value & top != 0, SF) | when(value == 0, ZF);
    Ok(match i.mnemonic() {
        Mnemonic::Popcnt => {
            let count = u64::from(source.count_ones());
            Given::value(count).flags(STATUS, when(source == 0, ZF))
        }
        Mnemonic::Tzcnt => {
            let count = source.trailing_zeros().min(bits);
            Given::value(u64::from(count))
                .flags(CF | ZF, when(source == 0, CF) | when(count == 0, ZF))
        }
        Mnemonic::Lzcnt => {
            let count = source.leading_zeros() - (64 - bits);
            Given::value(u64::from(count))
                .flags(CF | ZF, when(source == 0, CF) | when(count == 0, ZF))
        }
        Mnemonic::Blsi => {
            let value = source & source.wrapping_neg();
            Given::value(value).flags(CF | ZF | SF | OF, when(source != 0, CF) | sign_zero(value))
        }
        Mnemonic::Blsmsk => {
            let value = (source ^ source.wrapping_sub(1)) & mask;
            Given::value(value)
                .flags(CF | ZF | SF | OF, when(source == 0, CF) | (sign_zero(value) & SF))
        }
        Mnemonic::Blsr => {
            let value = source & source.wrapping_sub(1);
            Given::value(value).flags(CF | ZF | SF | OF, when(source == 0, CF) | sign_zero(value))
        }
        Mnemonic::Movbe => Given::value(source.swap_bytes() >> (64 - bits)),
        _ => return Err(Trap::NoRemedy),
    })
}

/// Those with two sources: operands 1 and 2.
fn binary<M: Machine>(machine: &mut M, i: &Instruction) -> Result<Given, Trap> {
    let bytes = operand::size(i, 0);
    let bits = 8 * bytes as u32;
    let mask = operand::mask(bytes);
    let top = 1u64 << (bits - 1);
    let (a, b) = (operand::value(machine, i, 1)?, operand::value(machine, i, 2)?);
    let sign_zero = |value: u64| when(value & top != 0, SF) | when(value == 0, ZF);
    let count = (b & u64::from(bits - 1)) as u32;
    Ok(match i.mnemonic() {
        Mnemonic::Andn => {
            let value = !a & b & mask;
            Given::value(value).flags(CF | ZF | SF | OF, sign_zero(value))
        }
        Mnemonic::Bextr => {
            let (start, len) = ((b & 0xff) as u32, (b >> 8 & 0xff) as u32);
            let shifted = a.checked_shr(start).unwrap_or(0);
            let value = if len >= 64 { shifted } else { shifted & ((1 << len) - 1) };
            Given::value(value).flags(CF | ZF | OF, when(value == 0, ZF))
        }
        Mnemonic::Bzhi => {
            let index = (b & 0xff) as u32;
            let value = if index < bits { a & ((1u64 << index) - 1) } else { a };
            Given::value(value).flags(CF | ZF | SF | OF, when(index >= bits, CF) | sign_zero(value))
        }
        Mnemonic::Pdep => Given::value(deposit(a, b)),
        Mnemonic::Pext => Given::value(extract(a, b)),
        Mnemonic::Rorx if bits == 32 => Given::value(u64::from((a as u32).rotate_right(count))),
        Mnemonic::Rorx => Given::value(a.rotate_right(count)),
        Mnemonic::Sarx if bits == 32 => {
            Given::value(u64::from(((a as u32).cast_signed() >> count).cast_unsigned()))
        }
        Mnemonic::Sarx => Given::value((a.cast_signed() >> count).cast_unsigned()),
        Mnemonic::Shlx => Given::value((a << count) & mask),
        Mnemonic::Shrx => Given::value(a >> count),
        _ => return Err(Trap::NoRemedy),
    })
}

/// Puts the low bits of `source` where `mask` has ones.
fn deposit(mut source: u64, mut mask: u64) -> u64 {
    let mut value = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & 1 != 0 {
            value |= lowest;
        }
        source >>= 1;
        mask &= mask - 1;
    }
    value
}

/// Gathers the bits of `source` where `mask` has ones.
fn extract(source: u64, mut mask: u64) -> u64 {
    let mut value = 0;
    let mut bit = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & lowest != 0 {
            value |= 1 << bit;
        }
        bit += 1;
        mask &= mask - 1;
    }
    value
}

/// RDX times operand 2: the high half to operand 0, the low half to operand 1. If both are one register, the
/// high half stays.
fn mulx<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    let bytes = operand::size(i, 0);
    let source = operand::value(machine, i, 2)?;
    let rdx = machine.regs().rdx & operand::mask(bytes);
    let product = u128::from(rdx) * u128::from(source);
    operand::set_register(machine, i.op1_register(), product as u64)?;
    operand::set_register(machine, i.op0_register(), (product >> (8 * bytes)) as u64)
}

/// Adds with carry in CF or OF, changing only that flag.
fn add_with<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    let bytes = operand::size(i, 0);
    let flag = if i.mnemonic() == Mnemonic::Adcx { CF } else { OF };
    let (a, b) = (operand::value(machine, i, 0)?, operand::value(machine, i, 1)?);
    let carry = u128::from(machine.regs().rflags & flag != 0);
    let sum = u128::from(a) + u128::from(b) + carry;
    operand::set_value(machine, i, 0, sum as u64)?;
    let regs = machine.regs();
    regs.rflags = (regs.rflags & !flag) | when(sum >> (8 * bytes) != 0, flag);
    Ok(())
}

/// CRC-32C (polynomial 0x11edc6f41, reflected) of operand 1, going on from operand 0.
fn crc32<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    const REFLECTED: u32 = 0x82f6_3b78;
    let bytes = operand::size(i, 1);
    let source = operand::value(machine, i, 1)?;
    let mut crc = operand::value(machine, i, 0)? as u32;
    for byte in source.to_le_bytes().iter().take(bytes) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { REFLECTED } else { 0 };
        }
    }
    operand::set_register(machine, i.op0_register(), u64::from(crc))
}
