//! The source's side of a live capture. Nothing here waits for the writer, but for `wait`.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use forkd_sys::fds::{close_range_except, set_nonblocking};
use forkd_sys::fork::{Child, Fork, PidFd, exit_now, fork};
use forkd_sys::userfaultfd::{Features, Mode, Userfaultfd};
use rustix::process::Signal;

use super::guest::SharedRam;
use super::report::{LEN, Outcome, Report};
use super::writer::{Writer, run};
use super::{CaptureError, PageSink, Protected};

/// What to capture, and how.
#[derive(Debug, Clone, Copy)]
pub struct LiveConfig<'a> {
    /// Address of the first byte of RAM in this process, a multiple of `page_size`.
    pub address: u64,
    /// Length of RAM in bytes, a multiple of `page_size`.
    pub len: u64,
    /// The memfd that is mapped there, shared, in one piece.
    pub memfd: BorrowedFd<'a>,
    /// Offset in the memfd of the first byte of RAM.
    pub file_offset: u64,
    /// Size of RAM's pages in bytes: 4096, or that of a hugetlb memfd.
    pub page_size: u64,
    /// Bytes of captured pages that may wait for the sink before faults do.
    pub pool_bytes: u64,
    /// How long a fault may wait for the sink before the capture gives up.
    pub max_stall: Duration,
}

impl<'a> LiveConfig<'a> {
    /// Bytes that may wait for the sink, unless something else is said.
    pub const POOL_BYTES: u64 = 64 << 20;
    /// How long a fault may wait for the sink, unless something else is said.
    pub const MAX_STALL: Duration = Duration::from_secs(2);

    /// RAM of 4 KiB pages that is all of a memfd.
    pub fn new(address: u64, len: u64, memfd: BorrowedFd<'a>) -> Self {
        Self {
            address,
            len,
            memfd,
            file_offset: 0,
            page_size: forkd_sys::mmap::page_size() as u64,
            pool_bytes: Self::POOL_BYTES,
            max_stall: Self::MAX_STALL,
        }
    }

    pub(super) fn check(&self) -> Result<(), CaptureError> {
        let wrong = |text: String| Err(CaptureError::Config(text));
        let page = self.page_size;
        if !page.is_power_of_two() || page < forkd_sys::mmap::page_size() as u64 {
            return wrong(format!("{page} bytes are no page size"));
        }
        if self.len == 0 || !self.len.is_multiple_of(page) || !self.address.is_multiple_of(page) {
            let (address, len) = (self.address, self.len);
            return wrong(format!("{len:#x} bytes at {address:#x} are not pages of {page} bytes"));
        }
        if self.address.checked_add(self.len).is_none()
            || self.file_offset.checked_add(self.len).is_none()
        {
            return wrong("RAM goes beyond the end of the address space".to_owned());
        }
        let stat = rustix::fs::fstat(self.memfd).map_err(failed("look at RAM's memfd"))?;
        if u64::try_from(stat.st_size).unwrap_or(0) < self.file_offset + self.len {
            return wrong(format!("the memfd has {} bytes, fewer than RAM", stat.st_size));
        }
        let maps = std::fs::read_to_string("/proc/self/maps");
        let maps = maps.map_err(failed("read /proc/self/maps"))?;
        let range = self.address..self.address + self.len;
        super::maps::check(&maps, &range, stat.st_ino, self.file_offset)
    }
}

/// How far a capture is.
#[derive(Debug)]
pub enum Progress {
    /// The writer is at it.
    Running,
    /// All of RAM is in the sink, which is finished; the writer has ended.
    Done(Report),
    /// There is no image; the writer has ended, and nothing is protected.
    Failed(CaptureError),
}

#[derive(Debug)]
enum Stage {
    /// Registered, not protected. The userfaultfd is kept for the arm only.
    Prepared(Userfaultfd),
    Armed,
    Running,
    Ended,
}

/// A live capture, in the source. Dropping it kills the writer, unless it has ended, or this is a
/// forked copy of the source.
///
/// The order is prepare, arm, go, poll. In the reactor go [`Self::report_fd`] (readable when the
/// writer has something to say) and [`Self::pidfd`] (readable when it has ended); on either, poll.
#[derive(Debug)]
pub struct LiveCapture {
    stage: Stage,
    /// The addresses of RAM.
    ram: std::ops::Range<u64>,
    writer: Child,
    /// Process id of the source: a fork of it has a copy of this, and no business with the writer.
    owner: u32,
    pidfd: PidFd,
    report: OwnedFd,
    /// `None` once aborted: the writer reads the end.
    commands: Option<OwnedFd>,
    /// What has been read of the report.
    said: Vec<u8>,
}

