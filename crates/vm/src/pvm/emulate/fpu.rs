//! x87 and SSE control: `fwait`, MXCSR, resets, and the 512-byte FXSAVE area.

use iced_x86::{Instruction, Mnemonic};

use super::{Machine, Trap, operand};
use crate::pvm::exception::Exception;
use crate::pvm::linear::cr;
use crate::pvm::xstate::{LEGACY, SSE, X87, legacy};

/// #MF.
const MF: Exception = Exception { vector: 16, error_code: None, cr2: None, trap: false };
/// x87 status word: an unmasked exception waits.
const FSW_ES: u16 = 1 << 7;
/// x87 status word: exception flags, stack fault, error summary, busy.
const FSW_EXCEPTIONS: u16 = 0x80ff;

/// Whether this file does `mnemonic`.
pub(super) fn knows(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Wait
            | Mnemonic::Ldmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Emms
            | Mnemonic::Fxsave
            | Mnemonic::Fxsave64
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
    )
}

/// #NM while CR0 has the FPU switched off, #UD while it says that there is none.
pub(super) fn available<M: Machine>(machine: &M) -> Result<(), Trap> {
    let cr0 = machine.sregs().cr0;
    if cr0 & cr::CR0_TS != 0 {
        return Err(Exception::NM.into());
    }
    if cr0 & cr::CR0_EM != 0 {
        return Err(Exception::UD.into());
    }
    Ok(())
}

/// Does one of them.
pub(super) fn execute<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    available(machine)?;
    match i.mnemonic() {
        Mnemonic::Wait => {
            if machine.xstate()?.u16_at(legacy::FSW) & FSW_ES != 0 {
                return Err(MF.into());
            }
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
            let value = operand::value(machine, i, 0)? as u32;
            let state = machine.xstate()?;
            if value & !state.mxcsr_mask() != 0 {
                return Err(Exception::GP.into());
            }
            state.set_mxcsr(value);
            machine.store_xstate()?;
        }
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => {
            let value = machine.xstate()?.mxcsr();
            operand::set_value(machine, i, 0, u64::from(value))?;
        }
        Mnemonic::Fninit => {
            let state = machine.xstate()?;
            state.reset_x87_control();
            machine.store_xstate()?;
        }
        Mnemonic::Fnclex => {
            let state = machine.xstate()?;
            let fsw = state.u16_at(legacy::FSW) & !FSW_EXCEPTIONS;
            state.set_u16_at(legacy::FSW, fsw);
            state.set_in_use(X87);
            machine.store_xstate()?;
        }
        Mnemonic::Emms => {
            let state = machine.xstate()?;
            state.set_u16_at(legacy::FTW, 0);
            state.set_in_use(X87);
            machine.store_xstate()?;
        }
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => fxsave(machine, i)?,
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => fxrstor(machine, i)?,
        _ => return Err(Trap::NoRemedy),
    }
    Ok(())
}

fn fxsave<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    let at = operand::aligned_address(machine, i, 0, 16)?;
    let wide = i.mnemonic() == Mnemonic::Fxsave64;
    let state = machine.xstate()?;
    let mut area = [0; LEGACY];
    state.read_legacy(&mut area, wide);
    // Bytes 416 to 511 are not written.
    machine.write(at, &area[..legacy::END])
}

fn fxrstor<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    let at = operand::aligned_address(machine, i, 0, 16)?;
    let wide = i.mnemonic() == Mnemonic::Fxrstor64;
    let mut area = [0; LEGACY];
    machine.read(at, &mut area)?;
    let state = machine.xstate()?;
    let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    if mxcsr & !state.mxcsr_mask() != 0 {
        return Err(Exception::GP.into());
    }
    state.write_x87(&area, wide);
    state.write_xmm(&area);
    state.set_mxcsr(mxcsr);
    state.set_in_use(X87 | SSE);
    machine.store_xstate()
}
