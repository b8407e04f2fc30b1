//! What a guest boots from, beside its root image: the kernel, and the initramfs with the agent.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use forkd_image::initramfs;
use forkd_vm::{GuestMode, Host};

use crate::paths::Paths;

/// Target that the agent is built for first, and where cargo puts it below the target directory.
const AGENT_BUILDS: [&str; 2] = [
    "../x86_64-unknown-linux-musl/agent/forkd-agent",
    "../x86_64-unknown-linux-gnu/agent/forkd-agent",
];
/// Where packages put what belongs to forkd, seen from bin/.
const LIB: &str = "../lib/forkd";

/// A guest kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The file.
    pub path: PathBuf,
    /// How it runs kernel mode on this host.
    pub mode: GuestMode,
    /// What would be better, if anything would.
    pub advice: Option<&'static str>,
}

/// Where each flavour of the kernel is, if it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flavours {
    /// For all hosts.
    pub stock: Option<PathBuf>,
    /// For hosts whose PVM runs kernel mode natively.
    pub native: Option<PathBuf>,
}

/// Finds the guest kernel: `given`, or FORKD_KERNEL, or a packaged one, or the newest that
/// guest/kernel/build.sh built: of the flavour that the host can run quicker. Checks that it is one, and that it runs
/// here.
///
/// # Errors
/// There is none, or the file is no kernel, or not for this host.
pub fn kernel(given: Option<&Path>, paths: &Paths, host: &Host) -> Result<Kernel> {
    let mut advice = None;
    let path = if let Some(path) = given {
        named(path)?
    } else if let Some(path) = env::var_os("FORKD_KERNEL") {
        named(Path::new(&path)).context("FORKD_KERNEL")?
    } else {
        let path = match (Flavours::find(paths), host.native_pvm()) {
            (Flavours { native: Some(native), .. }, Ok(())) => Some(native),
            (Flavours { stock, .. }, Ok(())) => {
                advice = Some(
                    "this host runs guests' kernel mode natively, but there is no kernel for that: `make kernel`",
                );
                stock
            }
            (Flavours { stock, .. }, Err(_)) => stock,
        };
        let Some(path) = path else {
            bail!(
                "no guest kernel for this host in {}: build one with `make kernel` (guest/kernel/build.sh), or give \
                 --kernel PATH",
                paths.cache.join("kernels").display()
            )
        };
        check_kernel(&path)?;
        // Not the link "current": it may move while VMs that were booted from it live.
        fs::canonicalize(&path).with_context(|| format!("cannot find {}", path.display()))?
    };
    let mode = host.mode_for(&path)?;
    Ok(Kernel { path, mode, advice })
}

fn named(path: &Path) -> Result<PathBuf> {
    check_kernel(path)?;
    std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))
}

impl Flavours {
    /// Looks where a kernel is looked for when none is named.
    pub fn find(paths: &Paths) -> Self {
        let first = |packaged: &str, built: &str| {
            let packaged = beside_binary(LIB).map(|lib| lib.join(packaged));
            let built = paths.cache.join("kernels").join(built).join("vmlinux");
            packaged.into_iter().chain([built]).find(|path| path.exists())
        };
        Self { stock: first("vmlinux", "current"), native: first("vmlinux-pvm", "current-pvm") }
    }
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
    fn both_flavours_are_found_where_they_are_built() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = |name: &str| tmp.path().join(name);
        let paths = Paths { data: dir("d"), run: dir("r"), cache: dir("c") };
        assert_eq!(Flavours::find(&paths), Flavours { stock: None, native: None });
        for (link, digest) in [("current", "k1"), ("current-pvm", "k2")] {
            let kernels = paths.cache.join("kernels");
            fs::create_dir_all(kernels.join(digest)).unwrap();
            fs::write(kernels.join(digest).join("vmlinux"), b"\x7fELF").unwrap();
            std::os::unix::fs::symlink(digest, kernels.join(link)).unwrap();
        }
        let found = Flavours::find(&paths);
        let end = |path: Option<PathBuf>| path.is_some_and(|p| p.ends_with("current/vmlinux"));
        assert!(end(found.stock));
        assert!(found.native.is_some_and(|p| p.ends_with("current-pvm/vmlinux")));
    }

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
