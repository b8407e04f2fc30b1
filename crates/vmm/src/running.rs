//! The role of a VM that runs: its event loop.
//!
//! One thread waits for readiness and acts on it: virtqueues that the guest has notified, vsock's host
//! side, the API, the agent link, signals, children. vCPUs run on threads of their own and come here
//! only as events.

use std::io;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use forkd_agent::protocol::init::{Identity, Reason};
use forkd_api::server::RequestId;
use forkd_api::types::{
    Action, ChildResult, ChildSpec, DesiredState, Timing, VmConfig, VmInfo, VmPhase, VmRecord,
    ZygoteRequest,
};
use forkd_sys::clock::{monotonic_ns, realtime_ns};
use forkd_sys::reactor::{Reactor, Readiness};
use forkd_vm::GuestMode;

use crate::agent_link::{AgentLink, HELLO_PORT, LinkEvent, NOTICE_PORT};
use crate::collapsing::Collapsing;
use crate::control::{Control, Flow, Handled, Serve, instance_info, tokens};
use crate::fork::crowd::Token;
use crate::fork::{Destiny, child};
use crate::lazy::{self, Lazy};
use crate::machine::engine::Engine;
use crate::machine::{Gate, Machine};
use crate::pause::{Costs, Limit};
use crate::process::{Next, VmmError, report, tell};
use crate::requests::{Refusal, VmmAction};
use crate::run_dir::RunDir;
use crate::snapshot::live::{Capturing, Preparing};
use crate::vcpus::{PARK_TIMEOUT, VcpuEvent};

/// Who waits to hear that the vCPUs run.
pub enum Announce {
    /// Nobody (any more).
    Nobody,
    /// Whoever started this process, on standard output.
    Starter,
    /// The source of the fork, on a pipe.
    Source(io::PipeWriter),
}

/// How long a zygote waits for its guest to come to rest, and how often it is looked at meanwhile.
const SETTLE: Duration = Duration::from_millis(100);
const SETTLE_LOOK: Duration = Duration::from_millis(2);

/// A client that waits until the VM is ready or has failed.
struct Waiter {
    request: RequestId,
    deadline: Instant,
}

/// A VM that runs.
pub struct Running {
    pub(crate) control: Control,
    pub(crate) machine: Machine,
    pub(crate) engine: Engine,
    pub(crate) dir: RunDir,
    pub(crate) link: AgentLink,
    pub(crate) record: VmRecord,
    pub(crate) timing: Timing,
    pub(crate) announce: Announce,
    pub(crate) phase: VmPhase,
    pub(crate) error: Option<String>,
    /// The right to wake up, until the agent has acknowledged.
    pub(crate) waking: Option<Token>,
    /// A live snapshot of this VM that is being written.
    pub(crate) capture: Option<Capturing>,
    /// RAM that is still being loaded.
    pub(crate) lazy: Option<Lazy>,
    /// One whose RAM is being protected ahead of the pause.
    pub(crate) preparing: Option<Preparing>,
    /// A fork that waits until RAM is in huge pages.
    pub(crate) collapsing: Option<Collapsing>,
    /// What pauses of this VM cost.
    pub(crate) costs: Costs,
    waiters: Vec<Waiter>,
    /// A zygote that is wanted once the guest has rehearsed the fork notice.
    rehearsing: Option<(RequestId, ChildSpec, Limit)>,
    /// Until when that zygote waits for the guest to be idle.
    settle_until: Option<Instant>,
}

/// What [`Running::new`] puts together.
pub struct Parts {
    /// Reactor, API, signals, children.
    pub control: Control,
    /// RAM and devices.
    pub machine: Machine,
    /// KVM VM and vCPUs.
    pub engine: Engine,
    /// Run directory.
    pub dir: RunDir,
    /// Link to the agent.
    pub link: AgentLink,
    /// Who this VM is.
    pub record: VmRecord,
    /// Marks so far.
    pub timing: Timing,
    /// Who waits for it to run.
    pub announce: Announce,
}

impl Running {
    /// A VM whose vCPUs are about to run.
    pub fn new(parts: Parts) -> Self {
        let Parts { control, machine, engine, dir, link, record, timing, announce } = parts;
        Self {
            control,
            machine,
            engine,
            dir,
            link,
            record,
            timing,
            announce,
            phase: VmPhase::Starting,
            error: None,
            waking: None,
            capture: None,
            lazy: None,
            preparing: None,
            collapsing: None,
            costs: Costs::default(),
            waiters: Vec::new(),
            rehearsing: None,
            settle_until: None,
        }
    }

