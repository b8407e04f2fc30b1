//! The checks of `forkd doctor`. Each looks at one thing, and changes nothing.

use std::fs;
use std::path::Path;

use forkd_image::ImageStore;
use forkd_image::tools::{MKFS_EROFS, MMDEBSTRAP, SETPRIV, TAR, Tool, UNSHARE};
use forkd_sys::unix_path::MAX_DIRECT;
use forkd_vm::pvm::native::NotNative;
use forkd_vm::{Flavour, Host};
use rustix::process::Resource;

use super::Check;
use crate::assets::Flavours;
use crate::commands::image::PYTHON;
use crate::paths::Paths;
use crate::{assets, host, output};

/// What one VM takes beside its RAM: descriptors of the VM process, and of a command that talks to 1000 VMs.
const WANT_FILES: u64 = 4096;
/// A VM is one process with a thread per vCPU.
const WANT_PROCESSES: u64 = 4096;
/// Free memory below which even the quickstart is tight, in MiB.
const WANT_MEMORY_MIB: u64 = 2048;
/// Room for a kernel build, an image build and their results, in MiB.
const WANT_DISK_MIB: u64 = 4096;
/// Room for an image.
const NEED_DISK_MIB: u64 = 512;

/// All checks, in the order in which they should be fixed.
pub fn all(paths: &Paths) -> Vec<Check> {
    let host = host::open(paths);
    let mut checks = kvm(&host);
    checks.extend([
        huge_pages(),
        userfaultfd(),
        memfd(),
        memory(),
        open_files(),
        processes(),
        cgroup(),
        tools("image tools", &[MKFS_EROFS, TAR, SETPRIV], true),
        tools("Debian images", &[MMDEBSTRAP, UNSHARE], false),
        kernel(paths, &host),
        agent(),
        image(paths),
        disk("data", &paths.data),
        disk("cache", &paths.cache),
        run_directory(paths),
    ]);
    checks
}

fn kvm(host: &anyhow::Result<Host>) -> Vec<Check> {
    const NAME: &str = "KVM";
    let host = match host {
        Ok(host) => host,
        Err(e) => {
            let text = e.to_string();
            let (found, fix) = text.split_once(": ").unwrap_or((&text, "see above"));
            return vec![Check::fail(NAME, found, fix)];
        }
    };
    let name = host.flavour().name();
    let flavour = match (host.flavour(), host.native_pvm()) {
        (Flavour::Pvm, Ok(())) => {
            Check::ok(NAME, format!("{name}: guests' kernel mode runs natively (verified)"))
        }
        (Flavour::Pvm, Err(reason)) => Check::warn(
            NAME,
            format!(
                "{name}: guests' kernel mode is emulated, so a boot takes some 15 s; forks are quick; {reason}"
            ),
            match reason {
                NotNative::SwitchedOff => "unset FORKD_PVM",
                _ => "use a host with VT-x or SVM if boots must be quick",
            },
        ),
        (Flavour::Unknown, _) => {
            Check::warn(NAME, "works, but its module is unknown", "none needed if guests boot")
        }
        (Flavour::Vmx | Flavour::Svm, _) => Check::ok(NAME, name),
    };
    let create = match host.kvm().create_vm() {
        Ok(_) => Check::ok("KVM VM", "can be created"),
        Err(e) => Check::fail(
            "KVM VM",
            format!("can't be created: {e}"),
            "look at the kernel's log (dmesg); another hypervisor may have the CPU",
        ),
    };
    vec![flavour, create]
}

