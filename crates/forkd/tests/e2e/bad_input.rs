//! Input that cannot work and is found out before a guest boots: one line that names the thing, and nothing left.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use forkd_api::client::Client;
use forkd_api::types::VmInfo;
use serde_json::Value;

use crate::command::{Output, Run};
use crate::fixture::{Suite, names};
use crate::leftovers::home_is_empty;
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["bad_input":
    kernels_that_are_none 60,
    images_that_are_missing_or_corrupt 120,
    too_much_memory_and_none 60,
    too_many_children_and_none 180,
    tags_that_are_unknown_taken_or_malformed 60,
    warm_up_files_that_cannot_be_read 60,
    disks_that_are_none 60,
    image_sources_that_are_none 60,
    names_that_are_no_host_names 60,
    no_kvm 60,
    kvm_that_is_not_permitted 60,
    a_full_disk 60,
    a_vm_killed_while_it_boots 60,
    an_interrupted_boot 60,
];

/// `snapshot create x ARGS` in a home that has the Python image.
fn create<'a>(suite: &Suite, args: impl IntoIterator<Item = &'a str>) -> Result<Run> {
    let home = suite.scratch("bad-home")?;
    suite.link_image(&home)?;
    Ok(suite.forkd_in(&home, ["snapshot", "create", "x", "--json"]).args(args))
}

/// It fails as [`Output::one_line`] says, and leaves nothing in that home.
fn refused(suite: &Suite, output: Output, words: &[&str]) -> Result<String> {
    let line = output.one_line(words)?;
    home_is_empty(&suite.scratch("bad-home")?)?;
    Ok(line)
}

fn kernels_that_are_none(suite: &Suite) -> Result<()> {
    let dir = suite.scratch("bad-kernels")?;
    let text = dir.join("text");
    fs::write(&text, "not a kernel")?;
    let empty = dir.join("empty");
    fs::write(&empty, "")?;
    // ELF by its first bytes only.
    let cut = dir.join("cut");
    fs::write(&cut, b"\x7fELF\x02\x01\x01")?;
    for path in [Path::new("/nonexistent/vmlinux"), &dir, &text, &empty, &cut] {
        let shown = path.to_string_lossy();
        let said = create(suite, ["--kernel", &shown, "--boot-timeout", "20"])?.output()?;
        refused(suite, said, &[&shown])?;
    }
    // ELF, but of a program: it is loaded, and does not get far.
    let program = suite.programs()?.join("guest").to_string_lossy().into_owned();
    let said = create(suite, ["--kernel", &program, "--boot-timeout", "20"])?.output()?;
    refused(suite, said, &["vm-"])?;
    let said = create(suite, [])?.env("FORKD_KERNEL", &text).output()?;
    refused(suite, said, &["FORKD_KERNEL", &text.to_string_lossy()])?;
    Ok(())
}

/// A home whose image "python" is a copy, to be spoilt.
fn home_with_copy(suite: &Suite, name: &str) -> Result<(PathBuf, PathBuf)> {
    let good = suite.scratch("bad-home")?;
    suite.link_image(&good)?;
    let digest = fs::read_link(good.join("images/by-tag/python"))?;
    let digest = digest.file_name().context("a digest")?;
    let home = suite.scratch(name)?;
    let dir = home.join("images").join(digest);
    fs::create_dir_all(&dir)?;
    fs::create_dir_all(home.join("images/by-tag"))?;
    symlink(Path::new("..").join(digest), home.join("images/by-tag/python"))?;
    for file in ["root.erofs", "image.json"] {
        fs::copy(good.join("images").join(digest).join(file), dir.join(file))?;
    }
    Ok((home, dir))
}

