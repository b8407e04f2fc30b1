//! System instructions: flags of SMAP, XCR0, time and CPU number, FS and GS base, random numbers; and those that
//! may be ignored.

use iced_x86::{Instruction, Mnemonic};

use super::{Machine, Segment, Trap, operand};
use crate::pvm::exception::Exception;
use crate::pvm::linear::{RFLAGS_AC, cr};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_AUX: u32 = 0xc000_0103;
const RFLAGS_CF: u64 = 1 << 0;
/// OF, SF, ZF, AF, PF, CF.
const RFLAGS_STATUS: u64 = 0x8d5;
/// CR4.FSGSBASE.
const CR4_FSGSBASE: u64 = 1 << 16;

/// Whether this file does `mnemonic`.
pub(super) fn knows(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Clac
            | Mnemonic::Stac
            | Mnemonic::Xgetbv
            | Mnemonic::Xsetbv
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::Rdfsbase
            | Mnemonic::Rdgsbase
            | Mnemonic::Wrfsbase
            | Mnemonic::Wrgsbase
            | Mnemonic::Rdrand
            | Mnemonic::Rdseed
    ) || is_no_operation(mnemonic)
}

/// Instructions without an effect on what a guest under PVM can see: hints, cache control of memory that is
/// coherent anyway, fences (an exit is one), landing pads, and MWAIT, which may return at once.
pub(in super::super) fn is_no_operation(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Nop
            | Mnemonic::Fnop
            | Mnemonic::Pause
            | Mnemonic::Endbr64
            | Mnemonic::Endbr32
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Cldemote
            | Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Wbnoinvd
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Serialize
            | Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Monitorx
            | Mnemonic::Mwaitx
            | Mnemonic::Tpause
    )
}

/// Does one of them.
pub(super) fn execute<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    match i.mnemonic() {
        Mnemonic::Clac => machine.regs().rflags &= !RFLAGS_AC,
        Mnemonic::Stac => machine.regs().rflags |= RFLAGS_AC,
        Mnemonic::Xgetbv => xgetbv(machine)?,
        Mnemonic::Xsetbv => xsetbv(machine)?,
        Mnemonic::Rdtscp => {
            let (tsc, aux) = (machine.msr(MSR_TSC)?, machine.msr(MSR_TSC_AUX)?);
            let regs = machine.regs();
            set_pair(&mut regs.rdx, &mut regs.rax, tsc);
            regs.rcx = aux & 0xffff_ffff;
        }
        Mnemonic::Rdpid => {
            let aux = machine.msr(MSR_TSC_AUX)?;
            operand::set_register(machine, i.op0_register(), aux & 0xffff_ffff)?;
        }
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => {
            fsgsbase_enabled(machine)?;
            let sregs = machine.sregs();
            let base = match segment(i) {
                Segment::Fs => sregs.fs.base,
                Segment::Gs => sregs.gs.base,
            };
            operand::set_register(machine, i.op0_register(), base)?;
        }
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            fsgsbase_enabled(machine)?;
            let base = operand::register(machine, i.op0_register())?;
            let context = crate::pvm::linear::Context::new(machine.sregs(), 0);
            if !context.is_canonical(base) {
                return Err(Exception::GP.into());
            }
            machine.set_base(segment(i), base);
        }
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            let value = machine.random()?;
            operand::set_register(machine, i.op0_register(), value)?;
            let regs = machine.regs();
            regs.rflags = (regs.rflags & !RFLAGS_STATUS) | RFLAGS_CF;
        }
        m if is_no_operation(m) => {}
        _ => return Err(Trap::NoRemedy),
    }
    Ok(())
}

fn segment(i: &Instruction) -> Segment {
    match i.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => Segment::Fs,
        _ => Segment::Gs,
    }
}

fn fsgsbase_enabled<M: Machine>(machine: &M) -> Result<(), Trap> {
    if machine.sregs().cr4 & CR4_FSGSBASE == 0 { Err(Exception::UD.into()) } else { Ok(()) }
}

fn osxsave_enabled<M: Machine>(machine: &M) -> Result<(), Trap> {
    if machine.sregs().cr4 & cr::CR4_OSXSAVE == 0 { Err(Exception::UD.into()) } else { Ok(()) }
}

/// ECX 0 reads XCR0; ECX 1 reads which of its components are in use.
fn xgetbv<M: Machine>(machine: &mut M) -> Result<(), Trap> {
    osxsave_enabled(machine)?;
    let index = machine.regs().rcx & 0xffff_ffff;
    let xcr0 = machine.xcr0()?;
    let value = match index {
        0 => xcr0,
        1 => xcr0 & machine.xstate()?.in_use(),
        _ => return Err(Exception::GP.into()),
    };
    let regs = machine.regs();
    set_pair(&mut regs.rdx, &mut regs.rax, value);
    Ok(())
}

fn xsetbv<M: Machine>(machine: &mut M) -> Result<(), Trap> {
    osxsave_enabled(machine)?;
    let kernel = machine.sregs().ss.dpl == 0;
    let regs = machine.regs();
    let value = (regs.rdx << 32) | (regs.rax & 0xffff_ffff);
    if !kernel || regs.rcx & 0xffff_ffff != 0 || !machine.set_xcr0(value)? {
        return Err(Exception::GP.into());
    }
    Ok(())
}

fn set_pair(high: &mut u64, low: &mut u64, value: u64) {
    *high = value >> 32;
    *low = value & 0xffff_ffff;
}
