//! `forkd exec`: commands in a guest.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use forkd_sys::reactor::wait_readable;
use rustix::process::Signal;
use serde_json::Value;

use crate::fixture::Suite;
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["exec":
    status_and_streams_are_passed_on 60,
    standard_input_of_any_size_arrives_whole 90,
    environment_directory_and_user_are_as_asked 60,
    signals_end_commands 60,
    a_command_out_of_time_is_ended 60,
    eight_commands_run_at_once 90,
    a_terminal_is_a_terminal 60,
    orphans_are_reaped 60,
    json_has_all_of_it 60,
    commands_that_cannot_start_are_named 60,
];

fn status_and_streams_are_passed_on(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let script = "echo to out; echo to err >&2; exit 3";
    let said = vm.exec(&["/bin/sh", "-c", script]).output()?.status_is(3)?;
    ensure!((said.text(), said.stderr_text()) == ("to out".into(), "to err".into()), "{said:?}");
    ensure!(vm.exec(&["/bin/true"]).ok()?.stdout.is_empty());
    vm.exec(&["/bin/false"]).output()?.status_is(1)?;
    // Bytes that are no text.
    let said = vm.exec(&["/usr/bin/printf", r"\000\377\n\200"]).ok()?;
    ensure!(said.stdout == [0, 0xff, b'\n', 0x80], "{:?}", said.stdout);
    // Without -i its standard input is empty, not this program's.
    ensure!(vm.exec(&["/bin/cat"]).stdin("not passed on").ok()?.stdout.is_empty());
    Ok(())
}

fn standard_input_of_any_size_arrives_whole(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let mut x = 1u32;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 24) as u8
    })
    .take(1 << 20)
    .collect();
    let back = vm.exec_with(&["-i"], &["/bin/cat"]).stdin(bytes.clone()).ok()?;
    ensure!(back.stdout == bytes, "{} bytes of {}", back.stdout.len(), bytes.len());
    let none = vm.exec_with(&["-i"], &["/usr/bin/wc", "-c"]).stdin("").ok()?;
    ensure!(none.text() == "0", "an end of input is passed on");
    // A command that does not read its input is no failure.
    vm.exec_with(&["-i"], &["/bin/true"]).stdin(bytes).ok()?;
    Ok(())
}

fn environment_directory_and_user_are_as_asked(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let options = ["--env", "A=1 2", "-e", "B=x=y", "--cwd", "/usr/share", "--user", "nobody"];
    let said =
        vm.exec_with(&options, &["/bin/sh", "-c", "echo $A; echo $B; pwd; id -un; id -gn"]).ok()?;
    ensure!(said.text() == "1 2\nx=y\n/usr/share\nnobody\nnogroup", "{}", said.text());
    let said = vm.exec(&["/bin/sh", "-c", "echo $A; id -u; echo $HOME; pwd"]).ok()?;
    ensure!(said.text() == "\n0\n/root\n/root", "{}", said.text());
    Ok(())
}

fn signals_end_commands(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    vm.exec(&["/bin/sh", "-c", "kill -TERM $$"]).output()?.status_is(128 + 15)?;
    // Interrupting forkd interrupts the command.
    let script = "echo $$ > /tmp/pid; echo ready; while :; do sleep 0.1; done";
    let running = vm.exec(&["/bin/sh", "-c", script]).spawn()?;
    running.wait_stdout("sign of life", |out| out.starts_with(b"ready"))?;
    running.signal(Signal::INT)?;
    running.wait()?.status_is(128 + 2)?;
    crate::fixture::eventually(suite.deadline(), "the command has ended too", || {
        Ok(vm.sh("kill -0 $(cat /tmp/pid) 2>/dev/null && echo lives || echo gone")? == "gone")
    })
}

fn a_command_out_of_time_is_ended(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let command = ["/bin/sh", "-c", "echo begun; exec sleep 1000"];
    let said = vm.exec_with(&["--timeout", "1.5"], &command).output()?.status_is(124)?;
    ensure!(said.text() == "begun", "{}", said.text());
    ensure!(said.took < Duration::from_secs(20), "after {:?}", said.took);
    let left = vm.sh("grep -lx sleep /proc/[0-9]*/comm 2>/dev/null | wc -l")?;
    ensure!(left == "0", "{left} sleep on");
    Ok(())
}

