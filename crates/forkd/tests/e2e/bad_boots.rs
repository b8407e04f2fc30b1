//! Guests that do not come up, or whose warm-up fails: no snapshot, one line that says why, and nothing left. Each of these
//! costs a boot.

use anyhow::{Result, ensure};

use crate::fixture::Suite;
use crate::leftovers::home_is_empty;
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["bad_boots":
    an_agent_that_never_answers 120,
    a_guest_that_panics 180,
    warm_up_code_that_raises 240,
];

fn an_agent_that_never_answers(suite: &Suite) -> Result<()> {
    let home = suite.scratch("boot-home")?;
    suite.link_image(&home)?;
    // Longer than the kernel takes to its first process, emulated or not.
    let flavour = suite.forkd(["doctor", "--kernel-flavour"]).ok()?.text();
    let patience = if flavour == "pvm" { "5" } else { "30" };
    let said = suite
        .forkd_in(
            &home,
            ["snapshot", "create", "x", "--json", "--boot-timeout", patience, "--mem", "128"],
        )
        .env("FORKD_AGENT", suite.programs()?.join("init_silent"))
        .output()?;
    said.one_line(&["agent"])?;
    home_is_empty(&home)
}

fn a_guest_that_panics(suite: &Suite) -> Result<()> {
    let home = suite.scratch("boot-home")?;
    suite.link_image(&home)?;
    let said = suite
        .forkd_in(&home, ["snapshot", "create", "x", "--json", "--mem", "128"])
        .env("FORKD_AGENT", suite.programs()?.join("init_exits"))
        .output()?;
    said.one_line(&["Kernel panic", "init"])?;
    home_is_empty(&home)
}

fn warm_up_code_that_raises(suite: &Suite) -> Result<()> {
    let home = suite.scratch("boot-home")?;
    suite.link_image(&home)?;
    let code = "print('begun')\ndef f():\n    return nothing\nf()";
    let said = suite
        .forkd_in(&home, ["snapshot", "create", "x", "--json", "--mem", "256", "--warm-code", code])
        .output()?
        .status_is(1)?;
    let text = said.stderr_text();
    let last = text.lines().last().unwrap_or_default();
    ensure!(last.starts_with("forkd: ") && last.contains("NameError"), "{text}");
    ensure!(text.contains("line 3, in f") && text.contains("Traceback"), "{text}");
    home_is_empty(&home)
}
