//! `xsave`, `xsaveopt`, `xsavec`, `xsaves`, `xrstor`, `xrstors` (Intel SDM volume 1, chapter 13).
//!
//! The supervisor forms act as their user forms: PVM has no supervisor state (IA32_XSS is 0). The "modified
//! optimisation" of XSAVEOPT and XSAVES, which skips what has not changed since it was loaded, is never taken.

use iced_x86::{Instruction, Mnemonic};

use super::{Machine, Trap, fpu, operand};
use crate::pvm::exception::Exception;
use crate::pvm::linear::cr;
use crate::pvm::xstate::{AVX, HEADER, LEGACY, Layout, MXCSR_DEFAULT, SSE, X87, Xstate, legacy};

/// XCOMP_BV: the area has the compacted format.
const COMPACTED: u64 = 1 << 63;
const ALIGN: u64 = 64;

/// How an instruction saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Save {
    /// Every component asked for.
    All,
    /// Those in use.
    InUse,
    /// Those in use, compacted.
    Compacted,
}

/// How an instruction restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Restore {
    /// Either format.
    Any,
    /// Only the compacted format.
    Compacted,
}

/// How `mnemonic` saves, if it does.
pub(super) fn saves(mnemonic: Mnemonic) -> Option<Save> {
    match mnemonic {
        Mnemonic::Xsave | Mnemonic::Xsave64 => Some(Save::All),
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => Some(Save::InUse),
        Mnemonic::Xsavec | Mnemonic::Xsavec64 | Mnemonic::Xsaves | Mnemonic::Xsaves64 => {
            Some(Save::Compacted)
        }
        _ => None,
    }
}

/// How `mnemonic` restores, if it does.
pub(super) fn restores(mnemonic: Mnemonic) -> Option<Restore> {
    match mnemonic {
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => Some(Restore::Any),
        Mnemonic::Xrstors | Mnemonic::Xrstors64 => Some(Restore::Compacted),
        _ => None,
    }
}

/// With REX.W the x87 pointers are 64 bits wide.
fn is_wide(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaves64
            | Mnemonic::Xrstor64
            | Mnemonic::Xrstors64
    )
}

/// What both directions begin with: checks, the area's address, XCR0, and the components asked for within it.
fn begin<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(u64, u64, u64), Trap> {
    if machine.sregs().cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(Exception::UD.into());
    }
    if machine.sregs().cr0 & cr::CR0_TS != 0 {
        return Err(Exception::NM.into());
    }
    fpu::available(machine)?;
    let at = operand::aligned_address(machine, i, 0, ALIGN)?;
    let xcr0 = machine.xcr0()?;
    let regs = machine.regs();
    let asked = (regs.rdx << 32) | (regs.rax & 0xffff_ffff);
    Ok((at, xcr0, asked & xcr0))
}

/// Saves.
pub(super) fn save<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    let how = saves(i.mnemonic()).ok_or(Trap::NoRemedy)?;
    let wide = is_wide(i.mnemonic());
    let (at, _, asked) = begin(machine, i)?;
    let layout = Layout::host();
    if how == Save::Compacted && !layout.has_compaction() {
        return Err(Exception::UD.into());
    }
    let state = machine.xstate()?.clone();
    // The compacted format has MXCSR with SSE alone, so a value of its own puts SSE in use.
    let mxcsr_in_use = how == Save::Compacted && state.mxcsr() != MXCSR_DEFAULT;
    let in_use = state.in_use() | if mxcsr_in_use { SSE } else { 0 };
    let written = if how == Save::All { asked } else { asked & in_use };
    let header = match how {
        Save::Compacted => {
            let mut header = [0; 16];
            header[..8].copy_from_slice(&written.to_le_bytes());
            header[8..].copy_from_slice(&(asked | COMPACTED).to_le_bytes());
            header.to_vec()
        }
        Save::All | Save::InUse => {
            let mut old = [0; 8];
            machine.read(at.wrapping_add(LEGACY as u64), &mut old)?;
            let kept = u64::from_le_bytes(old) & !asked;
            (kept | (asked & in_use)).to_le_bytes().to_vec()
        }
    };
    let has_mxcsr = match how {
        Save::Compacted => written & SSE != 0,
        Save::All | Save::InUse => asked & (SSE | AVX) != 0,
    };
    write_legacy(machine, at, &state, written, has_mxcsr, wide)?;
    if how == Save::Compacted {
        for (index, offset) in layout.compacted(asked, written) {
            machine.write(at.wrapping_add(offset as u64), state.component(index))?;
        }
    } else {
        write_components(machine, at, &state, written)?;
    }
    // Last, so that a fault on the way leaves the header as it was.
    machine.write(at.wrapping_add(LEGACY as u64), &header)
}

