//! Writers that are killed, disks that are full or fail, and power that goes, at every single
//! operation that changes the file system. After each, every tag is what it was before the step or
//! what the step makes it, and the store goes on working.
//!
//! No libtest here: the processes that are killed are this program again, told so by the environment.

#![allow(clippy::expect_used, clippy::print_stdout)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use forkd_snapshot::io::Kernel;
use forkd_snapshot::*;
use support::cut::{Disk, Judged, Kill, Mercy, Off, Trouble};
use support::scenario::{self, STEPS};
use support::*;

const ROLE: &str = "FORKD_SNAPSHOT_TEST_ROLE";
/// As the issue asks.
const FEWEST_POINTS: usize = 200;

fn main() -> ExitCode {
    let role = std::env::var(ROLE).unwrap_or_default();
    let args: Vec<String> = std::env::args().collect();
    match role.split(' ').collect::<Vec<_>>()[..] {
        [""] => {}
        ["steps", at, torn] => {
            take_steps(Path::new(&args[1]), at.parse().expect("a number"), torn == "torn");
            return ExitCode::SUCCESS;
        }
        ["writer"] => {
            write_slowly(Path::new(&args[1]));
            return ExitCode::SUCCESS;
        }
        _ => panic!("{role:?} is no role"),
    }
    type Test = (&'static str, fn() -> usize);
    let tests: [Test; 4] = [
        ("a writer in another process", a_writer_in_another_process),
        ("killed at every operation", killed_at_every_operation),
        ("trouble at every operation", trouble_at_every_operation),
        ("power cut at every operation", power_cut_at_every_operation),
    ];
    let wanted = args.iter().skip(1).find(|arg| !arg.starts_with('-'));
    for (name, test) in tests {
        if wanted.is_none_or(|wanted| name.contains(wanted.as_str())) {
            // A test that fails panics, which ends this program with an error.
            println!("test {name} ... ok, {} points", test());
        }
    }
    ExitCode::SUCCESS
}

/// Number of operations of all steps.
fn count_operations() -> u64 {
    let dir = temp();
    let io = Arc::new(Judged::new(Mercy, Kernel));
    let store = Store::open_with(dir.path(), io.clone()).expect("open");
    for step in 0..STEPS {
        scenario::step(&store, step).expect("nothing goes wrong");
        let view = scenario::view(step + 1);
        for tag in ["base", "diff", "leaf"] {
            assert_eq!(scenario::found(&store, tag).as_ref(), view.get(tag), "step {step}");
        }
    }
    // Verifying above wrote stamps, which later steps do not.
    io.count()
}

fn this_program(role: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg(dir).env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// In the process that is killed: says after each step that it is done.
fn take_steps(dir: &Path, at: u64, torn: bool) {
    let store = Store::open_with(dir, Arc::new(Judged::new(Kill { at, torn }, Kernel)));
    let store = store.expect("open");
    for step in 0..STEPS {
        scenario::step(&store, step).expect("nothing but death goes wrong");
        println!("{step}");
    }
}

fn killed_at_every_operation() -> usize {
    let mut points = 0;
    for torn in ["whole", "torn"] {
        for at in 0.. {
            let dir = temp();
            let output = this_program(&format!("steps {at} {torn}"), dir.path()).output();
            let output = output.expect("run");
            let acknowledged = output.stdout.iter().filter(|byte| **byte == b'\n').count();
            if output.status.success() {
                assert_eq!(acknowledged, STEPS);
                break;
            }
            use std::os::unix::process::ExitStatusExt;
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(9), "{stderr}");
            scenario::check(dir.path(), acknowledged, &format!("killed at {at} ({torn})"));
            points += 1;
        }
    }
    assert!(points >= FEWEST_POINTS, "{points}");
    points
}

fn trouble_at_every_operation() -> usize {
    let (mut points, mut told) = (0, 0);
    for at in 0..count_operations() {
        let dir = temp();
        let io = Arc::new(Judged::new(Trouble::new(at), Kernel));
        let store = Store::open_with(dir.path(), io.clone()).expect("open");
        let Some((step, error)) = (0..STEPS)
            .find_map(|step| scenario::step(&store, step).err().map(|error| (step, error)))
        else {
            // What only clears away, or remembers, may fail unheard.
            scenario::check(dir.path(), STEPS - 1, &format!("trouble at {at}"));
            continue;
        };
        let hit = io.judge.hit.lock().expect("no panic").expect("it was hit");
        let full = matches!(error, SnapshotError::DiskFull(_));
        assert!(full || !hit.needs_room(), "{error}");
        let place = dir.path().display().to_string();
        assert!(error.to_string().contains(&place), "{error} names no file");
        if let Some(tag) = scenario::publishes(step) {
            assert_eq!(scenario::found(&store, tag), None, "an error means not published: {at}");
        }
        // Room again: what is left is old or new, and to try again works.
        io.judge.over.store(true, Ordering::SeqCst);
        match scenario::step(&store, step) {
            Ok(()) => {}
            // The removal had been done, but for its clearing away.
            Err(SnapshotError::NotFound(_)) if scenario::publishes(step).is_none() => {}
            Err(error) => panic!("trouble at {at}, tried again: {error}"),
        }
        scenario::check(dir.path(), step + 1, &format!("trouble at {at}"));
        points += 1;
        told += usize::from(full);
    }
    assert!(points >= FEWEST_POINTS / 2 && told >= 50, "{points}, full: {told}");
    points
}

fn power_cut_at_every_operation() -> usize {
    let mut points = 0;
    for at in 0..count_operations() {
        let dir = temp();
        let disk = Arc::new(Disk::new(dir.path()));
        let io = Judged::new(Off { at }, Shared(disk.clone()));
        let store = Store::open_with(dir.path(), Arc::new(io)).expect("open");
        let acknowledged =
            (0..STEPS).take_while(|step| scenario::step(&store, *step).is_ok()).count();
        for seed in [0, 1, 2 + 7 * at, 3 + 11 * at, 4 + 13 * at] {
            let after = temp();
            disk.after_the_cut(after.path(), seed);
            // Clearing away fails unheard, so the cut may be steps back.
            let place = format!("power cut at {at}, seed {seed}");
            scenario::check(after.path(), acknowledged.min(STEPS - 1), &place);
            points += 1;
        }
    }
    assert!(points >= FEWEST_POINTS, "{points}");
    points
}

/// For a file system that is looked into later.
#[derive(Debug)]
struct Shared(Arc<Disk>);

macro_rules! forward {
    ($($name:ident($($arg:ident: $kind:ty),*) -> $result:ty;)*) => {
        impl forkd_snapshot::io::Io for Shared {
            $(fn $name(&self, $($arg: $kind),*) -> std::io::Result<$result> {
                self.0.$name($($arg),*)
            })*
        }
    };
}

use forkd_snapshot::io::Renaming;
use std::fs::File;

forward! {
    make_dir(path: &Path) -> ();
    create(path: &Path, len: u64) -> File;
    write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> ();
    punch(file: &File, path: &Path, offset: u64, len: u64) -> ();
    sync_file(file: &File, path: &Path) -> ();
    sync_dir(path: &Path) -> ();
    rename(from: &Path, to: &Path, how: Renaming) -> ();
    unlink(path: &Path) -> ();
    remove_dir(path: &Path) -> ();
}

/// In another process: writes a snapshot, and commits it when told to.
fn write_slowly(dir: &Path) {
    let store = Store::open(dir).expect("open");
    let mut staged = store.stage("slow", None).expect("stage");
    fill(&mut staged, 1, &pages([(0, 1)]), &pages([])).expect("fill");
    println!("written");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a word");
    match staged.commit(facts(1, Mode::Live)) {
        Ok(_) => println!("committed"),
        Err(SnapshotError::Cancelled(_)) => println!("cancelled"),
        Err(error) => println!("{error}"),
    }
}

fn line(child: &mut Child) -> String {
    let mut line = String::new();
    let out = child.stdout.as_mut().expect("a pipe");
    BufReader::with_capacity(1, out).read_line(&mut line).expect("a line");
    line.trim().to_string()
}

fn a_writer_in_another_process() -> usize {
    let dir = temp();
    let store = Store::open(dir.path()).expect("open");
    let status = || store.list().expect("list").pop().map(|entry| entry.status);
    let begin = || {
        let mut child = this_program("writer", dir.path()).spawn().expect("run");
        assert_eq!(line(&mut child), "written");
        assert!(matches!(status(), Some(Status::Writing { .. })));
        child
    };
    let go_on = |mut child: Child| {
        child.stdin.as_mut().expect("a pipe").write_all(b"\n").expect("write");
        let said = line(&mut child);
        assert!(child.wait().expect("wait").success());
        said
    };
    // Deleted, and stays deleted; also when another has the tag by then.
    let child = begin();
    store.remove("slow", Removal::Plain).expect("remove");
    assert_eq!(go_on(child), "cancelled");
    assert_eq!(status(), None);
    let child = begin();
    store.remove("slow", Removal::Plain).expect("remove");
    put(&store, "slow", None, 1, &pages([(0, 2)]), &pages([])).expect("put");
    assert_eq!(go_on(child), "cancelled");
    assert_eq!(memory_of(&store, "slow"), over(&vec![0; MIB], &pages([(0, 2)])));
    store.remove("slow", Removal::Plain).expect("remove");
    // Killed: failed at once, and never ready.
    let mut child = begin();
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(matches!(status(), Some(Status::Failed(why)) if why.contains("ended")));
    assert_eq!(store.sweep().expect("sweep").failed, ["slow"]);
    assert!(matches!(status(), Some(Status::Failed(_))));
    // Left alone, and the failed one before it is no hindrance.
    assert_eq!(go_on(begin()), "committed");
    assert!(matches!(status(), Some(Status::Ready(_))));
    4
}