pub(super) fn failed<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> CaptureError {
    move |source| CaptureError::Source { action, source: source.into() }
}

impl LiveCapture {
    /// Forks the writer and registers RAM: what can be done before the guest is paused. `in_child`
    /// runs first in the writer, for the caller to let go of what a copy of should not be kept (KVM's
    /// maps); after it all descriptors but the needed ones are closed.
    ///
    /// # Safety
    /// As for [`fork`]: other threads may run, but hold no lock that the writer will take. The writer
    /// calls `in_child`, `sink`, the allocator, threads and channels of the standard library; it does
    /// not return, runs no destructor of the caller's, and so uses no descriptor that it has closed.
    ///
    /// # Errors
    /// [`CaptureError::Config`] for RAM that is not as described, or that cannot be write-protected
    /// (not shared memory); [`CaptureError::Source`] if a call fails: no userfaultfd, no process.
    /// Nothing is left behind.
    pub unsafe fn prepare<S: PageSink>(
        config: &LiveConfig<'_>,
        sink: S,
        in_child: impl FnOnce(),
    ) -> Result<Self, CaptureError> {
        config.check()?;
        let uffd = Userfaultfd::new(Features::WP_HUGETLBFS_SHMEM, Features::NONE)
            .map_err(failed("make a userfaultfd"))?;
        // SAFETY: as for this function.
        let (uffd, forked) = unsafe { Forked::new(config, uffd, sink, in_child) }?;
        let ram = config.address..config.address + config.len;
        register(&uffd, ram.clone())?;
        forked.watched(Stage::Prepared(uffd), ram)
    }

    /// Forks the writer of RAM that was protected ahead, by a [`super::PreArm`] of the same RAM: armed
    /// from the start. Call it in the pause; `in_child` as for [`Self::prepare`].
    ///
    /// # Safety
    /// As for [`Self::prepare`].
    ///
    /// # Errors
    /// [`CaptureError::Source`] if a call fails; the protection is gone then. [`CaptureError::Config`] if
    /// it is other RAM that was protected.
    pub unsafe fn adopt<S: PageSink>(
        config: &LiveConfig<'_>,
        protected: Protected,
        sink: S,
        in_child: impl FnOnce(),
    ) -> Result<Self, CaptureError> {
        let Protected { uffd, ram, .. } = protected;
        if ram != (config.address..config.address + config.len) {
            return Err(CaptureError::Config("it is other memory that was protected".to_owned()));
        }
        // SAFETY: as for this function.
        let (uffd, forked) = unsafe { Forked::new(config, uffd, sink, in_child) }?;
        let capture = forked.watched(Stage::Armed, ram);
        // Kept until here: without a writer it is the last one, and the protection goes with it.
        drop(uffd);
        capture
    }

    /// Write-protects all of RAM: the image is of this moment. Call it with the guest paused and no
    /// I/O to RAM under way. From now on a write to RAM, by this thread too, waits for the writer,
    /// who serves it at once.
    ///
    /// # Errors
    /// [`CaptureError::Source`]: nothing is protected then, and the capture is over.
    /// [`CaptureError::Order`] unless it is the next thing to do.
    pub fn arm(&mut self) -> Result<(), CaptureError> {
        let Stage::Prepared(uffd) = std::mem::replace(&mut self.stage, Stage::Armed) else {
            return Err(self.order("arm"));
        };
        let armed = uffd.write_protect(self.ram.clone());
        if armed.is_err() {
            // A part may be protected. What cannot be unregistered is released with the writer.
            let _released = uffd.unregister(self.ram.clone());
            self.abort();
        }
        // The userfaultfd is the writer's alone from here on: see the module's doc.
        armed.map_err(failed("write-protect RAM"))
    }

    /// Starts the bulk copier. Call it when the guest runs again.
    ///
    /// # Errors
    /// [`CaptureError::Order`] unless it is the next thing to do. That the writer has died is for
    /// [`Self::poll`] to tell.
    pub fn go(&mut self) -> Result<(), CaptureError> {
        let (Stage::Armed, Some(commands)) = (&self.stage, &self.commands) else {
            return Err(self.order("go"));
        };
        match rustix::io::retry_on_intr(|| rustix::io::write(commands, b"g")) {
            // EPIPE: the writer has gone already.
            Ok(_) | Err(rustix::io::Errno::PIPE) => self.stage = Stage::Running,
            Err(errno) => return Err(failed("start the writer")(errno)),
        }
        Ok(())
    }

