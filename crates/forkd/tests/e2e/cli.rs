//! The command line: help, JSON, completions, doctor.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::fixture::Suite;
use crate::runner::{Test, tests};

pub const WITHOUT_GUEST: &[Test] = tests!["cli":
    every_verb_helps 60,
    completions_know_every_verb 30,
    doctor_gives_a_fix_for_each_finding 30,
    an_empty_home_has_empty_lists 30,
    mistakes_of_typing_are_one_line 30,
    a_directory_is_built_into_an_image_once 60,
];

pub const WITH_GUEST: &[Test] = tests!["cli":
    ls_and_info_have_the_json_that_is_documented 60,
    references_are_ids_names_and_starts_of_ids 60,
    the_console_is_shown 60,
    a_closed_pipe_is_no_error 60,
];

const VERBS: [&str; 13] = [
    "doctor",
    "image",
    "snapshot",
    "fork",
    "branch",
    "ls",
    "info",
    "exec",
    "eval",
    "console",
    "kill",
    "bench",
    "quickstart",
];

fn every_verb_helps(suite: &Suite) -> Result<()> {
    let help = suite.forkd(["--help"]).ok()?.text();
    for verb in VERBS {
        ensure!(help.contains(verb), "{verb} is not in the help");
        let text = suite.forkd([verb, "--help"]).ok()?.text();
        ensure!(text.contains("Usage:"), "{verb}: {text}");
    }
    for verb in [["snapshot", "create"], ["image", "build"], ["fork", ""]] {
        let args = verb.iter().filter(|v| !v.is_empty()).chain([&"--help"]);
        ensure!(suite.forkd(args).ok()?.text().contains("Examples:"), "{verb:?}");
    }
    ensure!(suite.forkd(["--version"]).ok()?.text().starts_with("forkd "));
    Ok(())
}

fn completions_know_every_verb(suite: &Suite) -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let script = suite.forkd(["completions", shell]).ok()?.text();
        for verb in VERBS {
            ensure!(script.contains(verb), "{shell}: {verb}");
        }
    }
    let bash = suite.forkd(["completions", "bash"]).ok()?.stdout;
    suite.program("/bin/bash").args(["-n", "/dev/stdin"]).stdin(bash).ok()?;
    Ok(())
}

fn doctor_gives_a_fix_for_each_finding(suite: &Suite) -> Result<()> {
    let said = suite.forkd(["doctor", "--json"]).output()?;
    let report: Value = said.json()?;
    let checks = report["checks"].as_array().context("checks")?;
    ensure!(checks.len() >= 10, "only {} checks", checks.len());
    for check in checks {
        let fine = check["verdict"] == "ok";
        ensure!(fine || check["fix"].is_string(), "no fix: {check}");
        ensure!(check["found"].as_str().is_some_and(|f| !f.is_empty()), "{check}");
    }
    // This home has no image, which is a finding; it must not hinder the rest.
    ensure!(checks.iter().any(|c| c["name"] == "KVM" && c["verdict"] != "fail"), "{report}");
    ensure!(said.status.success() == (report["verdict"] != "fail"), "{:?}", said.status);
    Ok(())
}

fn an_empty_home_has_empty_lists(suite: &Suite) -> Result<()> {
    let home = suite.scratch("empty-home")?;
    for args in [["ls", ""], ["snapshot", "ls"], ["image", "ls"]] {
        let args: Vec<&str> = args.into_iter().filter(|a| !a.is_empty()).collect();
        let rows: Vec<Value> = suite.forkd_in(&home, &args).arg("--json").ok()?.json()?;
        ensure!(rows.is_empty(), "{args:?}: {rows:?}");
        ensure!(
            suite.forkd_in(&home, &args).ok()?.text().contains("forkd"),
            "{args:?} says what to do"
        );
    }
    Ok(())
}

fn mistakes_of_typing_are_one_line(suite: &Suite) -> Result<()> {
    for (args, word) in [
        (&["frok"][..], "frok"),
        (&["fork"], "TAG"),
        (&["fork", "t", "-n", "many"], "many"),
        (&["exec", "vm"], "COMMAND"),
        (&["eval", "vm", "1", "--timeout", "soon"], "soon"),
        (&["snapshot", "create", "t", "--mem", "lots"], "lots"),
        (&["kill"], "VM"),
        (&["completions", "tcsh"], "tcsh"),
    ] {
        suite.forkd(args).output()?.status_is(2)?.one_line(&[word])?;
    }
    Ok(())
}

