//! The child's side of a fork: letting go of the source, and becoming a VM or a zygote.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;

use forkd_agent::protocol::init::Reason;
use forkd_api::types::{ChildResult, Timing, VmRecord};
use forkd_sys::clock::{monotonic_ns, realtime_ns};
use forkd_sys::reactor::Reactor;

use super::crowd::Crowd;
use super::fds::{Disposition, Registry};
use super::{Birth, Destiny};
use crate::agent_link::AgentLink;
use crate::control::{Control, tokens};
use crate::machine::Machine;
use crate::machine::engine::Engine;
use crate::process::{Role, VmmError, report};
use crate::run_dir::RunDir;
use crate::running::{Announce, Parts, Running};
use crate::zygote::Zygote;

/// What a child has from its source, once the source's sockets, epoll set and lock are dropped.
#[derive(Debug)]
pub struct Inherited {
    machine: Machine,
    /// The source's KVM VM, which this process cannot use: KVM binds a VM to one address space.
    foreign: Option<Engine>,
    source: VmRecord,
}

impl Inherited {
    /// From a VM that runs (in the source).
    pub fn from_running(machine: Machine, engine: Engine, source: VmRecord) -> Self {
        Self { machine, foreign: Some(engine), source }
    }

    /// From a zygote.
    pub fn from_zygote(machine: Machine, source: VmRecord) -> Self {
        Self { machine, foreign: None, source }
    }
}

/// A child that could not become what it was to be.
#[derive(Debug)]
pub struct Stillborn {
    pipe: io::PipeWriter,
    result: ChildResult,
}

impl Stillborn {
    /// Tells the source.
    pub fn report(mut self) {
        report(&mut self.pipe, &self.result);
    }
}

/// Turns a child that was just forked into what it is to be.
///
/// # Errors
/// What could not be had, ready to be reported to the source.
pub fn be_born(birth: Birth, inherited: Inherited) -> Result<Role, Box<Stillborn>> {
    let Inherited { mut machine, foreign, source } = inherited;
    let Birth { spec, destiny, report, saved, crowd, mut timing } = birth;
    let zygote = match destiny {
        Destiny::Vm => false,
        Destiny::Zygote => true,
        Destiny::Writer(errand) => {
            if let Some(engine) = foreign {
                engine.abandon_in_child();
            }
            crate::snapshot::run_writer(
                &machine, &saved, &source, *errand, spec.id, report, timing,
            );
        }
    };
    let record = VmRecord {
        id: spec.id.clone(),
        name: spec.name.clone(),
        zygote,
        pid: std::process::id(),
        parent: Some(source.id.clone()),
        generation: source.generation.saturating_add(1),
        created_unix_ms: realtime_ns() / 1_000_000,
        ..source
    };
    let born = let_go(&mut machine, foreign, &report, crowd.as_ref()).and_then(|()| {
        if zygote {
            return settle_as_zygote(machine, saved, &spec.dir, record, timing);
        }
        let engine = Engine::rebuild(&machine, &saved, &mut timing)?;
        let home = Home::ToMake(&spec.dir);
        Newborn { machine, engine, home, record, crowd, timing }.settle_in().map(Role::Running)
    });
    match born {
        Ok(Role::Running(mut running)) => {
            running.announce = Announce::Source(report);
            Ok(Role::Running(running))
        }
        Ok(Role::Zygote(zygote)) => {
            let mut pipe = report;
            let pid = Some(zygote.record.pid);
            let result = ChildResult {
                id: zygote.record.id.clone(),
                pid,
                error: None,
                root: None,
                timing: zygote.timing,
            };
            crate::process::report(&mut pipe, &result);
            Ok(Role::Zygote(zygote))
        }
        Err(error) => {
            let pid = Some(std::process::id());
            let result = ChildResult {
                id: spec.id,
                pid,
                error: Some(error.to_string()),
                root: None,
                timing,
            };
            Err(Box::new(Stillborn { pipe: report, result }))
        }
    }
}

/// Drops what only the source can use, and closes every fd that is not to be kept.
fn let_go(
    machine: &mut Machine,
    foreign: Option<Engine>,
    report: &io::PipeWriter,
    crowd: Option<&Crowd>,
) -> Result<(), VmmError> {
    if let Some(engine) = foreign {
        engine.abandon_in_child();
    }
    machine.drop_host_side()?;
    machine.rewire().map_err(VmmError::io("cannot make an eventfd"))?;
    let mut registry = Registry::new();
    machine.register_fds(&mut registry);
    registry.register(report, Disposition::Inherit, "report");
    if let Some((reader, writer)) = crowd.map(Crowd::fds) {
        registry.register(reader, Disposition::Inherit, "crowd");
        registry.register(writer, Disposition::Inherit, "crowd");
    }
    // SAFETY: the owners of all other fds were dropped: the source's control, run directory and link
    // before this function, its engine and the devices' host sides in it.
    unsafe { registry.sweep() }.map_err(VmmError::io("cannot close the source's fds"))?;
    // A session of its own: a signal to the source's process group is none of the child's business.
    match rustix::process::setsid() {
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(e) => Err(VmmError::Setup("cannot start a session", e.into())),
    }
}