    /// Looks how far it is, without waiting. After [`Progress::Done`] or [`Progress::Failed`] has been
    /// told it is over, and further calls are [`CaptureError::Order`] failures.
    pub fn poll(&mut self) -> Progress {
        if matches!(self.stage, Stage::Ended) {
            return Progress::Failed(self.order("tell how far it is"));
        }
        match self.look() {
            Ok(None) => Progress::Running,
            Ok(Some(report)) => Progress::Done(report),
            Err(error) => Progress::Failed(error),
        }
    }

    fn look(&mut self) -> Result<Option<Report>, CaptureError> {
        // First whether it has ended: what it said before that is in the pipe by then.
        let status = self.writer.try_wait().map_err(failed("wait for the writer"))?;
        let said = self.listen();
        let Some(status) = status else {
            return said.map(|()| None);
        };
        self.stage = Stage::Ended;
        said?;
        let died = CaptureError::Died { pid: self.writer.pid(), status };
        let block = <&[u8; LEN]>::try_from(self.said.as_slice());
        match block.ok().and_then(|block| Outcome::decode(block).ok()) {
            Some(outcome) => outcome.into_result().map(Some),
            None if self.commands.is_none() => Err(CaptureError::Aborted),
            None => Err(died),
        }
    }

    /// Reads what there is of the report.
    fn listen(&mut self) -> Result<(), CaptureError> {
        let mut buffer = [0; LEN];
        while self.said.len() < LEN {
            let left = buffer.get_mut(..LEN - self.said.len()).unwrap_or(&mut []);
            match rustix::io::retry_on_intr(|| rustix::io::read(&self.report, &mut *left)) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
                Ok(got) => self.said.extend_from_slice(left.get(..got).unwrap_or(&[])),
                Err(errno) => return Err(failed("read the writer's report")(errno)),
            }
        }
        Ok(())
    }

    /// Waits until it is over, for callers that have no event loop and do not write RAM.
    ///
    /// # Errors
    /// Why there is no image.
    pub fn wait(&mut self) -> Result<Report, CaptureError> {
        loop {
            match self.poll() {
                Progress::Done(report) => return Ok(report),
                Progress::Failed(error) => return Err(error),
                Progress::Running => {
                    self.pidfd.wait(None).map_err(failed("wait for the writer"))?;
                }
            }
        }
    }

    /// Tells the writer to unregister RAM and end; poll tells when it has. The guest goes on, and
    /// there is no image, unless it was complete already. Does not wait.
    pub fn abort(&mut self) {
        self.commands = None;
    }

    /// Ends the writer by force: the kernel takes the protection away and wakes who waits. Does not
    /// wait; poll tells when it has ended.
    pub fn kill(&mut self) {
        // It fails for a writer that has ended. Before the abort, so that it is not under way then.
        let _ended = self.writer.send_signal(Signal::KILL);
        self.abort();
    }

    /// Readable when the writer has said something, or has ended.
    pub fn report_fd(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }

    /// Readable when the writer has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The writer's process id.
    pub fn writer_pid(&self) -> u32 {
        self.writer.pid()
    }

    /// The descriptors that it holds in the source, for a forked child to close.
    pub fn fds(&self) -> Vec<RawFd> {
        let mut fds = vec![self.report.as_raw_fd(), self.pidfd.as_fd().as_raw_fd()];
        fds.extend(self.commands.as_ref().map(AsRawFd::as_raw_fd));
        if let Stage::Prepared(uffd) = &self.stage {
            fds.push(uffd.as_fd().as_raw_fd());
        }
        fds
    }

    fn order(&self, action: &'static str) -> CaptureError {
        let is = match self.stage {
            Stage::Prepared(_) => "prepared",
            Stage::Armed => "armed",
            Stage::Running => "running",
            Stage::Ended => "over",
        };
        CaptureError::Order { action, is }
    }
}

impl Drop for LiveCapture {
    fn drop(&mut self) {
        if !matches!(self.stage, Stage::Ended) && self.owner == forkd_sys::fork::pid() {
            self.kill();
            // Reaped if it is gone already. To wait for it is what an event loop must not do; who
            // minds a zombie polls after `kill`, and drops then.
            let _reaped = self.writer.try_wait();
        }
    }
}

