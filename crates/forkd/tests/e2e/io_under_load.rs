//! Forks in the middle of I/O: the source's goes on, the child's host side is gone and its guest side works.

use anyhow::{Context, Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};
use crate::vm::Vm;

pub const TESTS: &[Test] = tests!["io_under_load":
    streams_of_the_source_go_on_while_it_is_branched 180,
    the_childs_copy_of_a_stream_ends_and_its_process_lives 90,
    disk_and_vsock_are_busy_at_once 240,
];

/// Lines of a stream that is checked number by number.
const LINES: usize = 40_000;
/// Branches while the streams run.
const BRANCHES: usize = 8;

/// Numbers for ever, a line each, with a break now and then so that the end comes when asked for.
fn numbers() -> [&'static str; 3] {
    [
        "/usr/bin/python3",
        "-Sc",
        "i = 0\nwhile True:\n    print('\\n'.join(map(str, range(i, i + 200))), flush=True); i += 200",
    ]
}

/// Lines are the numbers from 0 on, none twice and none missing.
fn check_numbers(output: &[u8]) -> Result<usize> {
    let whole = output.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let text = std::str::from_utf8(&output[..whole])?;
    let mut count = 0;
    for (index, line) in text.lines().enumerate() {
        ensure!(line == index.to_string(), "line {index} is {line:?}");
        count = index + 1;
    }
    Ok(count)
}

fn streams_of_the_source_go_on_while_it_is_branched(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    let stream = source.exec(&numbers()).spawn()?;
    // An echo: both directions at once.
    let mut echo = source.exec_with(&["-i"], &["/bin/cat"]).spawn()?;
    let mut input = echo.stdin.take().context("a standard input")?;
    stream.wait_stdout("first number", |out| !out.is_empty())?;
    let mut sent = 0;
    for number in 0..BRANCHES {
        for _ in 0..100 {
            std::io::Write::write_all(&mut input, format!("{sent}\n").as_bytes())?;
            sent += 1;
        }
        let had = stream.stdout_len();
        let branch = source.branch_one()?;
        ensure!(branch.value("base")? == "1000", "branch {number} serves");
        stream.wait_stdout("further number", |out| out.len() > had)?;
        branch.kill()?;
    }
    drop(input);
    let echoed = echo.wait()?.success()?;
    ensure!(check_numbers(&echoed.stdout)? == sent, "the echo is whole");
    let output = stream.wait_stdout("enough numbers", |out| lines(out) >= LINES)?;
    ensure!(check_numbers(&output)? >= LINES, "the stream is whole");
    Ok(())
}

fn lines(output: &[u8]) -> usize {
    output.iter().filter(|b| **b == b'\n').count()
}

/// In the child nobody reads what its copy of the command writes: the command must not take the agent with it.
fn the_childs_copy_of_a_stream_ends_and_its_process_lives(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    let script =
        "echo $$ > /tmp/streaming; echo begun; while :; do date +%N >> /tmp/log; sleep 0.1; done";
    let stream = source.exec(&["/bin/sh", "-c", script]).spawn()?;
    stream.wait_stdout("sign of life", |out| out.starts_with(b"begun"))?;
    let branch = source.branch_one()?;
    let lives = |vm: &Vm<'_>| vm.sh("kill -0 $(cat /tmp/streaming) && wc -l < /tmp/log");
    for vm in [&branch, &source] {
        let before: u64 = lives(vm)?.parse()?;
        vm.sh(&format!("until [ $(wc -l < /tmp/log) -gt {before} ]; do sleep 0.1; done"))?;
    }
    ensure!(!stream.has_ended()?, "the source's stream goes on");
    // Its end in the child does not end it in the source, and the other way round.
    branch.sh("kill $(cat /tmp/streaming)")?;
    ensure!(lives(&source).is_ok(), "the source's process lives");
    let child = source.branch_one()?;
    source.sh("kill -TERM $(cat /tmp/streaming)")?;
    stream.wait()?.status_is(128 + 15)?;
    lives(&child).context("the process of a branch outlives the source's")?;
    // A stream to a VM that is ended says so.
    let stream = child.exec(&["/bin/sh", "-c", "echo begun; exec sleep 1000"]).spawn()?;
    stream.wait_stdout("sign of life", |out| out.starts_with(b"begun"))?;
    child.kill()?;
    stream.wait()?.one_line(&[&child.id])?;
    Ok(())
}

fn disk_and_vsock_are_busy_at_once(suite: &Suite) -> Result<()> {
    let source = suite.fork_one()?;
    source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    let stream = source.exec(&numbers()).spawn()?;
    stream.wait_stdout("first number", |out| !out.is_empty())?;
    for number in 0..BRANCHES {
        let branches = source.branch(2)?.children;
        for branch in &branches {
            branch
                .guest(&["ring", "verify", "/tmp/ring"])
                .with_context(|| format!("branch {number}"))?;
            branch.kill()?;
        }
    }
    source.guest(&["ring", "verify", "/tmp/ring"]).context("the source")?;
    let had = stream.stdout_len();
    let output = stream.wait_stdout("further number", |out| out.len() > had)?;
    check_numbers(&output)?;
    Ok(())
}