fn images_that_are_missing_or_corrupt(suite: &Suite) -> Result<()> {
    let said = create(suite, ["--image", "nosuchimage"])?.output()?;
    refused(suite, said, &["nosuchimage", "forkd image"])?;

    let (home, dir) = home_with_copy(suite, "corrupt-home")?;
    let root = dir.join("root.erofs");
    let spoilt = |words: &[&str]| -> Result<()> {
        let said = suite.forkd_in(&home, ["snapshot", "create", "x", "--json"]).output()?;
        said.one_line(words)?;
        home_is_empty(&home)
    };
    let path = root.to_string_lossy().into_owned();
    let file = fs::File::options().read(true).write(true).open(&root)?;
    let mut byte = [0];
    let middle = file.metadata()?.len() / 2;
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[!byte[0]], middle)?;
    spoilt(&[&path])?;
    file.set_len(middle)?;
    spoilt(&[&path])?;
    file.set_len(0)?;
    spoilt(&[&path])?;
    fs::remove_file(&root)?;
    spoilt(&[&path])?;
    fs::write(dir.join("image.json"), "{")?;
    spoilt(&["image.json"])?;
    fs::remove_dir_all(&home)?;
    Ok(())
}

fn too_much_memory_and_none(suite: &Suite) -> Result<()> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib: u64 = text.split_whitespace().nth(1).context("MemTotal")?.parse()?;
    let too_much = (kib / 1024 + 1).min(65_536).to_string();
    for bad in ["0", "1", "65537", "18446744073709551615", &too_much] {
        let said = create(suite, ["--mem", bad])?.output()?;
        refused(suite, said, &["--mem", bad])?;
    }
    for bad in ["-1", "512M", "99999999999999999999"] {
        let said = create(suite, ["--mem", bad])?.output()?.status_is(2)?;
        refused(suite, said, &[bad])?;
    }
    Ok(())
}

fn too_many_children_and_none(suite: &Suite) -> Result<()> {
    suite.warm()?;
    for bad in ["0", "-1", "1025", "100000"] {
        let said = suite.forkd(["fork", "warm", "--json", "-n", bad]).output()?;
        said.one_line(&["-n", bad, "1024"])?;
    }
    ensure!(suite.ls()?.is_empty(), "none was forked");
    let vm = suite.fork_one()?;
    for bad in ["0", "100000"] {
        suite.forkd(["branch", &vm.id, "-n", bad]).output()?.one_line(&["-n", bad])?;
    }
    // Past the command line's check.
    let none = forkd_api::types::ForkRequest::default();
    let error = vm.api()?.send_json("POST", "/fork", &none).err().context("no children at all")?;
    ensure!(error.status() == Some(400), "{error}");
    ensure!(suite.ls()? == [vm.id.clone()] && vm.value("base")? == "1000");
    Ok(())
}

fn tags_that_are_unknown_taken_or_malformed(suite: &Suite) -> Result<()> {
    suite.warm()?;
    suite.forkd(["fork", "unknown"]).output()?.one_line(&["unknown", "forkd snapshot"])?;
    let taken = suite.forkd(["snapshot", "create", "warm", "--json"]).output()?;
    taken.one_line(&["warm", "exists", "forkd snapshot rm"])?;
    for bad in ["a/b", "../escape", "", ".hidden", "UPPER", "sp ace"] {
        for verb in
            [&["snapshot", "create"][..], &["fork"], &["snapshot", "rm"], &["snapshot", "info"]]
        {
            let line = suite.forkd(verb).args(["--", bad]).output()?.one_line(&["tag"])?;
            ensure!(line.contains(&format!("{bad:?}")), "{line}");
        }
    }
    ensure!(names(&suite.snapshots_dir())?.iter().all(|n| n == "warm" || n == "smp"));
    ensure!(names(suite.root())?.iter().all(|n| n != "escape"));
    Ok(())
}

fn warm_up_files_that_cannot_be_read(suite: &Suite) -> Result<()> {
    let dir = suite.scratch("bad-warm")?;
    let binary = dir.join("binary.py");
    fs::write(&binary, [0xff, 0xfe, 0])?;
    for path in [Path::new("/nonexistent/warm.py"), &dir, &binary] {
        let shown = path.to_string_lossy();
        let said = create(suite, ["--warm", &shown])?.output()?;
        refused(suite, said, &[&shown])?;
    }
    let both = create(suite, ["--warm", "a", "--warm-code", "b"])?.output()?.status_is(2)?;
    refused(suite, both, &["--warm"])?;
    Ok(())
}

