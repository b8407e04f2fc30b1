//! `forkd eval`: the warmed interpreter.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["eval":
    result_output_and_traceback_are_apart 60,
    names_stay_defined_and_statements_have_no_value 60,
    a_time_limit_leaves_the_interpreter_usable 90,
    code_comes_by_standard_input_as_well 60,
    output_of_any_size_arrives_whole 60,
    evals_of_many_children_run_at_once 60,
];

fn result_output_and_traceback_are_apart(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let code = "import sys\nprint('to out')\nprint('to err', file=sys.stderr)\n6 * 7";
    let answer = vm.eval(code)?;
    ensure!(answer.result.as_deref() == Some("42"), "{answer:?}");
    ensure!(
        (answer.stdout.as_str(), answer.stderr.as_str()) == ("to out\n", "to err\n"),
        "{answer:?}"
    );
    ensure!(answer.error.is_none(), "{answer:?}");

    let answer = vm.eval("def f(x):\n    return 1 / x\nprint('first')\nf(0)")?;
    let error = answer.error.context("it raises")?;
    ensure!(error.name == "ZeroDivisionError" && error.value == "division by zero", "{error:?}");
    ensure!(error.traceback.contains("line 2, in f"), "{}", error.traceback);
    ensure!(answer.result.is_none() && answer.stdout == "first\n");

    // Without --json: each on its own stream, and the status says it.
    let said = suite.forkd(["eval", &vm.id, "print('x'); 1/0"]).output()?.status_is(1)?;
    ensure!(said.text() == "x", "{}", said.text());
    ensure!(said.stderr_text().ends_with("ZeroDivisionError: division by zero"), "{said:?}");
    let said = suite.forkd(["eval", &vm.id, "print('x'); 'y'"]).ok()?;
    ensure!(said.text() == "x\n'y'" && said.stderr.is_empty(), "{said:?}");
    Ok(())
}

fn names_stay_defined_and_statements_have_no_value(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let answer = vm.eval("mine = 5")?;
    ensure!(answer.result.is_none() && answer.error.is_none(), "{answer:?}");
    ensure!(vm.value("mine + base")? == "1005");
    let error = vm.eval("nothing_of_that_name")?.error.context("it raises")?;
    ensure!(error.name == "NameError");
    let error = vm.eval("def broken(:")?.error.context("it raises")?;
    ensure!(error.name == "SyntaxError", "{error:?}");
    ensure!(vm.eval("raise SystemExit(3)")?.error.is_some(), "exit is no way out");
    ensure!(vm.value("mine")? == "5", "the interpreter is the same one");
    ensure!(vm.value("'\\u00e9\\U0001f600' + chr(0x4e2d)")? == "'é😀中'");
    Ok(())
}

fn a_time_limit_leaves_the_interpreter_usable(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    vm.run("kept = 7")?;
    for endless in ["while True: pass", "import time\ntime.sleep(1000)"] {
        let args = ["eval", &vm.id, "--json", "--timeout", "1", endless];
        let said = suite.forkd(args).output()?.status_is(124)?;
        ensure!(said.took < Duration::from_secs(60), "after {:?}", said.took);
        let answer: serde_json::Value = said.json()?;
        ensure!(answer["error"]["timed_out"] == true, "{answer}");
        ensure!(vm.value("kept")? == "7", "after {endless:?}");
    }
    Ok(())
}

fn code_comes_by_standard_input_as_well(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let code = "total = 0\nfor i in range(10):\n    total += i\ntotal";
    ensure!(suite.forkd(["eval", &vm.id, "-"]).stdin(code).ok()?.text() == "45");
    let long = format!("# {}\n'end'", "x".repeat(1 << 20));
    ensure!(suite.forkd(["eval", &vm.id, "-"]).stdin(long).ok()?.text() == "'end'");
    Ok(())
}

fn output_of_any_size_arrives_whole(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    // In one piece, then line by line.
    let code = "print('\\n'.join(map(str, range(100_000))))\nfor i in range(500): print(i)";
    let said = suite.forkd(["eval", &vm.id, code]).ok()?;
    let expected: String = (0..100_000).chain(0..500).map(|i| format!("{i}\n")).collect();
    ensure!(
        said.stdout == expected.as_bytes(),
        "{} bytes of {}",
        said.stdout.len(),
        expected.len()
    );
    Ok(())
}

fn evals_of_many_children_run_at_once(suite: &Suite) -> Result<()> {
    let children = suite.fork(4)?;
    // Each waits until all have begun: one after the other they would never end.
    let started: Vec<_> = children
        .iter()
        .map(|c| suite.forkd(["eval", &c.id, "print('on', flush=True); import sys\nwhile not os.path.exists('/tmp/go'): time.sleep(.02)\n'done'"]).spawn())
        .collect::<Result<_>>()?;
    for one in &started {
        one.wait_stdout("sign of life", |out| out.starts_with(b"on"))?;
    }
    for child in &children {
        child.exec(&["/bin/touch", "/tmp/go"]).ok()?;
    }
    for one in started {
        ensure!(one.wait()?.success()?.text() == "on\n'done'");
    }
    Ok(())
}