fn huge_pages() -> Check {
    const NAME: &str = "huge pages";
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let fix = format!("echo madvise > {PATH}");
    match fs::read_to_string(PATH) {
        Err(e) => Check::warn(
            NAME,
            format!("{PATH}: {e}"),
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
        Ok(text) => match chosen(&text) {
            Some("never") | None => {
                Check::warn(NAME, "never: forks copy many more page table entries", fix)
            }
            Some(mode) => Check::ok(NAME, mode),
        },
    }
}

/// The word in brackets.
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

fn userfaultfd() -> Check {
    const NAME: &str = "userfaultfd";
    let root = rustix::process::geteuid().is_root();
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    match allowed.as_deref().map(str::trim) {
        Err(_) => Check::warn(
            NAME,
            "the kernel has none: snapshots can't be branched live",
            "use a kernel with CONFIG_USERFAULTFD",
        ),
        Ok(_) if root => Check::ok(NAME, "there"),
        Ok("1") => Check::ok(NAME, "there, for all users"),
        Ok(_) if rustix::fs::access("/dev/userfaultfd", rustix::fs::Access::READ_OK).is_ok() => {
            Check::ok(NAME, "there, by /dev/userfaultfd")
        }
        Ok(_) => Check::warn(NAME, "for root only", "sysctl -w vm.unprivileged_userfaultfd=1"),
    }
}

fn memfd() -> Check {
    match rustix::fs::memfd_create("forkd-doctor", rustix::fs::MemfdFlags::CLOEXEC) {
        Ok(_) => Check::ok("memfd", "there"),
        Err(e) => Check::fail("memfd", e.to_string(), "use a kernel with CONFIG_MEMFD_CREATE"),
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    match (host::available_mib(), host::memory_mib()) {
        (Some(free), Some(total)) => {
            let found = format!("{free} of {total} MiB available");
            if free >= WANT_MEMORY_MIB {
                Check::ok(NAME, found)
            } else {
                Check::warn(NAME, found, "end what is not needed, or make smaller VMs (--mem)")
            }
        }
        _ => Check::warn(NAME, "/proc/meminfo does not tell", "mount /proc"),
    }
}

fn open_files() -> Check {
    limit(
        "open files",
        Resource::Nofile,
        WANT_FILES,
        "ulimit -Hn 65536 (or LimitNOFILE= of the service)",
    )
}

fn processes() -> Check {
    let fix = "ulimit -u 65536 (or TasksMax= of the service)";
    let by_user = limit("processes", Resource::Nproc, WANT_PROCESSES, fix);
    let max = fs::read_to_string("/proc/sys/kernel/pid_max")
        .ok()
        .and_then(|t| t.trim().parse::<u64>().ok());
    match max {
        Some(max) if max < WANT_PROCESSES => Check::warn(
            "processes",
            format!("kernel.pid_max is {max}"),
            "sysctl -w kernel.pid_max=4194304",
        ),
        _ => by_user,
    }
}

/// A resource limit. The hard one counts: forkd raises the soft one itself.
fn limit(name: &'static str, resource: Resource, want: u64, fix: &str) -> Check {
    match rustix::process::getrlimit(resource).maximum {
        None => Check::ok(name, "no limit"),
        Some(max) if max >= want => Check::ok(name, format!("at most {max}")),
        Some(max) => Check::warn(name, format!("at most {max}: too few for hundreds of VMs"), fix),
    }
}

fn cgroup() -> Check {
    const NAME: &str = "cgroup";
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Check::ok(NAME, "v2");
    }
    if Path::new("/sys/fs/cgroup/memory").is_dir() {
        return Check::ok(NAME, "v1");
    }
    Check::warn(NAME, "none is mounted", "mount -t cgroup2 none /sys/fs/cgroup")
}

fn tools(name: &'static str, tools: &[Tool], needed: bool) -> Check {
    let missing: Vec<&Tool> = tools.iter().filter(|t| t.find().is_none()).collect();
    if missing.is_empty() {
        let names: Vec<&str> = tools.iter().map(|t| t.name).collect();
        return Check::ok(name, names.join(", "));
    }
    let names: Vec<&str> = missing.iter().map(|t| t.name).collect();
    let packages: Vec<&str> = missing.iter().map(|t| t.package).collect();
    let (found, fix) = (
        format!("missing: {}", names.join(", ")),
        format!("apt-get install {}", packages.join(" ")),
    );
    if needed { Check::fail(name, found, fix) } else { Check::warn(name, found, fix) }
}

fn kernel(paths: &Paths, host: &anyhow::Result<Host>) -> Check {
    const NAME: &str = "guest kernel";
    const FIX: &str = "make kernel";
    let Flavours { stock, native } = Flavours::find(paths);
    let names = [("stock", stock), ("native PVM", native)];
    let there = names.iter().filter_map(|(name, path)| path.is_some().then_some(*name));
    let there = there.collect::<Vec<_>>().join(", ");
    let Ok(host) = host else {
        let found = if there.is_empty() { "none" } else { &there };
        return Check::warn(NAME, format!("{found}; which is needed depends on KVM"), "see above");
    };
    match assets::kernel(None, paths, host) {
        Ok(assets::Kernel { path, mode, advice }) => {
            let found = format!("{} ({}); there are: {there}", path.display(), mode.name());
            match advice {
                Some(advice) => Check::warn(NAME, format!("{found}; {advice}"), FIX),
                None => Check::ok(NAME, found),
            }
        }
        Err(e) => Check::fail(NAME, output::error_line(&e), FIX),
    }
}

fn agent() -> Check {
    match assets::agent() {
        Ok(path) => Check::ok("guest agent", path.display().to_string()),
        Err(e) => Check::fail("guest agent", output::error_line(&e), "make agent"),
    }
}

fn image(paths: &Paths) -> Check {
    const NAME: &str = "root image";
    const FIX: &str = "forkd image build";
    if !paths.data.join("images").is_dir() {
        return Check::warn(NAME, "none yet", FIX);
    }
    let resolved = ImageStore::open(&paths.data).and_then(|store| {
        let image = store.resolve(PYTHON)?;
        store.verify(&image)?;
        Ok(image)
    });
    match resolved {
        Ok(image) => Check::ok(NAME, format!("{PYTHON}, {}", image.record.recipe.summary())),
        Err(e) => Check::warn(NAME, e.to_string(), FIX),
    }
}

fn disk(name: &'static str, dir: &Path) -> Check {
    let existing = dir.ancestors().find(|d| d.is_dir()).unwrap_or(Path::new("/"));
    let stat = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat,
        Err(e) => {
            return Check::fail(
                name,
                format!("{}: {e}", existing.display()),
                "set FORKD_HOME, FORKD_CACHE",
            );
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    let found = format!("{}: {free} MiB free", dir.display());
    let fix = "free some, or set FORKD_HOME and FORKD_CACHE elsewhere";
    if rustix::fs::access(existing, rustix::fs::Access::WRITE_OK).is_err() {
        return Check::fail(
            name,
            format!("{} can't be written", existing.display()),
            "set FORKD_HOME, FORKD_CACHE",
        );
    }
    match free {
        free if free < NEED_DISK_MIB => Check::fail(name, found, fix),
        free if free < WANT_DISK_MIB => Check::warn(name, found, fix),
        _ => Check::ok(name, found),
    }
}

/// Sockets with long paths work, by way of a descriptor; other programs can't use them.
fn run_directory(paths: &Paths) -> Check {
    const NAME: &str = "run directory";
    let longest = paths.vm("vm-0123456789").join("vsock.sock");
    let len = longest.as_os_str().len();
    let found = paths.run.display().to_string();
    if len > MAX_DIRECT {
        return Check::warn(
            NAME,
            format!("{found}: its sockets' paths have {len} bytes, over {MAX_DIRECT}"),
            "set FORKD_HOME to a shorter path if programs other than forkd shall connect to them",
        );
    }
    Check::ok(NAME, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    #[test]
    fn the_chosen_word_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen("always madvise never"), None);
    }

    #[test]
    fn missing_tools_give_their_packages() {
        let tool = Tool { name: "forkd-no-such-tool", package: "some-package" };
        let check = tools("x", &[TAR, tool], true);
        assert_eq!(check.verdict, Verdict::Fail);
        assert_eq!(check.fix.as_deref(), Some("apt-get install some-package"));
        assert_eq!(tools("x", &[tool], false).verdict, Verdict::Warn);
    }

    #[test]
    fn what_is_amiss_always_has_a_fix() {
        let tmp = tempfile::tempdir().unwrap();
        let paths = Paths {
            data: tmp.path().join("d"),
            run: tmp.path().join("r".repeat(100)),
            cache: tmp.path().join("c"),
        };
        let checks = all(&paths);
        assert!(checks.iter().all(|c| (c.verdict == Verdict::Ok) == c.fix.is_none()));
        let verdict = |name| checks.iter().find(|c| c.name == name).map(|c| c.verdict);
        assert_eq!(verdict("run directory"), Some(Verdict::Warn));
        assert_eq!(verdict("root image"), Some(Verdict::Warn));
    }
}