    /// Builds a VM as `config` says and starts it.
    ///
    /// # Errors
    /// What could not be had; its run directory is removed then.
    pub fn boot(config: VmConfig) -> Result<Self, VmmError> {
        let requested_ns = monotonic_ns();
        crate::machine::config::check(&config)?;
        let dir = RunDir::create(&config.dir)?;
        Self::boot_in(&dir, &config, requested_ns)
            .inspect_err(|_| {
                // The error at hand is the one to tell; a directory that stays is swept later.
                let _ = std::fs::remove_dir_all(dir.path());
            })
            .map(|(control, machine, engine, link, record, timing)| {
                let announce = Announce::Starter;
                engine.vcpus.resume();
                Self::new(Parts { control, machine, engine, dir, link, record, timing, announce })
            })
    }

    fn boot_in(
        dir: &RunDir,
        config: &VmConfig,
        requested_ns: u64,
    ) -> Result<(Control, Machine, Engine, AgentLink, VmRecord, Timing), VmmError> {
        let record = VmRecord {
            id: config.id.clone(),
            name: config.name.clone(),
            zygote: false,
            pid: std::process::id(),
            vcpus: config.vcpus,
            mem_mib: config.mem_mib,
            image: config.image.clone(),
            image_digest: config.image_digest.clone(),
            parent: None,
            generation: 0,
            created_unix_ms: realtime_ns() / 1_000_000,
        };
        dir.write_record(&record)?;
        let reactor = Reactor::new().map_err(VmmError::io("cannot make an epoll set"))?;
        let control = Control::new(reactor, &dir.file("api.sock"))?;
        let machine = Machine::build(config, dir)?;
        machine.register(&control.reactor)?;
        let mut timing = Timing { requested_ns, ..Timing::default() };
        let engine = Engine::boot(&machine, config, &mut timing)?;
        let mut link = AgentLink::new(&control.reactor, tokens::LINK)
            .map_err(VmmError::io("cannot make the agent link"))?;
        machine.vsock_listen_internal(HELLO_PORT);
        link.await_hello(Duration::from_secs(u64::from(config.boot_timeout_s)))
            .map_err(VmmError::io("cannot make the agent link"))?;
        Ok((control, machine, engine, link, record, timing))
    }

    /// Serves until the VM ends, or until this process turns out to be a child of it.
    ///
    /// # Errors
    /// The loop itself fails. The run directory is removed then as well.
    pub fn serve(mut self: Box<Self>) -> Result<Next, VmmError> {
        let flow = self.event_loop();
        match flow {
            Ok(Flow::Child(birth)) => {
                let Self { control, machine, engine, dir, link, record, .. } = *self;
                drop((control, dir, link));
                let inherited = child::Inherited::from_running(machine, engine, record);
                Ok(Next::Child(birth, Box::new(inherited)))
            }
            Ok(Flow::Exit(code)) => self.end().map(|()| Next::Exit(ExitCode::from(code))),
            Ok(Flow::Go) => self.end().map(|()| Next::Exit(ExitCode::SUCCESS)),
            Err(error) => {
                self.end()?;
                Err(VmmError::Setup("the event loop failed", error))
            }
        }
    }

    fn end(mut self) -> Result<(), VmmError> {
        // Its thread works on RAM.
        drop(self.collapsing.take());
        // Both may hold up a vCPU, and nothing of them is to stay.
        if let Some(preparing) = self.preparing.take() {
            preparing.give_up("the VM ended before it was taken");
        }
        if let Some(capturing) = self.capture.take() {
            capturing.give_up("the VM ended while it was written");
        }
        // The directory first: once it is gone the VM is gone for everybody, while KVM takes its time.
        self.dir.remove()?;
        lazy::exit_if_stuck(&self.machine);
        self.engine.stop().map_err(VmmError::from)
    }

    fn event_loop(&mut self) -> io::Result<Flow> {
        let mut events = Vec::new();
        loop {
            self.control.reactor.wait(&mut events, self.next_timeout())?;
            for readiness in events.drain(..) {
                match self.dispatch(readiness)? {
                    Flow::Go => {}
                    other => return Ok(other),
                }
            }
            for snapshot in self.control.offspring.take_written() {
                self.machine.set_latest(snapshot);
            }
            self.load_rest();
            if self.settle_until.is_some() {
                match self.after_rehearsal()? {
                    Flow::Go => {}
                    other => return Ok(other),
                }
            }
            self.control.answer_forks()?;
            self.answer_waiters()?;
        }
    }

