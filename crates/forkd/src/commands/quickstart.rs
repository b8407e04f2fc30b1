//! `forkd quickstart`: the main job, step by step.

mod branching;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use forkd_sys::clock::monotonic_ns;
use serde::Serialize;

use crate::cleanup::{self, Guard};
use crate::cli::OutputArgs;
use crate::commands::fork::{Child, Forked, Request, fork};
use crate::commands::image::{self, PYTHON};
use crate::commands::snapshot::{Created, Plan, Warm, create};
use crate::guest::Guest;
use crate::paths::Paths;
use crate::process_memory::ProcessMemory;
use crate::registry::Live;
use crate::vm_client::VmClient;
use crate::{output, parallel, registry};

use branching::Branching;

/// Tag of the snapshot, and the start of the children's names.
const TAG: &str = "quickstart";
/// How long a child's agent has to answer.
const WAIT: Duration = Duration::from_secs(120);

/// The parent's work, which its children need not do again.
const WARM: &str = "import numpy as np\n\
                    data = np.arange(1_000_000, dtype=np.float64).reshape(1000, 1000)\n";
/// One expression per child, on the array that it inherits. None makes a large array of its own: that would time the
/// guest's page faults, not the fork.
const EXPRESSIONS: [&str; 10] = [
    "data.sum()",
    "data.mean()",
    "data[500].std()",
    "data[17].max()",
    "data[:, 3].min()",
    "np.median(data[3])",
    "data.trace()",
    "(data[42] % 7 == 0).sum()",
    "np.sqrt(data[9]).sum()",
    "np.random.random()",
];

/// See it all, step by step
///
/// Boots a VM, warms Python with numpy in it, takes a snapshot, forks 10 children that compute on the array they
/// inherit, and branches one while it counts. The first run builds the root image.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd quickstart
  forkd quickstart --clean     leave nothing running")]
pub struct Args {
    /// End all VMs and remove the snapshot at the end
    #[arg(long)]
    clean: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// A child's answer.
#[derive(Debug, Serialize)]
struct Answer {
    name: String,
    id: String,
    expression: &'static str,
    result: String,
    running_us: u64,
    answer_us: u64,
    private_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    snapshot: Created,
    fork_us: u64,
    children: Vec<Answer>,
    branch: Branching,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// The step that failed, and why. What it made is gone then.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let say = |text: &str| if self.output.json { Ok(()) } else { output::line(text) };
        say("forkd quickstart: fork() for microVMs\n")?;
        image::build(paths, &forkd_image::Recipe::python()?, Some(PYTHON), self.output.json)?;
        cleanup::watch_signals().context("cannot watch signals")?;
        end_earlier_run(paths)?;

        let snapshot = create(paths, &plan(self.output.json))?;
        let guard = Guard::new({
            let paths = paths.clone();
            move || {
                if let Err(e) = end_earlier_run(&paths) {
                    output::note(&format!("forkd: {}", output::error_line(&e)));
                }
            }
        });
        let source = registry::snapshot(paths, TAG)?;

        let request =
            Request { count: EXPRESSIONS.len(), name: Some(TAG.to_string()), wait: Some(WAIT) };
        let forked = fork(paths, &source, &request)?;
        forked.require_all()?;
        let children = ask_all(paths, &forked)?;
        if !self.output.json {
            print_children(&forked, &children)?;
        }

        let parent = registry::vm(paths, &format!("{TAG}-1"))?;
        let branch = Branching::run(paths, &parent, WAIT)?;
        if !self.output.json {
            branch.print()?;
        }
        branch.check()?;

        if self.clean {
            drop(guard);
        } else {
            guard.disarm();
        }
        if self.output.json {
            output::json(&Report { snapshot, fork_us: forked.elapsed_us, children, branch })?;
        } else if !self.clean {
            output::line(NEXT)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

const NEXT: &str = "
Try next:
  forkd ls                                        the VMs that run now
  forkd eval quickstart-2 'data[0, :5] * 2'       Python in one of them
  forkd exec quickstart-2 -- uname -a             a command in one of them
  forkd exec -it quickstart-2 -- bash             a shell in one of them
  forkd branch quickstart-2 --name copy           fork it where it stands
  forkd fork quickstart -n 100                    a hundred more
  forkd bench                                     what all this costs here
  forkd kill --all; forkd snapshot rm quickstart  the end";

fn plan(quiet: bool) -> Plan {
    Plan {
        tag: TAG.to_string(),
        image: PYTHON.to_string(),
        vcpus: 1,
        mem_mib: 512,
        warm: Some(Warm { name: "import numpy; data = ...".to_string(), code: WARM.to_string() }),
        disks: Vec::new(),
        kernel: None,
        cmdline: String::new(),
        boot_timeout_s: None,
        quiet,
    }
}

/// Ends what a run of this verb has left running.
fn end_earlier_run(paths: &Paths) -> Result<()> {
    let ours = |live: &Live| live.record.name.starts_with(&format!("{TAG}-"));
    let mut doomed: Vec<Live> = registry::vms(paths)?.into_iter().filter(ours).collect();
    doomed.extend(registry::snapshots(paths)?.into_iter().filter(|l| l.record.id == TAG));
    parallel::map(&doomed, |live| live.client.stop(live.record.pid)).into_iter().collect()
}

/// Lets each child evaluate its expression, all at once.
fn ask_all(paths: &Paths, forked: &Forked) -> Result<Vec<Answer>> {
    let pairs: Vec<(&Child, &'static str)> = forked.children.iter().zip(EXPRESSIONS).collect();
    let answers = parallel::map(&pairs, |(child, expression)| ask(paths, child, expression));
    let mut answers = answers.into_iter().collect::<Result<Vec<_>>>()?;
    for (answer, child) in answers.iter_mut().zip(&forked.children) {
        // Apart from the asking: the kernel's walk would slow the others down.
        answer.private_bytes = ProcessMemory::of(child.pid.context("a child has no process")?)?.uss;
    }
    Ok(answers)
}

fn ask(paths: &Paths, child: &Child, expression: &'static str) -> Result<Answer> {
    let client = VmClient::new(&paths.vm(&child.id), &child.id);
    let outcome = Guest::of(&client).eval(expression, Some(WAIT), &mut |_, _| Ok(()))?;
    if let Some(error) = outcome.error {
        bail!("{}: {expression} raised {}", child.name, error.summary());
    }
    let since = |at: u64| at.saturating_sub(child.timing.requested_ns) / 1000;
    Ok(Answer {
        name: child.name.clone(),
        id: child.id.clone(),
        expression,
        result: outcome
            .result
            .with_context(|| format!("{}: {expression} gave nothing", child.name))?,
        running_us: since(child.timing.running_ns),
        answer_us: since(monotonic_ns()),
        private_bytes: 0,
    })
}

fn print_children(forked: &Forked, children: &[Answer]) -> Result<()> {
    let us = |us: u64| output::duration(Duration::from_micros(us));
    output::line(&format!(
        "\n{} children forked, all ready after {}; each computes on the array it inherited:\n",
        children.len(),
        us(forked.elapsed_us)
    ))?;
    let header =
        ["child", "expression", "answer", "fork to running", "to first answer", "private memory"];
    let rows = children.iter().map(|c| {
        vec![
            c.name.clone(),
            c.expression.to_string(),
            c.result.clone(),
            us(c.running_us),
            us(c.answer_us),
            output::bytes(c.private_bytes),
        ]
    });
    output::line(&output::table(&header, rows))
}
