//! A VM as its user sees it: through forkd's verbs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use forkd_api::client::Client;
use forkd_api::types::{SourcePause, Timing};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::command::{Output, Run};
use crate::fixture::Suite;

/// A VM of the tests' home.
#[derive(Clone)]
pub struct Vm<'s> {
    suite: &'s Suite,
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Its time marks.
    pub timing: Timing,
}

/// What a fork or branch gave.
pub struct Branched<'s> {
    /// What the source felt.
    pub pause: Option<SourcePause>,
    /// The children.
    pub children: Vec<Vm<'s>>,
}

/// What `forkd eval --json` says.
#[derive(Debug, Deserialize)]
pub struct Evaluated {
    /// Value of the last expression, as repr() puts it.
    pub result: Option<String>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// What was raised.
    pub error: Option<Raised>,
}

/// An exception.
#[derive(Debug, Deserialize)]
pub struct Raised {
    /// Its type.
    pub name: String,
    /// Its text.
    pub value: String,
    /// As Python prints it.
    pub traceback: String,
}

#[derive(Deserialize)]
struct ForkAnswer {
    #[serde(default)]
    pause: Option<SourcePause>,
    children: Vec<ChildAnswer>,
}

#[derive(Deserialize)]
struct ChildAnswer {
    id: String,
    name: String,
    pid: Option<u32>,
    #[serde(default)]
    error: Option<String>,
    timing: Timing,
}

impl<'s> Branched<'s> {
    /// Reads the answer of `fork --json` and `branch --json`; all children must live.
    pub fn read(suite: &'s Suite, said: Output) -> Result<Self> {
        // With its answer it tells which children failed; without one, why all of it did.
        let said = if said.stdout.is_empty() { said.success()? } else { said };
        let answer: ForkAnswer = said.json()?;
        let mut children = Vec::new();
        for child in answer.children {
            if let Some(error) = child.error {
                bail!("{}: {error} ({:?})", child.id, child.timing);
            }
            let pid = child.pid.with_context(|| format!("{} has no pid", child.id))?;
            let ChildAnswer { id, name, timing, .. } = child;
            children.push(Vm { suite, id, name, pid, timing });
        }
        Ok(Self { pause: answer.pause, children })
    }
}

impl<'s> Vm<'s> {
    /// Its run directory.
    pub fn dir(&self) -> PathBuf {
        self.suite.vms_dir().join(&self.id)
    }

    /// A connection to its API.
    pub fn api(&self) -> Result<Client> {
        let client = Client::connect(&self.dir().join("api.sock"))?;
        Ok(client.with_timeout(Duration::from_secs(60)))
    }

    /// `forkd eval --json`, whatever comes of it.
    pub fn eval(&self, code: &str) -> Result<Evaluated> {
        let output = self.suite.forkd(["eval", &self.id, "--json", "--", code]).output()?;
        if output.stdout.is_empty() {
            output.success()?;
            bail!("eval says nothing");
        }
        output.json()
    }

    /// Evaluates an expression, which must not raise; gives its value as repr() puts it.
    pub fn value(&self, code: &str) -> Result<String> {
        let answer = self.eval(code).with_context(|| format!("eval in {}", self.id))?;
        match (answer.result, answer.error) {
            (Some(value), None) => Ok(value),
            (None, None) => bail!("{code}: no value"),
            (_, Some(error)) => bail!("{code} raises: {}", error.traceback),
        }
    }

    /// Runs statements, which must not raise.
    pub fn run(&self, code: &str) -> Result<()> {
        let answer = self.eval(code).with_context(|| format!("eval in {}", self.id))?;
        match answer.error {
            None => Ok(()),
            Some(error) => bail!("{code} raises: {}", error.traceback),
        }
    }

    /// Evaluates an expression whose value is a str that holds JSON.
    pub fn json(&self, code: &str) -> Result<Value> {
        let answer = self.eval(&format!("print(json.dumps({code}))"))?;
        ensure!(answer.error.is_none(), "{code} raises: {:?}", answer.error);
        serde_json::from_str(&answer.stdout).with_context(|| format!("no JSON: {}", answer.stdout))
    }

    /// `forkd exec` with options, of a command.
    pub fn exec_with(&self, options: &[&str], command: &[&str]) -> Run {
        self.suite.forkd(["exec"]).args(options).arg(&self.id).arg("--").args(command)
    }

    /// `forkd exec` of a command.
    pub fn exec(&self, command: &[&str]) -> Run {
        self.exec_with(&[], command)
    }

    /// Runs a shell script, which must succeed; gives its output.
    pub fn sh(&self, script: &str) -> Result<String> {
        Ok(self.exec(&["/bin/sh", "-c", script]).ok()?.text())
    }

    /// Puts a program into /tmp, under its own name.
    pub fn install(&self, program: &Path) -> Result<()> {
        let name = program.file_name().context("a program has a name")?.to_string_lossy();
        let script = format!("cat > /tmp/{name} && chmod +x /tmp/{name}");
        let receive = self.exec_with(&["-i"], &["/bin/sh", "-c", &script]);
        receive.stdin(fs::read(program)?).ok().map(drop)
    }

    /// Runs the guest's test program, which must succeed; gives its output.
    pub fn guest(&self, args: &[&str]) -> Result<String> {
        let command: Vec<&str> = ["/tmp/guest"].iter().chain(args).copied().collect();
        let said = self.exec(&command).ok().with_context(|| format!("in {}", self.id))?;
        Ok(said.text())
    }

    /// The same, whatever its status.
    pub fn guest_output(&self, args: &[&str]) -> Result<Output> {
        let command: Vec<&str> = ["/tmp/guest"].iter().chain(args).copied().collect();
        self.exec(&command).output()
    }

    /// Branches it.
    pub fn branch(&self, count: usize) -> Result<Branched<'s>> {
        let args = ["branch", &self.id, "--json", "-n", &count.to_string()];
        let said = self.suite.forkd(args).output()?;
        let branched = Branched::read(self.suite, said)?;
        ensure!(branched.pause.is_some(), "a branch tells how long its source paused");
        ensure!(branched.children.len() == count, "{} branches", branched.children.len());
        Ok(branched)
    }

    /// Branches it once.
    pub fn branch_one(&self) -> Result<Vm<'s>> {
        self.branch(1)?.children.pop().context("one branch")
    }

    /// Pauses it, or lets it go on.
    pub fn set_running(&self, running: bool) -> Result<()> {
        let state = if running { "Resumed" } else { "Paused" };
        self.api()?.send_json("PATCH", "/vm", &json!({ "state": state }))?;
        Ok(())
    }

    /// Ends it.
    pub fn kill(&self) -> Result<()> {
        self.suite.forkd(["kill", &self.id]).ok()?;
        ensure!(!self.dir().exists(), "{} is ended and its directory is there", self.id);
        Ok(())
    }
}