fn write_legacy<M: Machine>(
    machine: &mut M,
    at: u64,
    state: &Xstate,
    written: u64,
    has_mxcsr: bool,
    wide: bool,
) -> Result<(), Trap> {
    let mut area = [0; LEGACY];
    state.read_legacy(&mut area, wide);
    let mut put = |range: std::ops::Range<usize>| {
        machine.write(at.wrapping_add(range.start as u64), &area[range])
    };
    let (x87, sse) = (written & X87 != 0, written & SSE != 0);
    if x87 && sse && has_mxcsr {
        // The usual case: one piece.
        return put(0..legacy::END);
    }
    if x87 {
        put(legacy::CONTROL)?;
        put(legacy::ST)?;
    }
    if has_mxcsr {
        put(legacy::MXCSR_AND_MASK)?;
    }
    if sse {
        put(legacy::XMM)?;
    }
    Ok(())
}

/// Writes components in standard format; neighbours in one piece.
fn write_components<M: Machine>(
    machine: &mut M,
    at: u64,
    state: &Xstate,
    written: u64,
) -> Result<(), Trap> {
    let layout = Layout::host();
    let mut pieces = Vec::new();
    for index in (2..63u32).filter(|i| written & (1 << i) != 0) {
        let c = layout.component(index);
        pieces.push((c.offset, c.offset + c.len));
    }
    pieces.sort_unstable();
    pieces.dedup_by(|next, piece| {
        let adjacent = next.0 == piece.1;
        if adjacent {
            piece.1 = next.1;
        }
        adjacent
    });
    for (start, end) in pieces {
        let bytes = state.bytes().get(start..end).unwrap_or_default();
        machine.write(at.wrapping_add(start as u64), bytes)?;
    }
    Ok(())
}

/// Restores.
pub(super) fn restore<M: Machine>(machine: &mut M, i: &Instruction) -> Result<(), Trap> {
    let how = restores(i.mnemonic()).ok_or(Trap::NoRemedy)?;
    let wide = is_wide(i.mnemonic());
    let (at, xcr0, asked) = begin(machine, i)?;
    let layout = Layout::host();
    if how == Restore::Compacted && !layout.has_compaction() {
        return Err(Exception::UD.into());
    }
    let mut header = [0; HEADER];
    machine.read(at.wrapping_add(LEGACY as u64), &mut header)?;
    let word = |n: usize| {
        header[8 * n..8 * n + 8].iter().rev().fold(0u64, |w, b| (w << 8) | u64::from(*b))
    };
    let (present, format) = (word(0), word(1));
    let compacted = format & COMPACTED != 0;
    let valid = if compacted {
        let components = format & !COMPACTED;
        layout.has_compaction()
            && components & !xcr0 == 0
            && present & !components == 0
            && header[16..].iter().all(|b| *b == 0)
    } else {
        how == Restore::Any && present & !xcr0 == 0 && header[8..24].iter().all(|b| *b == 0)
    };
    if !valid {
        return Err(Exception::GP.into());
    }
    // Everything is read into a copy first: a fault must leave the state as it was.
    let mut state = machine.xstate()?.clone();
    let loaded = asked & present;
    read_legacy(machine, at, &mut state, asked, loaded, compacted, wide)?;
    if compacted {
        for (index, offset) in layout.compacted(format & !COMPACTED, loaded) {
            machine.read(at.wrapping_add(offset as u64), state.component_mut(index))?;
        }
    } else {
        for index in (2..63u32).filter(|i| loaded & (1 << i) != 0) {
            let offset = layout.component(index).offset;
            machine.read(at.wrapping_add(offset as u64), state.component_mut(index))?;
        }
    }
    state.reset(asked & !present);
    *machine.xstate()? = state;
    machine.store_xstate()
}

/// The legacy region's part. The standard format has MXCSR whenever SSE or AVX is asked for, even if neither is
/// present; in the compacted format it belongs to SSE alone.
fn read_legacy<M: Machine>(
    machine: &mut M,
    at: u64,
    state: &mut Xstate,
    asked: u64,
    loaded: u64,
    compacted: bool,
    wide: bool,
) -> Result<(), Trap> {
    let from_memory = if compacted { loaded & SSE != 0 } else { asked & (SSE | AVX) != 0 };
    let to_default = compacted && asked & SSE != 0 && loaded & SSE == 0;
    if loaded & (X87 | SSE) != 0 || from_memory {
        let mut area = [0; LEGACY];
        machine.read(at, &mut area[..legacy::END])?;
        let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
        if from_memory && mxcsr & !state.mxcsr_mask() != 0 {
            return Err(Exception::GP.into());
        }
        if loaded & X87 != 0 {
            state.write_x87(&area, wide);
        }
        if loaded & SSE != 0 {
            state.write_xmm(&area);
        }
        if from_memory {
            state.set_mxcsr(mxcsr);
        }
    }
    if to_default {
        state.set_mxcsr(MXCSR_DEFAULT);
    }
    Ok(())
}
