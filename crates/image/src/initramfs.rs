//! The initramfs: forkd's agent as /init, and a console node for the kernel to give it.
//!
//! It is the only thing of forkd's inside a guest. The archive is not compressed: the guest kernel would
//! spend more on decompression than the host spends on a megabyte of page cache. It is cached by the
//! digest of its bytes' source, the agent binary.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::cpio::Writer;
use crate::error::ImageError;

/// Part of the digest: changes when the layout below does.
const LAYOUT: &[u8] = b"forkd initramfs 1";
/// Larger binaries than this are a mistake: the agent is about a megabyte.
const MAX_AGENT_BYTES: u64 = 64 << 20;

/// Makes the initramfs that holds `agent`, or finds it in `cache` (`$CACHE/initramfs/<digest>.cpio`).
///
/// # Errors
/// The agent can't be read or is not a static x86-64 program; the cache can't be written.
pub fn build(agent: &Path, cache: &Path) -> Result<PathBuf, ImageError> {
    let binary = read_agent(agent)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(LAYOUT).update(&binary);
    let digest = hasher.finalize().to_hex();
    let dir = cache.join("initramfs");
    let path = dir.join(format!("{}.cpio", &digest[..32]));
    let archive = archive(&binary).map_err(|e| ImageError::io("cannot make", &path, e))?;
    // The name says what should be in it; a cut file would be a guest that dies without a word.
    if fs::metadata(&path).is_ok_and(|m| m.len() == archive.len() as u64) {
        return Ok(path);
    }
    fs::create_dir_all(&dir).map_err(|e| ImageError::io("cannot make", &dir, e))?;
    let mut staged = tempfile::NamedTempFile::new_in(&dir)
        .map_err(|e| ImageError::io("cannot write in", &dir, e))?;
    staged.write_all(&archive).map_err(|e| ImageError::io("cannot write", &path, e))?;
    staged.as_file().sync_all().map_err(|e| ImageError::io("cannot write", &path, e))?;
    staged.persist(&path).map_err(|e| ImageError::io("cannot write", &path, e.error))?;
    Ok(path)
}

fn archive(agent: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut writer = Writer::new(Vec::with_capacity(agent.len() + 4096));
    writer.directory("dev", 0o755)?;
    writer.char_device("dev/console", 0o600, 5, 1)?;
    writer.directory("proc", 0o755)?;
    writer.directory("sys", 0o755)?;
    writer.file("init", 0o755, agent)?;
    writer.finish()
}

fn read_agent(path: &Path) -> Result<Vec<u8>, ImageError> {
    let size = File::open(path)
        .and_then(|f| f.metadata())
        .map_err(|e| ImageError::io("cannot open the guest agent", path, e))?
        .len();
    if size > MAX_AGENT_BYTES {
        let reason = format!("it has {size} bytes, more than {MAX_AGENT_BYTES}");
        return Err(ImageError::Agent { path: path.to_path_buf(), reason });
    }
    let binary =
        fs::read(path).map_err(|e| ImageError::io("cannot read the guest agent", path, e))?;
    match static_elf(&binary) {
        Ok(()) => Ok(binary),
        Err(reason) => {
            Err(ImageError::Agent { path: path.to_path_buf(), reason: reason.to_string() })
        }
    }
}

/// Checks for a static x86-64 ELF program: nothing to load, so no PT_INTERP.
///
/// # Errors
/// What it is instead.
pub fn static_elf(binary: &[u8]) -> Result<(), &'static str> {
    /// e_machine of x86-64, and p_type of PT_INTERP: elf(5).
    const EM_X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    let half = |at: usize| -> Option<u16> {
        Some(u16::from_le_bytes(binary.get(at..at.checked_add(2)?)?.try_into().ok()?))
    };
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(binary.get(at..at.checked_add(4)?)?.try_into().ok()?))
    };
    if binary.get(..5) != Some(&b"\x7fELF\x02"[..]) || half(18) != Some(EM_X86_64) {
        return Err("it is no 64-bit x86 ELF program");
    }
    let cut = "its ELF header is cut short";
    let table = binary
        .get(32..40)
        .and_then(|b| b.try_into().ok())
        .map(u64::from_le_bytes)
        .and_then(|offset| usize::try_from(offset).ok())
        .ok_or(cut)?;
    let (size, count) = (usize::from(half(54).ok_or(cut)?), usize::from(half(56).ok_or(cut)?));
    for index in 0..count {
        let at = size.checked_mul(index).and_then(|o| o.checked_add(table)).ok_or(cut)?;
        if word(at).ok_or(cut)? == PT_INTERP {
            return Err("it is dynamically linked; `make agent` builds a static one");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest thing that passes for a static program.
    fn fake_agent() -> Vec<u8> {
        let mut elf = vec![0u8; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[18] = 62;
        elf[54] = 56;
        elf
    }

    #[test]
    fn it_is_made_once_and_found_again() {
        let tmp = tempfile::tempdir().unwrap();
        let agent = tmp.path().join("agent");
        fs::write(&agent, fake_agent()).unwrap();
        let first = build(&agent, tmp.path()).unwrap();
        let modified = fs::metadata(&first).unwrap().modified().unwrap();
        assert_eq!(build(&agent, tmp.path()).unwrap(), first);
        assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), modified);
        let mut other = fake_agent();
        other.push(1);
        fs::write(&agent, other).unwrap();
        assert_ne!(build(&agent, tmp.path()).unwrap(), first);
    }

    #[test]
    fn a_cut_cache_file_is_made_anew() {
        let tmp = tempfile::tempdir().unwrap();
        let agent = tmp.path().join("agent");
        fs::write(&agent, fake_agent()).unwrap();
        let path = build(&agent, tmp.path()).unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..100]).unwrap();
        assert_eq!(fs::read(build(&agent, tmp.path()).unwrap()).unwrap(), whole);
    }

    #[test]
    fn only_static_programs_are_taken() {
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(static_elf(&own).unwrap_err().contains("dynamically"));
        assert!(static_elf(b"#!/bin/sh\n").is_err());
        assert!(static_elf(&own[..60]).is_err());
        assert_eq!(static_elf(&fake_agent()), Ok(()));
        let mut hostile = fake_agent();
        hostile[32..40].fill(0xff);
        hostile[56] = 2;
        assert!(static_elf(&hostile).is_err());
    }
}