/// Each waits for all the others: one that blocked another would block itself.
fn eight_commands_run_at_once(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let running = (0..8)
        .map(|_| vm.exec(&["/tmp/guest", "barrier", "/tmp/barrier", "9"]).spawn())
        .collect::<Result<Vec<_>>>()?;
    // And an eval meanwhile.
    ensure!(vm.value("base")? == "1000", "the interpreter serves as well");
    for one in &running {
        ensure!(!one.has_ended()?, "a command did not wait for the others");
    }
    vm.guest(&["barrier", "/tmp/barrier", "9"])?;
    running.into_iter().try_for_each(|one| one.wait()?.success().map(drop))
}

/// Runs a shell script by `forkd exec -it` on a new terminal of 33 rows and 77 columns. Once the script has said "ready",
/// it is given `input`. Gives all that was written, and the status.
fn on_a_terminal(
    suite: &Suite,
    vm: &Vm<'_>,
    input: &[u8],
    script: &str,
) -> Result<(String, Option<i32>)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{Winsize, tcsetwinsize};

    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    tcsetwinsize(&ours, Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 })?;
    let name = ptsname(&ours, Vec::new())?.into_string()?;
    let theirs = File::options().read(true).write(true).open(&name)?;
    let mut child = Command::new(suite.binary())
        .env("FORKD_HOME", suite.home())
        .env("TERM", "vt100")
        .args(["exec", "-it", &vm.id, "--", "/bin/sh", "-c", script])
        .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
        .stdout(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
        .stderr(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let text = talk(&mut File::from(ours), suite.deadline(), input);
    if text.is_err() {
        child.kill()?;
    }
    let status = child.wait()?.code();
    Ok((text?, status))
}

/// Reads a terminal to its end, and gives it `input` at the right time.
fn talk(terminal: &mut File, deadline: Instant, input: &[u8]) -> Result<String> {
    let mut input = Some(input);
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if !wait_readable(&*terminal, Some(left))? {
            bail!("not done in time; it wrote {:?}", String::from_utf8_lossy(&text));
        }
        match terminal.read(&mut chunk) {
            Ok(count @ 1..) => text.extend_from_slice(&chunk[..count]),
            // EIO: the last one at the other end has closed it.
            Ok(0) | Err(_) => return Ok(String::from_utf8_lossy(&text).into_owned()),
        }
        if String::from_utf8_lossy(&text).contains("ready")
            && let Some(bytes) = input.take()
        {
            terminal.write_all(bytes)?;
        }
    }
}

fn a_terminal_is_a_terminal(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let script = "tty; stty size; echo $TERM; echo ready; read line; echo got $line; exit 5";
    let (text, status) = on_a_terminal(suite, &vm, b"hello\r", script)?;
    for word in ["/dev/pts/", "33 77", "vt100", "got hello"] {
        ensure!(text.contains(word), "{word} is not in {text:?}");
    }
    ensure!(status == Some(5), "{status:?}");
    // Ctrl-C goes to the guest's terminal, not to forkd.
    let (text, status) = on_a_terminal(suite, &vm, b"\x03", "echo ready; exec sleep 1000")?;
    ensure!(status == Some(130), "{status:?}: {text:?}");
    // Without a terminal -t is refused.
    vm.exec_with(&["-t"], &["/bin/true"]).output()?.one_line(&["terminal"])?;
    Ok(())
}

fn orphans_are_reaped(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    ensure!(vm.guest(&["orphans", "20"])? == "20");
    Ok(())
}

fn json_has_all_of_it(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let script = "echo out; echo err >&2; exit 4";
    let said = vm.exec_with(&["--json"], &["/bin/sh", "-c", script]).output()?.status_is(4)?;
    let answer: Value = said.json()?;
    ensure!(answer["exit_code"] == 4 && answer["timed_out"] == false, "{answer}");
    ensure!(answer["stdout"] == "out\n" && answer["stderr"] == "err\n", "{answer}");
    Ok(())
}

fn commands_that_cannot_start_are_named(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    vm.exec(&["/no/such/program"]).output()?.one_line(&["/no/such/program"])?;
    vm.exec_with(&["--user", "nosuchuser"], &["/bin/true"]).output()?.one_line(&["nosuchuser"])?;
    vm.exec_with(&["--cwd", "/no/such/dir"], &["/bin/true"])
        .output()?
        .one_line(&["/no/such/dir"])?;
    let line = suite.forkd(["exec", "vm-nothere", "--", "true"]).output()?;
    line.one_line(&["vm-nothere", "forkd ls"])?;
    vm.exec(&["/bin/true"]).ok().context("the VM is well")?;
    Ok(())
}
