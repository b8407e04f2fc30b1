//! What the tests share: facts, snapshots of given bytes, and reading them back.
#![allow(dead_code, missing_docs, reason = "each test uses some of it")]

pub mod cut;
pub mod scenario;

use std::collections::BTreeMap;
use std::path::PathBuf;

use forkd_snapshot::{
    CpuModel, Facts, ImageRef, KvmFlavour, Mode, Platform, Resolved, Snapshot, SnapshotError,
    Staged, Store, Verification,
};

pub const PAGE: usize = 4096;
pub const MIB: usize = 1 << 20;
/// Length of the disk of [`fill`].
pub const DISK_BYTES: u64 = 64 * PAGE as u64;

pub fn platform() -> Platform {
    let cpu = CpuModel {
        vendor: "AuthenticAMD".into(),
        name: "AMD EPYC".into(),
        family: 25,
        model: 17,
        stepping: 1,
    };
    Platform { arch: "x86_64".into(), cpu, kvm: KvmFlavour::Pvm, page_size: 4096 }
}

/// Facts that are the same each time.
pub fn facts(mem_mib: u64, mode: Mode) -> Facts {
    Facts {
        created_unix_ms: 1_700_000_000_000,
        forkd: "0.1.0".into(),
        platform: platform(),
        kernel: "k".repeat(64),
        image: ImageRef { digest: "i".repeat(64), tag: Some("py".into()) },
        vcpus: 1,
        mem_mib,
        mode,
        instant: None,
    }
}

/// What is written of a file: pages, each of one byte; 0 for a zero page.
pub type Pages = BTreeMap<usize, u8>;

/// A page that differs at each offset, or is zero.
pub fn page(byte: u8) -> Vec<u8> {
    (0..PAGE).map(|at| if byte == 0 { 0 } else { byte ^ (at % 251) as u8 }).collect()
}

pub fn write_pages(
    writer: &forkd_snapshot::PageWriter,
    pages: &Pages,
) -> Result<(), SnapshotError> {
    for (index, byte) in pages {
        writer.write((index * PAGE) as u64, &page(*byte))?;
    }
    Ok(())
}

pub fn put(
    store: &Store,
    tag: &str,
    parent: Option<&str>,
    mib: usize,
    pages: &Pages,
    disk: &Pages,
) -> Result<Snapshot, SnapshotError> {
    let mut staged = store.stage(tag, parent)?;
    fill(&mut staged, mib, pages, disk)?;
    let mode = if parent.is_some() { Mode::Diff } else { Mode::Fork };
    staged.commit(facts(mib as u64, mode))
}

/// Writes memory, one disk of 64 pages (whole), and state.
pub fn fill(
    staged: &mut Staged,
    mib: usize,
    pages: &Pages,
    disk: &Pages,
) -> Result<(), SnapshotError> {
    write_pages(&staged.memory((mib * MIB) as u64)?, pages)?;
    write_pages(&staged.disk(DISK_BYTES, true)?, disk)?;
    let state = format!("state of {}", staged.tag());
    staged.state(state.as_bytes())
}

pub fn pages<const N: usize>(pages: [(usize, u8); N]) -> Pages {
    pages.into()
}

/// The bytes that pages make over others.
pub fn over(base: &[u8], pages: &Pages) -> Vec<u8> {
    let mut bytes = base.to_vec();
    for (index, byte) in pages {
        bytes[index * PAGE..][..PAGE].copy_from_slice(&page(*byte));
    }
    bytes
}

pub fn bytes_of(resolved: &Resolved) -> Vec<u8> {
    let mut bytes = vec![0xee; resolved.len as usize];
    resolved.read_at(0, &mut bytes).expect("read");
    bytes
}

/// Memory as it would be restored, every hash checked.
pub fn memory_of(store: &Store, tag: &str) -> Vec<u8> {
    bytes_of(&store.load(tag, Verification::Always).expect(tag).memory)
}

/// A directory on tmpfs where there is one: what is tested does not depend on the disk.
pub fn temp() -> tempfile::TempDir {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.expect("a directory")
}