    fn next_timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        let waiters = self.waiters.iter().map(|w| w.deadline.saturating_duration_since(now)).min();
        let ram = self.lazy.as_ref().and_then(Lazy::next_deadline);
        let settle = self.settle_until.map(|_| SETTLE_LOOK);
        [waiters, self.control.offspring.next_deadline(), ram, settle].into_iter().flatten().min()
    }

    fn dispatch(&mut self, readiness: Readiness) -> io::Result<Flow> {
        let token = readiness.token;
        if token == tokens::WAKER {
            return self.on_wake();
        }
        if token == tokens::CAPTURE {
            return self.after_capture().map(|()| Flow::Go);
        }
        if token == tokens::RAM {
            return self.on_ram();
        }
        if token == tokens::AHEAD {
            return self.after_ahead().map(|()| Flow::Go);
        }
        if token == tokens::COLLAPSE {
            return self.after_collapse();
        }
        if self.machine.owns(token) {
            self.machine.handle(&self.control.reactor, &readiness);
            return self.after_device_work();
        }
        if self.link.owns(token) {
            if let Some(event) = self.link.handle(&self.control.reactor, readiness)? {
                self.on_link(event)?;
            }
            return self.after_rehearsal();
        }
        match self.control.handle(readiness)? {
            None | Some(Handled::Nothing) => Ok(Flow::Go),
            Some(Handled::Terminate) => Ok(Flow::Exit(0)),
            Some(Handled::Requests(requests)) => self.on_requests(requests),
        }
    }

    /// vCPUs or devices have rung.
    fn on_wake(&mut self) -> io::Result<Flow> {
        self.machine.drain_wakes()?;
        if self.machine.take_reset_request() {
            return Ok(self.guest_ended());
        }
        for event in self.engine.vcpus.take_events() {
            match event {
                VcpuEvent::Reset | VcpuEvent::Shutdown => return Ok(self.guest_ended()),
                VcpuEvent::Failed(index, error) => {
                    let why = format!("vCPU {index} cannot go on: {error}");
                    crate::log::line(&why);
                    // With one of them gone, the others would only spin.
                    self.engine.vcpus.request_park();
                    self.fail(why)?;
                }
            }
        }
        self.machine.process_pending(&self.control.reactor);
        self.announce_running()?;
        self.after_device_work()
    }

    /// The guest is gone. Before it was ready that is a failure that someone waits to hear of.
    fn guest_ended(&mut self) -> Flow {
        if self.phase == VmPhase::Starting && !self.waiters.is_empty() {
            let tail = self.machine.console_tail();
            let why =
                format!("the guest ended before its agent was ready; its last words:\n{tail}");
            // The loop ends anyway; a reactor that fails now changes nothing.
            let _ = self.fail(why).and_then(|()| self.answer_waiters());
            return Flow::Exit(1);
        }
        Flow::Exit(0)
    }

    fn after_device_work(&mut self) -> io::Result<Flow> {
        for (port, stream) in self.machine.take_vsock_incoming() {
            if port == HELLO_PORT {
                self.link.accept_hello(&self.control.reactor, stream)?;
            }
        }
        Ok(Flow::Go)
    }

    fn announce_running(&mut self) -> io::Result<()> {
        if matches!(self.announce, Announce::Nobody) {
            return Ok(());
        }
        let Some(running_ns) = self.engine.vcpus.running_since() else { return Ok(()) };
        self.timing.running_ns = running_ns;
        match std::mem::replace(&mut self.announce, Announce::Nobody) {
            Announce::Nobody => Ok(()),
            Announce::Starter => {
                tell(&serde_json::json!({"ok": true}));
                child::detach_stdio(&self.dir)
            }
            Announce::Source(mut pipe) => {
                let (id, timing) = (self.record.id.clone(), self.timing);
                let pid = Some(self.record.pid);
                report(&mut pipe, &ChildResult { id, pid, error: None, root: None, timing });
                Ok(())
            }
        }
    }

    fn on_link(&mut self, event: LinkEvent) -> io::Result<()> {
        self.waking = None;
        match event {
            LinkEvent::Hello(_) => {
                self.timing.agent_hello_ns = monotonic_ns();
                self.send_notice(Reason::Boot)
            }
            LinkEvent::Ready => {
                if self.phase == VmPhase::Starting {
                    self.timing.ready_ns = monotonic_ns();
                    self.phase = VmPhase::Ready;
                    self.machine.set_gate(Gate::Open);
                    if let Some(lazy) = &mut self.lazy {
                        lazy.guest_is_ready();
                    }
                }
                Ok(())
            }
            LinkEvent::Failed(why) => {
                // A guest whose kernel mode runs natively may spin within KVM, which nothing else would tell.
                if self.machine.mode() == GuestMode::PvmNative && self.phase == VmPhase::Starting {
                    let where_it_was = self.engine.stop_and_look();
                    crate::log::line(&format!("{why}; {where_it_was}"));
                    return self.fail(format!("{why}; {where_it_was}"));
                }
                self.fail(why)
            }
        }
    }

    /// Forks the zygote that waited for the rehearsal, if the rehearsal is over.
    pub(crate) fn after_rehearsal(&mut self) -> io::Result<Flow> {
        if self.link.is_busy() || self.collapsing.is_some() {
            return Ok(Flow::Go);
        }
        if self.rehearsing.is_some() && !self.has_settled() {
            return Ok(Flow::Go);
        }
        let Some((request, spec, limit)) = self.rehearsing.take() else { return Ok(Flow::Go) };
        match self.fork(request, vec![spec], Destiny::Zygote, limit)? {
            Ok(flow) => Ok(flow),
            Err(Refusal { status, message }) => {
                self.control.answer_fault(request, status, message)?;
                Ok(Flow::Go)
            }
        }
    }

    /// Whether the guest has come to rest, or has had [`SETTLE`] for it. What it is still at in the instant of the fork, such
    /// as the last bytecodes of the interpreter that warmed it, every child would do again.
    fn has_settled(&mut self) -> bool {
        let now = Instant::now();
        let until = *self.settle_until.get_or_insert(now + SETTLE);
        let settled = self.engine.vcpus.are_asleep() || now >= until;
        if settled {
            self.settle_until = None;
        }
        settled
    }

    /// Tells the guest who it is.
    ///
    /// # Errors
    /// The reactor fails, or the host is out of fds.
    pub fn send_notice(&mut self, reason: Reason) -> io::Result<()> {
        let stream = self.machine.connect_internal(NOTICE_PORT)?;
        let mut machine_id = [0; 16];
        forkd_sys::random::fill(&mut machine_id)?;
        let identity = Identity {
            id: self.record.id.clone(),
            hostname: self.record.name.clone(),
            generation: self.record.generation,
            machine_id: machine_id.iter().map(|b| format!("{b:02x}")).collect(),
        };
        self.link.send_notice(&self.control.reactor, stream, identity, reason)
    }

    pub(crate) fn fail(&mut self, why: String) -> io::Result<()> {
        if self.phase == VmPhase::Failed {
            // What comes of a failure is not to hide it.
            return Ok(());
        }
        self.phase = VmPhase::Failed;
        self.error = Some(why.clone());
        self.machine.set_gate(Gate::Refuse(why));
        Ok(())
    }
}