/// Where a newborn lives.
enum Home<'a> {
    /// It makes its run directory, and lets go of its source's streams and logs.
    ToMake(&'a std::path::Path),
    /// It has one; its standard streams are those of whoever started it, who has yet to be told.
    Made(RunDir),
}

struct Newborn<'a> {
    machine: Machine,
    engine: Engine,
    home: Home<'a>,
    record: VmRecord,
    crowd: Option<Crowd>,
    timing: Timing,
}

/// Lets a VM that was loaded from a durable snapshot run: as a forked child, but in the process that loaded it.
///
/// # Errors
/// What could not be had. The run directory is removed then.
pub fn run_loaded(
    machine: Machine,
    saved: &super::SavedKvm,
    dir: RunDir,
    record: VmRecord,
    mut timing: Timing,
) -> Result<Box<Running>, VmmError> {
    let built =
        machine.drop_host_side().and_then(|()| Engine::rebuild(&machine, saved, &mut timing));
    let engine = match built {
        Ok(engine) => engine,
        Err(error) => {
            dir.remove()?;
            return Err(error);
        }
    };
    let home = Home::Made(dir);
    let newborn = Newborn { machine, engine, home, record, crowd: None, timing };
    let mut running = newborn.settle_in()?;
    running.announce = Announce::Starter;
    Ok(running)
}

impl Newborn<'_> {
    /// Starts the vCPUs, then takes a run directory, sockets and logs: nobody can ask for those before
    /// the source has answered, while every microsecond before the vCPUs run is the fork's latency.
    fn settle_in(self) -> Result<Box<Running>, VmmError> {
        let Self { machine, engine, home, record, crowd, timing } = self;
        let reactor = Reactor::new().map_err(VmmError::io("cannot make an epoll set"))?;
        let link = AgentLink::new(&reactor, tokens::LINK)
            .map_err(VmmError::io("cannot make the agent link"))?;
        let token = match crowd.map(Crowd::enter) {
            Some(entered) => entered.map_err(VmmError::io("cannot wait for its turn"))?,
            None => None,
        };
        engine.vcpus.resume();
        machine.copy_for_answer();
        let (dir, forked) = match home {
            Home::ToMake(path) => (RunDir::create(path)?, true),
            Home::Made(dir) => (dir, false),
        };
        let built = (|| {
            dir.write_record(&record)?;
            if forked {
                machine.reopen_logs(&dir)?;
                detach_stdio(&dir).map_err(VmmError::io("cannot reopen standard streams"))?;
            }
            machine.listen(&dir)?;
            machine.register(&reactor)?;
            Control::new(reactor, &dir.file("api.sock"))
        })();
        let control = match built {
            Ok(control) => control,
            Err(error) => {
                dir.remove()?;
                return Err(error);
            }
        };
        let announce = Announce::Nobody;
        let mut running =
            Running::new(Parts { control, machine, engine, dir, link, record, timing, announce });
        running.waking = token;
        running.send_notice(Reason::Fork).map_err(VmmError::io("cannot send the fork notice"))?;
        running.machine.resume_devices();
        Ok(Box::new(running))
    }
}

fn settle_as_zygote(
    machine: Machine,
    saved: std::sync::Arc<super::SavedKvm>,
    dir: &std::path::Path,
    record: VmRecord,
    timing: Timing,
) -> Result<Role, VmmError> {
    let dir = RunDir::create(dir)?;
    let built = (|| {
        dir.write_record(&record)?;
        machine.reopen_logs(&dir)?;
        detach_stdio(&dir).map_err(VmmError::io("cannot reopen standard streams"))?;
        let reactor = Reactor::new().map_err(VmmError::io("cannot make an epoll set"))?;
        Control::new(reactor, &dir.file("api.sock"))
    })();
    match built {
        Ok(control) => {
            let timing = Timing { ready_ns: monotonic_ns(), ..timing };
            let unshared = Some(0);
            let zygote = Zygote { control, machine, saved, dir, record, timing, unshared };
            Ok(Role::Zygote(Box::new(zygote)))
        }
        Err(error) => {
            dir.remove()?;
            Err(error)
        }
    }
}

/// Leads standard input and output to /dev/null, and standard error to `vmm.log` in the run directory.
///
/// # Errors
/// They can't be opened.
pub fn detach_stdio(dir: &RunDir) -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let log = OpenOptions::new().create(true).append(true).open(dir.file("vmm.log"))?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&log)?;
    Ok(())
}
