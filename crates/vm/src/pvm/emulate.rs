//! The instructions that KVM's emulator lacks, done on a [`Machine`].
//!
//! Each family has a file. Nothing here knows KVM: [`Machine`] gives registers, memory and extended state, so
//! that the tests can compare every instruction with the CPU they run on. An instruction either completes, or
//! raises an exception and leaves registers as they were.

mod atomic;
mod fpu;
mod integer;
mod operand;
mod system;
#[cfg(test)]
pub(super) mod testing;
mod xsave;
#[cfg(test)]
mod xsave_tests;

use iced_x86::{Instruction, Mnemonic};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::PvmError;
use super::exception::Exception;
use super::metrics::{Metrics, count};
use super::xstate::Xstate;

pub(super) use system::is_no_operation;

/// What an instruction acts upon.
pub(super) trait Machine {
    /// General registers; RIP is the instruction's own.
    fn regs(&mut self) -> &mut kvm_regs;
    /// Segment and control registers.
    fn sregs(&self) -> &kvm_sregs;
    /// Sets the base of FS or GS.
    fn set_base(&mut self, segment: Segment, base: u64);
    /// Reads memory by linear address.
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Trap>;
    /// Writes memory by linear address.
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Trap>;
    /// Compares 16 aligned bytes with `expected` and, if equal, replaces them by `new`; atomic with regard to
    /// every vCPU. Gives what was there.
    fn compare_exchange(&mut self, address: u64, expected: u128, new: u128) -> Result<u128, Trap>;
    /// The extended state.
    fn xstate(&mut self) -> Result<&mut Xstate, Trap>;
    /// Makes what was changed through [`Self::xstate`] the CPU's.
    fn store_xstate(&mut self) -> Result<(), Trap>;
    /// XCR0.
    fn xcr0(&mut self) -> Result<u64, Trap>;
    /// Sets XCR0. False if it is not a valid value.
    fn set_xcr0(&mut self, value: u64) -> Result<bool, Trap>;
    /// A model-specific register.
    fn msr(&mut self, index: u32) -> Result<u64, Trap>;
    /// Random bytes.
    fn random(&mut self) -> Result<u64, Trap>;
}

/// Segments whose base matters in 64-bit mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Segment {
    Fs,
    Gs,
}

/// Why an instruction did not complete.
#[derive(Debug)]
pub(super) enum Trap {
    /// It raised an exception.
    Exception(Exception),
    /// There is no remedy for it here.
    NoRemedy,
    /// The host failed.
    Failed(PvmError),
}

impl From<Exception> for Trap {
    fn from(e: Exception) -> Self {
        Self::Exception(e)
    }
}

impl From<PvmError> for Trap {
    fn from(e: PvmError) -> Self {
        Self::Failed(e)
    }
}

/// Does one instruction, and moves RIP behind it.
pub(super) fn execute<M: Machine>(
    machine: &mut M,
    instruction: &Instruction,
    metrics: &Metrics,
) -> Result<(), Trap> {
    let counter = match instruction.mnemonic() {
        Mnemonic::Int3 => {
            count(&metrics.int3);
            advance(machine, instruction);
            return Err(Exception::BP.into());
        }
        Mnemonic::Popcnt => {
            integer::execute(machine, instruction)?;
            &metrics.popcnt
        }
        Mnemonic::Cmpxchg16b => {
            atomic::cmpxchg16b(machine, instruction)?;
            &metrics.cmpxchg16b
        }
        Mnemonic::Clac | Mnemonic::Stac => {
            system::execute(machine, instruction)?;
            &metrics.clac_stac
        }
        Mnemonic::Wait => {
            fpu::execute(machine, instruction)?;
            &metrics.fwait
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
            fpu::execute(machine, instruction)?;
            &metrics.ldmxcsr
        }
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => {
            fpu::execute(machine, instruction)?;
            &metrics.stmxcsr
        }
        m if fpu::knows(m) => {
            fpu::execute(machine, instruction)?;
            &metrics.fpu
        }
        m if xsave::saves(m).is_some() => {
            xsave::save(machine, instruction)?;
            &metrics.xsave
        }
        m if xsave::restores(m).is_some() => {
            xsave::restore(machine, instruction)?;
            &metrics.xrstor
        }
        m if system::knows(m) => {
            system::execute(machine, instruction)?;
            &metrics.system
        }
        m if integer::knows(m) => {
            integer::execute(machine, instruction)?;
            &metrics.integer
        }
        _ => return Err(Trap::NoRemedy),
    };
    count(counter);
    advance(machine, instruction);
    Ok(())
}

fn advance<M: Machine>(machine: &mut M, instruction: &Instruction) {
    let regs = machine.regs();
    regs.rip = regs.rip.wrapping_add(instruction.len() as u64);
}