impl Serve for Running {
    fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    fn admit(&mut self, id: RequestId, action: VmmAction) -> Option<VmmAction> {
        let action = self.unless_loading(id, action)?;
        self.unless_collapsing(id, action)
    }

    fn act(&mut self, id: RequestId, action: VmmAction) -> io::Result<Result<Flow, Refusal>> {
        match action {
            VmmAction::InstanceInfo => {
                let state = match self.phase {
                    VmPhase::Paused | VmPhase::Zygote => "Paused",
                    _ => "Running",
                };
                self.control.answer(id, 200, &instance_info(&self.record.id, state))?;
            }
            VmmAction::VmInfo => self.control.answer(id, 200, &self.info())?,
            VmmAction::WaitReady(timeout) => {
                self.waiters.push(Waiter { request: id, deadline: Instant::now() + timeout });
            }
            VmmAction::Metrics => {
                let metrics = self.machine.metrics(Some(&self.engine));
                self.control.answer(id, 200, &metrics)?;
            }
            VmmAction::Written => match self.machine.written() {
                Ok(pages) => self.control.answer(id, 200, &pages)?,
                Err(error) => return Ok(Err(Refusal::new(409, error.to_string()))),
            },
            VmmAction::Hot(_) => {
                let why = "this VM runs: pages are copied ahead for children of a zygote";
                return Ok(Err(Refusal::new(409, why)));
            }
            VmmAction::Fork(request) => {
                let limit = Limit::from_us(request.max_pause_us);
                return self.fork(id, request.children, Destiny::Vm, limit);
            }
            VmmAction::Zygote(ZygoteRequest { tag, dir, rehearse, max_pause_us }) => {
                let limit = Limit::from_us(max_pause_us);
                let spec = ChildSpec { id: tag.clone(), name: tag, dir };
                if rehearse {
                    return self.rehearse(id, spec, limit);
                }
                return self.fork(id, vec![spec], Destiny::Zygote, limit);
            }
            VmmAction::Snapshot(request) => return self.save(id, &request),
            VmmAction::Persist(_) => {
                let why = "this VM runs: POST /snapshot keeps it, /persist is for zygotes";
                return Ok(Err(Refusal::new(409, why)));
            }
            VmmAction::SetState(state) => return self.set_state(id, state),
            VmmAction::Act(Action::SendCtrlAltDel) => {
                self.machine.press_ctrl_alt_del();
                self.control.answer_empty(id)?;
            }
            VmmAction::Act(Action::Stop) => {
                self.control.answer_empty(id)?;
                return Ok(Ok(Flow::Exit(0)));
            }
        }
        Ok(Ok(Flow::Go))
    }
}

