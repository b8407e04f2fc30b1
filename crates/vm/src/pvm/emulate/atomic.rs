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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::pvm::emulate::testing::{Code, Mock, Native};

    /// `lock cmpxchg16b [rsi]`.
    const CODE: [u8; 5] = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];

    #[repr(align(16))]
    struct Aligned([u8; 32]);

    proptest! {
        #[test]
        fn cmpxchg16b_does_what_this_cpu_does(
            memory in proptest::array::uniform32(any::<u8>()),
            new in any::<(u64, u64)>(),
            other in any::<(u64, u64)>(),
            equal in any::<bool>(),
            flags in any::<u64>(),
        ) {
            let code = &CODE[..];
            let mut real = Aligned(memory);
            let base = real.0.as_mut_ptr() as u64;
            let mut mock = Mock::new(base, memory.to_vec());
            let word = |at: usize| u64::from_le_bytes(memory[at..at + 8].try_into().unwrap());
            let (low, high) = if equal { (word(16), word(24)) } else { other };
            let r = &mut mock.regs;
            (r.rax, r.rdx, r.rbx, r.rcx, r.rsi) = (low, high, new.0, new.1, base + 16);
            r.rflags = 0x202 | (flags & 0x8d5);
            let mut native = Native::from(&mock.regs);
            mock.run(code).unwrap();
            // SAFETY: it changes registers and `real` only.
            unsafe { Code::new(code).run(&mut native) };
            prop_assert_eq!(Native::from(&mock.regs), native);
            prop_assert_eq!(&mock.memory[..], &real.0[..]);
        }
    }

    #[test]
    fn an_unaligned_operand_is_a_general_protection_fault() {
        let mut mock = Mock::new(0x1000, vec![0; 64]);
        mock.regs.rsi = 0x1008;
        let e = mock.exception(&CODE);
        assert_eq!((e.vector, e.error_code), (13, Some(0)));
    }
}
