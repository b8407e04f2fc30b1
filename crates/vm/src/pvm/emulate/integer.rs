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

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};
    use proptest::prelude::*;

    use super::*;
    use crate::pvm::emulate::testing::{Code, Mock, Native};

    /// Name, encoding, and the status flags that the architecture defines.
    #[rustfmt::skip]
    const INSTRUCTIONS: &[(&str, &[u8], u64)] = &[
        ("popcnt rax,rcx", &[0xf3, 0x48, 0x0f, 0xb8, 0xc1], STATUS),
        ("popcnt eax,ecx", &[0xf3, 0x0f, 0xb8, 0xc1], STATUS),
        ("popcnt ax,cx", &[0x66, 0xf3, 0x0f, 0xb8, 0xc1], STATUS),
        ("popcnt r9,qword [rsi]", &[0xf3, 0x4c, 0x0f, 0xb8, 0x0e], STATUS),
        ("popcnt r9d,dword [rsi+rdi*2+0x1]", &[0xf3, 0x44, 0x0f, 0xb8, 0x4c, 0x7e, 0x01], STATUS),
        ("popcnt r9w,word [rsi]", &[0x66, 0xf3, 0x44, 0x0f, 0xb8, 0x0e], STATUS),
        ("tzcnt rax,rcx", &[0xf3, 0x48, 0x0f, 0xbc, 0xc1], CF | ZF),
        ("tzcnt eax,ecx", &[0xf3, 0x0f, 0xbc, 0xc1], CF | ZF),
        ("tzcnt ax,cx", &[0x66, 0xf3, 0x0f, 0xbc, 0xc1], CF | ZF),
        ("tzcnt rax,qword [rsi+0x4]", &[0xf3, 0x48, 0x0f, 0xbc, 0x46, 0x04], CF | ZF),
        ("lzcnt rax,rcx", &[0xf3, 0x48, 0x0f, 0xbd, 0xc1], CF | ZF),
        ("lzcnt eax,ecx", &[0xf3, 0x0f, 0xbd, 0xc1], CF | ZF),
        ("lzcnt ax,cx", &[0x66, 0xf3, 0x0f, 0xbd, 0xc1], CF | ZF),
        ("lzcnt r10d,dword [rsi]", &[0xf3, 0x44, 0x0f, 0xbd, 0x16], CF | ZF),
        ("movbe rax,qword [rsi]", &[0x48, 0x0f, 0x38, 0xf0, 0x06], STATUS),
        ("movbe eax,dword [rsi]", &[0x0f, 0x38, 0xf0, 0x06], STATUS),
        ("movbe ax,word [rsi+0x3]", &[0x66, 0x0f, 0x38, 0xf0, 0x46, 0x03], STATUS),
        ("movbe qword [rsi],rcx", &[0x48, 0x0f, 0x38, 0xf1, 0x0e], STATUS),
        ("movbe dword [rsi],ecx", &[0x0f, 0x38, 0xf1, 0x0e], STATUS),
        ("movbe word [rsi],cx", &[0x66, 0x0f, 0x38, 0xf1, 0x0e], STATUS),
        ("crc32 rax,rcx", &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc1], STATUS),
        ("crc32 eax,ecx", &[0xf2, 0x0f, 0x38, 0xf1, 0xc1], STATUS),
        ("crc32 eax,cx", &[0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc1], STATUS),
        ("crc32 eax,cl", &[0xf2, 0x0f, 0x38, 0xf0, 0xc1], STATUS),
        ("crc32 ecx,ah", &[0xf2, 0x0f, 0x38, 0xf0, 0xcc], STATUS),
        ("crc32 rax,qword [rsi]", &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0x06], STATUS),
        ("crc32 eax,byte [rsi]", &[0xf2, 0x0f, 0x38, 0xf0, 0x06], STATUS),
        ("adcx rax,rcx", &[0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc1], STATUS),
        ("adcx eax,ecx", &[0x66, 0x0f, 0x38, 0xf6, 0xc1], STATUS),
        ("adcx rax,qword [rsi]", &[0x66, 0x48, 0x0f, 0x38, 0xf6, 0x06], STATUS),
        ("adox rax,rcx", &[0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xc1], STATUS),
        ("adox eax,ecx", &[0xf3, 0x0f, 0x38, 0xf6, 0xc1], STATUS),
        ("adox r8d,dword [rsi]", &[0xf3, 0x44, 0x0f, 0x38, 0xf6, 0x06], STATUS),
        ("andn rax,rcx,rdx", &[0xc4, 0xe2, 0xf0, 0xf2, 0xc2], CF | ZF | SF | OF),
        ("andn eax,ecx,edx", &[0xc4, 0xe2, 0x70, 0xf2, 0xc2], CF | ZF | SF | OF),
        ("andn rax,rcx,qword [rsi]", &[0xc4, 0xe2, 0xf0, 0xf2, 0x06], CF | ZF | SF | OF),
        ("bextr rax,rcx,rdx", &[0xc4, 0xe2, 0xe8, 0xf7, 0xc1], CF | ZF | OF),
        ("bextr eax,ecx,edx", &[0xc4, 0xe2, 0x68, 0xf7, 0xc1], CF | ZF | OF),
        ("blsi rax,rcx", &[0xc4, 0xe2, 0xf8, 0xf3, 0xd9], CF | ZF | SF | OF),
        ("blsi eax,ecx", &[0xc4, 0xe2, 0x78, 0xf3, 0xd9], CF | ZF | SF | OF),
        ("blsmsk rax,rcx", &[0xc4, 0xe2, 0xf8, 0xf3, 0xd1], CF | SF | OF | ZF),
        ("blsmsk eax,ecx", &[0xc4, 0xe2, 0x78, 0xf3, 0xd1], CF | SF | OF | ZF),
        ("blsr rax,rcx", &[0xc4, 0xe2, 0xf8, 0xf3, 0xc9], CF | ZF | SF | OF),
        ("blsr eax,ecx", &[0xc4, 0xe2, 0x78, 0xf3, 0xc9], CF | ZF | SF | OF),
        ("bzhi rax,rcx,rdx", &[0xc4, 0xe2, 0xe8, 0xf5, 0xc1], CF | ZF | SF | OF),
        ("bzhi eax,ecx,edx", &[0xc4, 0xe2, 0x68, 0xf5, 0xc1], CF | ZF | SF | OF),
        ("pdep rax,rcx,rdx", &[0xc4, 0xe2, 0xf3, 0xf5, 0xc2], STATUS),
        ("pdep eax,ecx,edx", &[0xc4, 0xe2, 0x73, 0xf5, 0xc2], STATUS),
        ("pext rax,rcx,rdx", &[0xc4, 0xe2, 0xf2, 0xf5, 0xc2], STATUS),
        ("pext eax,ecx,edx", &[0xc4, 0xe2, 0x72, 0xf5, 0xc2], STATUS),
        ("rorx rax,rcx,0xd", &[0xc4, 0xe3, 0xfb, 0xf0, 0xc1, 0x0d], STATUS),
        ("rorx eax,ecx,0x2d", &[0xc4, 0xe3, 0x7b, 0xf0, 0xc1, 0x2d], STATUS),
        ("sarx rax,rcx,rdx", &[0xc4, 0xe2, 0xea, 0xf7, 0xc1], STATUS),
        ("sarx eax,ecx,edx", &[0xc4, 0xe2, 0x6a, 0xf7, 0xc1], STATUS),
        ("shlx rax,rcx,rdx", &[0xc4, 0xe2, 0xe9, 0xf7, 0xc1], STATUS),
        ("shlx eax,ecx,edx", &[0xc4, 0xe2, 0x69, 0xf7, 0xc1], STATUS),
        ("shrx rax,rcx,rdx", &[0xc4, 0xe2, 0xeb, 0xf7, 0xc1], STATUS),
        ("shrx eax,dword [rsi],edx", &[0xc4, 0xe2, 0x6b, 0xf7, 0x06], STATUS),
        ("mulx rax,rcx,r8", &[0xc4, 0xc2, 0xf3, 0xf6, 0xc0], STATUS),
        ("mulx eax,ecx,r8d", &[0xc4, 0xc2, 0x73, 0xf6, 0xc0], STATUS),
        ("mulx rax,rax,r8", &[0xc4, 0xc2, 0xfb, 0xf6, 0xc0], STATUS),
        ("mulx eax,ecx,dword [rsi]", &[0xc4, 0xe2, 0x73, 0xf6, 0x06], STATUS),
    ];

    fn host_has(code: &[u8]) -> bool {
        let i = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).decode();
        match i.mnemonic() {
            Mnemonic::Popcnt => is_x86_feature_detected!("popcnt"),
            Mnemonic::Lzcnt => is_x86_feature_detected!("lzcnt"),
            Mnemonic::Movbe => is_x86_feature_detected!("movbe"),
            Mnemonic::Crc32 => is_x86_feature_detected!("sse4.2"),
            Mnemonic::Adcx | Mnemonic::Adox => is_x86_feature_detected!("adx"),
            Mnemonic::Tzcnt
            | Mnemonic::Andn
            | Mnemonic::Bextr
            | Mnemonic::Blsi
            | Mnemonic::Blsmsk
            | Mnemonic::Blsr => is_x86_feature_detected!("bmi1"),
            _ => is_x86_feature_detected!("bmi2"),
        }
    }

    /// Values at which these instructions change their mind, and any others.
    fn value() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            Just(1),
            Just(u64::MAX),
            Just(1 << 63),
            Just(1 << 31),
            0..300u64,
            any::<u64>(),
            any::<u64>().prop_map(|x| x << 32),
            any::<u64>().prop_map(|x| x & 0xffff_0000),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn every_instruction_does_what_this_cpu_does(
            values in proptest::array::uniform8(value()),
            memory in proptest::array::uniform32(any::<u8>()),
            flags in any::<u64>(),
        ) {
            for (name, code, defined) in INSTRUCTIONS.iter().filter(|(_, c, _)| host_has(c)) {
                let mut real_memory = memory;
                let base = real_memory.as_mut_ptr() as u64;
                let mut mock = Mock::new(base, memory.to_vec());
                let [rax, rcx, rdx, rbx, r8, r9, r10, r11] = values;
                let r = &mut mock.regs;
                (r.rax, r.rcx, r.rdx, r.rbx) = (rax, rcx, rdx, rbx);
                (r.r8, r.r9, r.r10, r.r11, r.rsi, r.rdi) = (r8, r9, r10, r11, base, 3);
                r.rflags = 0x202 | (flags & STATUS);
                let mut native = Native::from(&mock.regs);
                mock.run(code).unwrap();
                // SAFETY: these instructions change general registers, flags and `real_memory` only.
                unsafe { Code::new(code).run(&mut native) };
                let mut emulated = Native::from(&mock.regs);
                prop_assert_eq!(emulated.rflags & defined, native.rflags & defined, "{}", name);
                prop_assert_eq!(emulated.rflags & !STATUS, 0x202, "{}", name);
                (emulated.rflags, native.rflags) = (0, 0);
                prop_assert_eq!(emulated, native, "{}", name);
                prop_assert_eq!(&mock.memory[..], &real_memory[..], "{}", name);
                prop_assert_eq!(mock.regs.rip, 0x1000 + code.len() as u64);
            }
        }
    }

    #[test]
    fn a_fault_leaves_registers_as_they_were() {
        let mut mock = Mock::new(0x5000, vec![0; 8]);
        mock.regs.rsi = 0x5004;
        mock.regs.rax = 7;
        // popcnt rax, [rsi] reaches 4 bytes behind the memory's end.
        let e = mock.exception(&[0xf3, 0x48, 0x0f, 0xb8, 0x06]);
        assert_eq!((e.vector, e.cr2), (14, Some(0x5004)));
        assert_eq!((mock.regs.rax, mock.regs.rip, mock.regs.rflags), (7, 0x1000, 2));
    }
}