impl Running {
    fn info(&self) -> VmInfo {
        VmInfo {
            record: self.record.clone(),
            phase: self.phase,
            error: self.error.clone(),
            timing: self.timing,
            kernel_mode: Some(self.machine.kernel_mode()),
        }
    }

    fn answer_waiters(&mut self) -> io::Result<()> {
        let settled = self.phase != VmPhase::Starting;
        let now = Instant::now();
        let (due, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiters)
            .into_iter()
            .partition(|w| settled || w.deadline <= now);
        self.waiters = rest;
        for waiter in due {
            let info = self.info();
            self.control.answer(waiter.request, 200, &info)?;
        }
        Ok(())
    }

    fn set_state(
        &mut self,
        id: RequestId,
        state: DesiredState,
    ) -> io::Result<Result<Flow, Refusal>> {
        match (state, self.phase) {
            (DesiredState::Paused, VmPhase::Ready) => {
                self.engine.vcpus.request_park();
                if let Err(error) = self.engine.vcpus.wait_parked(PARK_TIMEOUT) {
                    self.engine.vcpus.resume();
                    return Ok(Err(Refusal::new(500, error.to_string())));
                }
                self.phase = VmPhase::Paused;
            }
            (DesiredState::Resumed, VmPhase::Paused) => {
                self.engine.vcpus.resume();
                self.phase = VmPhase::Ready;
            }
            (DesiredState::Paused, VmPhase::Paused) | (DesiredState::Resumed, VmPhase::Ready) => {}
            (_, phase) => {
                let why = format!("the VM is {phase:?}: only one that is ready can be paused");
                return Ok(Err(Refusal::new(409, why)));
            }
        }
        self.control.answer_empty(id)?;
        Ok(Ok(Flow::Go))
    }

    /// Has the guest go through a fork notice before it becomes a zygote: what that touches for the first
    /// time (code of a DAX file, page tables, buffers) is then in place in every child, and not faulted in by
    /// each. Without it, that was most of a child's way to its first answer.
    fn rehearse(
        &mut self,
        id: RequestId,
        spec: ChildSpec,
        limit: Limit,
    ) -> io::Result<Result<Flow, Refusal>> {
        if self.phase != VmPhase::Ready || self.rehearsing.is_some() {
            let why =
                format!("the VM is {:?}: only one that is ready becomes a zygote", self.phase);
            return Ok(Err(Refusal::new(409, why)));
        }
        if let Err(error) = self.machine.ram().check_fork() {
            return Ok(Err(Refusal::new(409, error.to_string())));
        }
        if let Err(error) = self.send_notice(Reason::Fork) {
            let why = format!("cannot send the fork notice: {error}");
            return Ok(Err(Refusal::new(500, why)));
        }
        self.rehearsing = Some((id, spec, limit));
        Ok(Ok(Flow::Go))
    }

    /// Refuses (409) what only a VM whose agent has acknowledged can do: `done` says what, "forked" or "saved".
    pub(crate) fn require_ready(&self, done: &str) -> Result<(), Refusal> {
        if matches!(self.phase, VmPhase::Ready | VmPhase::Paused) {
            return Ok(());
        }
        let why = format!("the VM is {:?}: only one that is ready can be {done}", self.phase);
        Err(Refusal::new(409, why))
    }
}
