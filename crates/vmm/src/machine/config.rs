//! Checks of a [`VmConfig`] before anything is built: each names the thing and what to do.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use forkd_api::types::VmConfig;
use forkd_vm::layout::{MAX_RAM, MAX_VCPUS, MIN_RAM};

use crate::process::VmmError;

/// Longest name of a VM: Linux's limit on host names.
pub const MAX_NAME: usize = 63;

/// Most block devices of a VM: the virtio slots that pmem, rng and vsock leave over.
pub const MAX_DRIVES: usize = 8;

/// Checks a configuration.
///
/// # Errors
/// One line about the first thing that is wrong.
pub fn check(config: &VmConfig) -> Result<(), VmmError> {
    let wrong = |text: String| Err(VmmError::Config(text));
    if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
        return wrong(format!("{} vCPUs: give 1 to {MAX_VCPUS}", config.vcpus));
    }
    let bytes = u64::from(config.mem_mib) << 20;
    if !(MIN_RAM..=MAX_RAM).contains(&bytes) {
        let (least, most) = (MIN_RAM >> 20, MAX_RAM >> 20);
        return wrong(format!("{} MiB of memory: give {least} to {most} MiB", config.mem_mib));
    }
    if !is_name(&config.name) {
        return wrong(format!(
            "the name {:?} is not a host name: give 1 to {MAX_NAME} letters, digits or hyphens",
            config.name
        ));
    }
    if config.drives.len() > MAX_DRIVES {
        return wrong(format!("{} drives: at most {MAX_DRIVES} fit", config.drives.len()));
    }
    for (index, drive) in config.drives.iter().enumerate() {
        match (&drive.path, drive.size_mib) {
            (None, None | Some(0)) => {
                return wrong(format!("drive {index} has neither a path nor a size: give one"));
            }
            (None, _) if drive.read_only => {
                return wrong(format!(
                    "drive {index} is read-only and has no path: it is all zeroes"
                ));
            }
            _ => {}
        }
    }
    check_kernel(&config.kernel)?;
    readable("initramfs", &config.initrd)?;
    let root = readable("root image", &config.root)?;
    check_root(&config.root, root)
}

/// Whether a name can be a host name.
pub fn is_name(name: &str) -> bool {
    let edge = |b: u8| b.is_ascii_alphanumeric();
    let bytes = name.as_bytes();
    bytes.len() <= MAX_NAME
        && bytes.first().is_some_and(|b| edge(*b))
        && bytes.last().is_some_and(|b| edge(*b))
        && bytes.iter().all(|b| edge(*b) || matches!(b, b'-' | b'.'))
}

fn readable(what: &str, path: &Path) -> Result<File, VmmError> {
    let file = File::open(path).map_err(|e| {
        VmmError::Config(format!("the {what} {} can't be read: {e}", path.display()))
    })?;
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(file),
        Ok(_) => Err(VmmError::Config(format!("the {what} {} is not a file", path.display()))),
        Err(e) => {
            Err(VmmError::Config(format!("the {what} {} can't be read: {e}", path.display())))
        }
    }
}

fn check_kernel(path: &Path) -> Result<(), VmmError> {
    let mut file = readable("kernel", path)?;
    let mut head = [0; 0x206];
    let count = read_up_to(&mut file, &mut head).map_err(|e| {
        VmmError::Config(format!("the kernel {} can't be read: {e}", path.display()))
    })?;
    // ELF magic; "HdrS" at 0x202 is the boot protocol's (Documentation/arch/x86/boot.rst).
    let elf = count >= 4 && head[..4] == *b"\x7fELF";
    let bzimage = count == head.len() && head[0x202..0x206] == *b"HdrS";
    if elf || bzimage {
        Ok(())
    } else {
        Err(VmmError::Config(format!(
            "{} is not a kernel: give an ELF vmlinux or a bzImage",
            path.display()
        )))
    }
}

/// EROFS's magic, at byte 1024 (include/uapi/linux/magic.h, EROFS_SUPER_MAGIC_V1).
const EROFS_MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

fn check_root(path: &Path, mut file: File) -> Result<(), VmmError> {
    let mut head = [0; 1028];
    let count = read_up_to(&mut file, &mut head).map_err(|e| {
        VmmError::Config(format!("the root image {} can't be read: {e}", path.display()))
    })?;
    if count == head.len() && head[1024..] == EROFS_MAGIC {
        Ok(())
    } else {
        Err(VmmError::Config(format!(
            "the root image {} is not an EROFS file system: build it with `forkd image build`",
            path.display()
        )))
    }
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match file.read(&mut buffer[count..])? {
            0 => break,
            n => count += n,
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_api::types::DriveConfig;
    use std::fs;

    fn config(dir: &Path) -> VmConfig {
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let mut root = vec![0; 2048];
        root[1024..1028].copy_from_slice(&EROFS_MAGIC);
        VmConfig {
            id: "vm-0".into(),
            name: "zero".into(),
            dir: dir.join("run"),
            kernel: file("vmlinux", b"\x7fELF..."),
            initrd: file("initrd", b"0707"),
            root: file("root", &root),
            image: "i".into(),
            image_digest: "d".into(),
            vcpus: 1,
            mem_mib: 512,
            cmdline: String::new(),
            drives: Vec::new(),
            boot_timeout_s: 60,
            pvm: Default::default(),
        }
    }

    #[test]
    fn each_wrong_thing_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        let good = config(tmp.path());
        check(&good).unwrap();
        let says = |change: &dyn Fn(&mut VmConfig), word: &str| {
            let mut config = good.clone();
            change(&mut config);
            let text = check(&config).unwrap_err().to_string();
            assert!(text.contains(word) && text.lines().count() == 1, "{text}");
        };
        says(&|c| c.vcpus = 0, "0 vCPUs");
        says(&|c| c.vcpus = 17, "17 vCPUs");
        says(&|c| c.mem_mib = 0, "0 MiB");
        says(&|c| c.mem_mib = 65_537, "65537 MiB");
        says(&|c| c.name = "a b".into(), "a b");
        says(&|c| c.kernel = "/nonexistent".into(), "/nonexistent");
        says(&|c| c.kernel = tmp.path().into(), "not a file");
        says(&|c| c.kernel = c.initrd.clone(), "not a kernel");
        says(&|c| c.root = c.initrd.clone(), "forkd image build");
        let drive = |path, size_mib, read_only| DriveConfig { path, size_mib, read_only };
        says(&|c| c.drives = vec![drive(None, None, false)], "drive 0");
        says(&|c| c.drives = vec![drive(None, Some(1), true)], "read-only");
        says(&|c| c.drives = vec![drive(None, Some(1), false); 9], "9 drives");
    }

    #[test]
    fn names_are_host_names() {
        for good in ["a", "vm-1", "a.b", "0"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a_b", "a/b", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