fn a_directory_is_built_into_an_image_once(suite: &Suite) -> Result<()> {
    let home = suite.scratch("image-home")?;
    let dir = suite.scratch("image-source")?;
    std::fs::create_dir_all(dir.join("bin"))?;
    std::fs::write(dir.join("bin/hello"), "hello")?;
    let dir = dir.to_string_lossy().into_owned();
    let build =
        || suite.forkd_in(&home, ["image", "build", "--tag", "mine", "--dir", &dir, "--json"]);
    let (first, second): (Value, Value) = (build().ok()?.json()?, build().ok()?.json()?);
    ensure!(first["digest"] == second["digest"], "the same content is the same image");
    let rows: Vec<Value> = suite.forkd_in(&home, ["image", "ls", "--json"]).ok()?.json()?;
    ensure!(rows.len() == 1 && rows[0]["tags"] == serde_json::json!(["mine"]), "{rows:?}");
    suite.forkd_in(&home, ["image", "rm", "mine"]).ok()?;
    suite.forkd_in(&home, ["image", "rm", "mine"]).output()?.one_line(&["mine"])?;
    crate::leftovers::home_is_empty(&home)
}

fn ls_and_info_have_the_json_that_is_documented(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    let rows: Vec<Value> = suite.forkd(["ls", "--json"]).ok()?.json()?;
    let [row] = &rows[..] else { anyhow::bail!("{rows:?}") };
    ensure!(
        row["id"] == vm.id.as_str() && row["pid"] == vm.pid && row["phase"] == "ready",
        "{row}"
    );
    ensure!(row["parent"] == "warm" && row["zygote"] == false && row["vcpus"] == 1, "{row}");
    ensure!(row["mem_mib"] == 512 && row["image"] == "python", "{row}");
    let memory = |v: &Value, name: &str| v["memory"][name].as_u64().unwrap_or_default();
    let (rss, pss, uss) = (memory(row, "rss"), memory(row, "pss"), memory(row, "uss"));
    ensure!(uss > 0 && uss <= pss && pss <= rss, "{row}");
    let info: Value = suite.forkd(["info", &vm.id, "--json"]).ok()?.json()?;
    ensure!(info["id"] == vm.id.as_str() && info["timing"]["ready_ns"].is_u64(), "{info}");
    let metrics = info["metrics"].as_object().context("metrics")?;
    ensure!(metrics.values().all(Value::is_u64) && metrics.len() > 5, "{metrics:?}");
    ensure!(info["dir"] == vm.dir().to_string_lossy().as_ref(), "{info}");
    let text = suite.forkd(["info", &vm.id]).ok()?.text();
    ensure!(text.contains(&vm.id) && text.contains("private"), "{text}");
    ensure!(suite.forkd(["ls"]).ok()?.text().contains(&vm.id));

    let rows: Vec<Value> = suite.forkd(["snapshot", "ls", "--json"]).ok()?.json()?;
    ensure!(rows.iter().any(|r| r["id"] == "warm" && r["zygote"] == true), "{rows:?}");
    let info: Value = suite.forkd(["snapshot", "info", "warm", "--json"]).ok()?.json()?;
    ensure!(info["phase"] == "zygote", "{info}");
    Ok(())
}

fn references_are_ids_names_and_starts_of_ids(suite: &Suite) -> Result<()> {
    suite.warm()?;
    let said: Value = suite.forkd(["fork", "warm", "--name", "web", "--json"]).ok()?.json()?;
    let id = said["children"][0]["id"].as_str().context("an id")?;
    for reference in [id, "web", &id[..7], &id[3..8]] {
        ensure!(suite.forkd(["eval", reference, "base"]).ok()?.text() == "1000", "{reference}");
    }
    suite.forkd(["info", "nosuchname"]).output()?.one_line(&["no VM"])?;
    let killed = suite.forkd(["kill", "web", "nosuch"]).output()?;
    killed.one_line(&["nosuch"])?;
    ensure!(suite.ls()? == [id], "none is ended if one is not there");
    ensure!(suite.forkd(["kill", "web"]).ok()?.text() == id);
    Ok(())
}

fn the_console_is_shown(suite: &Suite) -> Result<()> {
    let vm = suite.fork_one()?;
    vm.sh("echo to the console > /dev/ttyS0")?;
    let deadline = suite.deadline();
    crate::fixture::eventually(deadline, "the line is on the console", || {
        Ok(suite.forkd(["console", &vm.id]).ok()?.text().contains("to the console"))
    })?;
    // Followed until the VM ends.
    let follow = suite.forkd(["console", "-f", &vm.id]).spawn()?;
    follow.wait_stdout("line", |out| String::from_utf8_lossy(out).contains("to the console"))?;
    vm.sh("echo and more > /dev/ttyS0")?;
    follow.wait_stdout("line", |out| String::from_utf8_lossy(out).contains("and more"))?;
    vm.kill()?;
    follow.wait()?.success()?;
    let boot = suite.forkd(["console", "--snapshot", "warm"]).ok()?;
    drop(boot);
    Ok(())
}

fn a_closed_pipe_is_no_error(suite: &Suite) -> Result<()> {
    suite.fork(3)?;
    let script = format!("{} ls | head -n 1; echo ${{PIPESTATUS[0]}}", suite.binary().display());
    let said =
        suite.program("/bin/bash").env("FORKD_HOME", suite.home()).args(["-c", &script]).ok()?;
    ensure!(said.text().ends_with("\n0") && said.stderr.is_empty(), "{said:?}");
    Ok(())
}
