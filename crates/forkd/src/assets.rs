//! What a guest boots from, beside its root image: the kernel, and the initramfs with the agent.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use forkd_image::initramfs;

use crate::paths::Paths;

/// Target that the agent is built for first, and where cargo puts it below the target directory.
const AGENT_BUILDS: [&str; 2] = [
    "../x86_64-unknown-linux-musl/agent/forkd-agent",
    "../x86_64-unknown-linux-gnu/agent/forkd-agent",
];
/// Where packages put what belongs to forkd, seen from bin/.
const LIB: &str = "../lib/forkd";

/// Finds the guest kernel: `given`, or FORKD_KERNEL, or a packaged one, or the newest that
/// guest/kernel/build.sh built. Checks that it is one.
///
/// # Errors
/// There is none, or the file is no kernel.
pub fn kernel(given: Option<&Path>, paths: &Paths) -> Result<PathBuf> {
    if let Some(path) = given {
        check_kernel(path)?;
        return std::path::absolute(path)
            .with_context(|| format!("cannot find {}", path.display()));
    }
    if let Some(path) = env::var_os("FORKD_KERNEL").map(PathBuf::from) {
        check_kernel(&path).context("FORKD_KERNEL")?;
        return std::path::absolute(&path)
            .with_context(|| format!("cannot find {}", path.display()));
    }
    for path in kernel_places(paths) {
        if path.exists() {
            check_kernel(&path)?;
            // Not the link "current": it may move while VMs that were booted from it live.
            return fs::canonicalize(&path)
                .with_context(|| format!("cannot find {}", path.display()));
        }
    }
    bail!(
        "no guest kernel in {}: build one with `make kernel` (guest/kernel/build.sh), or give --kernel PATH",
        paths.cache.join("kernels").display()
    )
}

/// Where a kernel is looked for when none is named.
pub fn kernel_places(paths: &Paths) -> Vec<PathBuf> {
    let packaged = beside_binary(LIB).map(|lib| lib.join("vmlinux"));
    packaged.into_iter().chain([paths.cache.join("kernels/current/vmlinux")]).collect()
}

/// Checks that a file is a kernel that can be booted: ELF, or bzImage.
///
/// # Errors
/// The file can't be read, or is something else.
pub fn check_kernel(path: &Path) -> Result<()> {
    let file =
        File::open(path).with_context(|| format!("cannot open kernel {}", path.display()))?;
    if !file.metadata().with_context(|| format!("cannot look at {}", path.display()))?.is_file() {
        bail!("kernel {} is not a file", path.display());
    }
    let mut head = [0u8; 4];
    let elf = file.read_exact_at(&mut head, 0).is_ok() && &head == b"\x7fELF";
    // The magic of a bzImage's setup header: Documentation/arch/x86/boot.rst.
    let bzimage = file.read_exact_at(&mut head, 0x202).is_ok() && &head == b"HdrS";
    if !elf && !bzimage {
        bail!("{} is no kernel: neither an ELF vmlinux nor a bzImage", path.display());
    }
    Ok(())
}

/// Finds the guest agent: FORKD_AGENT, or beside this binary, or in cargo's target directory.
///
/// # Errors
/// There is none that could be a guest's PID 1.
pub fn agent() -> Result<PathBuf> {
    if let Some(path) = env::var_os("FORKD_AGENT") {
        return Ok(PathBuf::from(path));
    }
    let mut places = vec![PathBuf::from(LIB).join("forkd-agent"), PathBuf::from("forkd-agent")];
    places.extend(AGENT_BUILDS.iter().map(PathBuf::from));
    for place in places {
        let Some(path) = place.to_str().and_then(beside_binary) else { continue };
        // A plain `cargo build` leaves a dynamic one beside the binary, which can't be PID 1.
        if fs::read(&path).is_ok_and(|binary| initramfs::static_elf(&binary).is_ok()) {
            return fs::canonicalize(&path)
                .with_context(|| format!("cannot find {}", path.display()));
        }
    }
    bail!(
        "the guest agent is not built: run `make agent`, or set FORKD_AGENT to a static forkd-agent"
    )
}

/// Makes the initramfs, or finds it in the cache.
///
/// # Errors
/// No agent, or the cache can't be written.
pub fn initrd(paths: &Paths) -> Result<PathBuf> {
    Ok(initramfs::build(&agent()?, &paths.cache)?)
}

fn beside_binary(relative: &str) -> Option<PathBuf> {
    Some(env::current_exe().ok()?.parent()?.join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_by_content() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("k");
        let mut bzimage = vec![0u8; 0x210];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        for good in [b"\x7fELF".to_vec(), bzimage] {
            fs::write(&path, good).unwrap();
            check_kernel(&path).unwrap();
        }
        for bad in [&b""[..], b"#!/bin/sh", &[0u8; 0x300]] {
            fs::write(&path, bad).unwrap();
            assert!(check_kernel(&path).unwrap_err().to_string().contains("no kernel"));
        }
        assert!(check_kernel(tmp.path()).unwrap_err().to_string().contains("not a file"));
        let missing = check_kernel(Path::new("/nonexistent")).unwrap_err();
        assert!(format!("{missing:#}").contains("/nonexistent"));
    }
}