/// Has write-protect faults of RAM reported.
///
/// # Errors
/// [`CaptureError::Config`] for RAM that cannot be watched so, or is watched by another.
pub(super) fn register(uffd: &Userfaultfd, ram: std::ops::Range<u64>) -> Result<(), CaptureError> {
    uffd.register(ram, Mode::WRITE_PROTECT).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => {
            CaptureError::Config("RAM is not one mapping of a shared memfd".to_owned())
        }
        io::ErrorKind::ResourceBusy => {
            CaptureError::Config("another userfaultfd watches RAM".to_owned())
        }
        _ => failed("register RAM")(error),
    })
}

/// A writer that was forked, in the source.
struct Forked {
    writer: Reaped,
    pidfd: PidFd,
    report: OwnedFd,
    commands: OwnedFd,
}

impl Forked {
    /// Forks the writer, which gets a copy of the userfaultfd.
    ///
    /// # Safety
    /// As for [`LiveCapture::prepare`].
    unsafe fn new<S: PageSink>(
        config: &LiveConfig<'_>,
        uffd: Userfaultfd,
        sink: S,
        in_child: impl FnOnce(),
    ) -> Result<(Userfaultfd, Self), CaptureError> {
        let memfd = config.memfd.try_clone_to_owned().map_err(failed("copy RAM's memfd"))?;
        let (report, report_end) = pipe()?;
        let (commands_end, commands) = pipe()?;
        set_nonblocking(&report, true).map_err(failed("set up a pipe"))?;
        // SAFETY: the caller vouches for the other threads. The child goes to `write`, which never
        // returns.
        let writer = match unsafe { fork() }.map_err(failed("fork a writer"))? {
            Fork::Parent(writer) => writer,
            Fork::Child => {
                in_child();
                // The source has the other ends; the writer must not keep them open.
                drop((report, commands));
                let ram = SharedRam {
                    uffd,
                    memfd,
                    file_offset: config.file_offset,
                    address: config.address,
                    len: config.len,
                    page_size: config.page_size,
                };
                let (pool_bytes, max_stall) = (config.pool_bytes, config.max_stall);
                write(
                    Writer { ram, sink, commands: commands_end, pool_bytes, max_stall },
                    report_end,
                )
            }
        };
        drop(sink);
        let writer = Reaped(Some(writer));
        let pidfd = writer.pidfd().map_err(failed("watch the writer"))?;
        Ok((uffd, Self { writer, pidfd, report, commands }))
    }

    fn watched(self, stage: Stage, ram: std::ops::Range<u64>) -> Result<LiveCapture, CaptureError> {
        let Self { writer, pidfd, report, commands } = self;
        let writer = writer.keep().ok_or_else(|| CaptureError::Config("no writer".to_owned()))?;
        let (owner, said) = (forkd_sys::fork::pid(), Vec::with_capacity(LEN));
        let commands = Some(commands);
        Ok(LiveCapture { stage, ram, writer, owner, pidfd, report, commands, said })
    }
}

/// A child that is killed and reaped unless it is kept.
struct Reaped(Option<Child>);

impl Reaped {
    fn pidfd(&self) -> io::Result<PidFd> {
        self.0.as_ref().map_or_else(|| Err(io::ErrorKind::NotFound.into()), Child::pidfd)
    }

    fn keep(mut self) -> Option<Child> {
        self.0.take()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _killed = child.send_signal(Signal::KILL);
            let _reaped = child.wait();
        }
    }
}

pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd), CaptureError> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed("make a pipe"))
}

/// The writer process.
fn write<S: PageSink>(writer: Writer<S>, report: OwnedFd) -> ! {
    let mut keep = writer.sink.kept_fds();
    let own = [&writer.ram.uffd as &dyn AsFd, &writer.ram.memfd, &writer.commands, &report];
    keep.extend(own.map(|fd| fd.as_fd().as_raw_fd()));
    // What a panic says should be seen.
    keep.push(libc::STDERR_FILENO);
    // SAFETY: this process ends below without running the destructors of what it has inherited, and
    // uses only the descriptors that are kept.
    let outcome = match unsafe { close_range_except(&keep) } {
        Ok(()) => run(writer),
        Err(source) => Outcome::Failed { action: "close descriptors".to_owned(), source },
    };
    let block = outcome.encode();
    // A source that is gone does not listen. One block of less than PIPE_BUF is written whole.
    let told = rustix::io::retry_on_intr(|| rustix::io::write(&report, &block));
    exit_now(i32::from(told.is_err()))
}