fn disks_that_are_none(suite: &Suite) -> Result<()> {
    let dir = suite.scratch("bad-disks")?;
    fs::write(dir.join("empty"), "")?;
    let empty = dir.join("empty").to_string_lossy().into_owned();
    for bad in ["0", "/nonexistent/disk", "99999999999", &empty, "/tmp"] {
        let said = create(suite, ["--disk", bad])?.output()?;
        refused(suite, said, &["--disk", bad])?;
    }
    Ok(())
}

fn image_sources_that_are_none(suite: &Suite) -> Result<()> {
    let home = suite.scratch("bad-home")?;
    let dir = suite.scratch("bad-sources")?;
    let garbage = dir.join("garbage.tar").to_string_lossy().into_owned();
    fs::write(&garbage, "no tar at all".repeat(1000))?;
    let recipe = dir.join("recipe.json").to_string_lossy().into_owned();
    fs::write(&recipe, r#"{"debian": {"suit": "bookworm"}}"#)?;
    for (source, path) in [
        ("--dir", "/nonexistent/dir"),
        ("--dir", &garbage),
        ("--tar", "/nonexistent/file.tar"),
        ("--tar", &garbage),
        ("--recipe", "/nonexistent/recipe"),
        ("--recipe", &recipe),
        ("--debian", "no/such/suite"),
    ] {
        let args = ["image", "build", "--tag", "bad", "--json", source, path];
        let said = suite.forkd_in(&home, args).output()?;
        refused(suite, said, &[path]).with_context(|| format!("{source} {path}"))?;
    }
    let said = suite
        .forkd_in(&home, ["image", "build", "--tag", "a/b", "--dir", "/etc", "--json"])
        .output()?;
    said.one_line(&["a/b"])?;
    let said = suite.forkd_in(&home, ["image", "rm", "nosuchimage"]).output()?;
    said.one_line(&["nosuchimage"])?;
    Ok(())
}

fn names_that_are_no_host_names(suite: &Suite) -> Result<()> {
    suite.warm()?;
    let long = "x".repeat(64);
    for bad in ["a/b", "-a", "UPPER", "a b", "", &long] {
        let name = format!("--name={bad}");
        suite.forkd(["fork", "warm", &name]).output()?.one_line(&["name", bad])?;
    }
    ensure!(suite.ls()?.is_empty());
    Ok(())
}

/// Runs a shell script in a mount namespace of its own, with /dev as it makes it. What it mounts ends with it.
fn in_namespace(suite: &Suite, home: &Path, script: &str) -> Result<Output> {
    suite
        .program("/usr/bin/unshare")
        .args(["-m", "--propagation", "private", "/bin/sh", "-c", script])
        .env("FORKD_HOME", home)
        .env("FORKD", suite.binary())
        .output()
}

/// Makes a /dev with all that a program needs but KVM.
const BARE_DEV: &str = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && ";

fn no_kvm(suite: &Suite) -> Result<()> {
    let home = suite.scratch("bad-home")?;
    suite.link_image(&home)?;
    let script = format!("{BARE_DEV} exec $FORKD snapshot create x --json");
    let said = in_namespace(suite, &home, &script)?;
    refused(suite, said, &["/dev/kvm"])?;
    let said = in_namespace(suite, &home, &format!("{BARE_DEV} exec $FORKD doctor --json"))?;
    let report: Value = said.status_is(1)?.json()?;
    let checks = report["checks"].as_array().context("checks")?;
    let kvm = checks.iter().find(|c| c["name"] == "KVM").context("a check of KVM")?;
    ensure!(kvm["verdict"] == "fail" && kvm["fix"].is_string(), "{kvm}");
    Ok(())
}

fn kvm_that_is_not_permitted(suite: &Suite) -> Result<()> {
    // Where nobody can read it: the home, the binary, the image.
    let dir = suite.scratch("nobody")?;
    fs::set_permissions(suite.root(), fs::Permissions::from_mode(0o755))?;
    let home = dir.join("home");
    suite.link_image(&home)?;
    let copy = dir.join("forkd");
    fs::copy(suite.binary(), &copy)?;
    for path in [
        home.clone(),
        home.join("images"),
        home.join("images/by-tag"),
        home.join("images/by-recipe"),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
    }
    let script = format!(
        "{BARE_DEV} mknod -m 600 /dev/kvm c 10 232 && export HOME={} && \
         exec setpriv --reuid=65534 --regid=65534 --clear-groups {} snapshot create x --json",
        home.display(),
        copy.display()
    );
    let said = in_namespace(suite, &home, &script)?;
    said.one_line(&["/dev/kvm", "kvm"])?;
    home_is_empty(&home)?;
    fs::set_permissions(suite.root(), fs::Permissions::from_mode(0o700))?;
    Ok(())
}

/// On a file system of 256 KiB that is filled to its last byte.
fn a_full_disk(suite: &Suite) -> Result<()> {
    let good = suite.scratch("bad-home")?;
    suite.link_image(&good)?;
    let home = suite.scratch("full-home")?;
    let run = |verb: &str| {
        let script = format!(
            "mount -t tmpfs -o size=256k none {home} && cp -a {good}/images {home}/ && \
             dd if=/dev/zero of={home}/ballast bs=4k 2>/dev/null; \
             $FORKD {verb}; status=$?; rm {home}/ballast; \
             find {home} -mindepth 1 -not -path '{home}/images*' -not -name run -not -name vms -not -name snapshots; \
             find {home}/images -name '.staging*'; exit $status",
            home = home.display(),
            good = good.display(),
        );
        in_namespace(suite, &home, &script)
    };
    let source = suite.scratch("full-source")?;
    fs::write(source.join("file"), vec![7; 100_000])?;
    for verb in [
        "snapshot create x --json".to_string(),
        format!("image build --tag big --json --dir {}", source.display()),
    ] {
        let said = run(&verb)?;
        let left = said.text();
        let line = said.one_line(&[]).with_context(|| verb.clone())?;
        ensure!(line.contains("space"), "{verb}: {line}");
        ensure!(left.is_empty(), "{verb} leaves {left}");
    }
    Ok(())
}

/// Begins a boot, and gives the VM's pid once its vCPUs run.
fn booting(suite: &Suite) -> Result<(crate::command::Watched, PathBuf, u32)> {
    let home = suite.scratch("bad-home")?;
    let command = create(suite, [])?.spawn()?;
    let vms = home.join("run/vms");
    let pid = std::cell::Cell::new(0);
    crate::fixture::eventually(suite.deadline(), "a VM boots", || {
        for name in names(&vms)? {
            // It may not serve yet.
            let Ok(mut api) = Client::connect(&vms.join(name).join("api.sock")) else { continue };
            let Ok(info) = api.get_json::<VmInfo>("/vm") else { continue };
            if info.timing.running_ns > 0 {
                pid.set(info.record.pid);
            }
        }
        ensure!(!command.has_ended()?, "the command has ended");
        Ok(pid.get() != 0)
    })?;
    Ok((command, home, pid.get()))
}

fn a_vm_killed_while_it_boots(suite: &Suite) -> Result<()> {
    let (command, _, pid) = booting(suite)?;
    let process = forkd_sys::fork::PidFd::open(pid)?;
    process.send_signal(rustix::process::Signal::KILL)?;
    let said = command.wait()?;
    refused(suite, said, &["vm-"])?;
    Ok(())
}

fn an_interrupted_boot(suite: &Suite) -> Result<()> {
    use rustix::process::Signal;
    for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15)] {
        let (command, home, _) = booting(suite)?;
        command.signal(signal)?;
        let said = command.wait()?.status_is(128 + number)?;
        ensure!(said.stdout.is_empty(), "{}", said.text());
        home_is_empty(&home)?;
    }
    Ok(())
}
