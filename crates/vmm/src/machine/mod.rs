//! A VM's machine: RAM, root image, buses, devices. Everything that fork(2) copies.
//!
//! A child keeps all of it as it is in memory. What binds it to a process is replaced: the waker
//! (an eventfd is shared over fork), the interrupt line (the child's [`Engine`] takes it
//! over), vsock's host side, and the log's file.

pub mod config;
pub mod engine;
mod hot;
mod parts;
pub mod past;
pub mod saved;
mod wiring;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_api::types::{DriveConfig, KernelMode, Metrics, PvmConfig, PvmMode, VmConfig};
use forkd_devices::bus::Bus;
use forkd_devices::i8042::I8042;
use forkd_devices::serial::{ConsoleLog, Serial};
use forkd_devices::virtio::block::{Block, BlockConfig};
use forkd_devices::virtio::mmio::MmioTransport;
use forkd_devices::virtio::pmem::{Pmem, PmemConfig};
use forkd_devices::virtio::rng::Rng;
use forkd_devices::virtio::vsock::{Vsock, VsockEndpoint};
use forkd_devices::vmgenid::VmGenId;
use forkd_memory::backend::Userfault;
use forkd_memory::{AnonOptions, GuestRam, LoadStatus};
use forkd_snapshot::{Digest, Parent};
use forkd_sys::reactor::{Interest, Reactor, Readiness, Token};
use forkd_sys::wake::Waker;
use forkd_vm::pvm::native::Choice;
use forkd_vm::{ExitBus, GuestMode, Host, HostError, HostOptions, MemSlot, layout};

pub use forkd_devices::virtio::vsock::Gate;

use crate::control::tokens;
use crate::fork::fds::{Disposition, Registry};
use crate::process::VmmError;
use crate::run_dir::RunDir;
use engine::Engine;
use hot::Hot;
use parts::{Root, Slots, Slotted, open_disk};
use past::{Forebear, Past};
use wiring::Wiring;

/// Bytes of serial console that a VM keeps on disk; older output makes room for newer.
const CONSOLE_LIMIT: u64 = 1 << 20;

/// Bytes of the root image that are mapped at once: half a millisecond of work.
const SHARED_AT_ONCE: usize = 8 << 20;

/// Lines of console that an error message quotes.
const TAIL_LINES: usize = 10;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM is not there, or not usable.
    #[error(transparent)]
    Host(#[from] forkd_vm::HostError),
    /// RAM can't be had.
    #[error(transparent)]
    Memory(#[from] forkd_memory::MemoryError),
    /// The KVM VM can't be made.
    #[error(transparent)]
    Vm(#[from] forkd_vm::VmError),
    /// A vCPU can't be made or restored.
    #[error(transparent)]
    Vcpu(#[from] forkd_vm::VcpuError),
    /// The kernel can't be loaded.
    #[error(transparent)]
    Boot(#[from] forkd_vm::boot::BootError),
    /// The kernel is not for this host.
    #[error(transparent)]
    Mode(#[from] forkd_vm::ModeError),
    /// A file can't be used.
    #[error("{what} {path}: {source}")]
    File {
        /// What it is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A disk can't be used.
    #[error("drive {index}: {source}")]
    Disk {
        /// Number of the drive.
        index: usize,
        /// Why.
        source: forkd_devices::virtio::block::DiskError,
    },
    /// The generation id can't be written.
    #[error(transparent)]
    VmGenId(#[from] forkd_devices::vmgenid::VmGenIdError),
    /// Two devices at one address: a mistake in the memory map.
    #[error(transparent)]
    Bus(#[from] forkd_devices::bus::BusError),
    /// Something else failed.
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
}

/// Buses as vCPU threads see them.
#[derive(Debug)]
pub struct Buses {
    pio: Bus,
    mmio: Bus,
}

impl ExitBus for Buses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(u64::from(port), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(u64::from(port), data);
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.mmio.read(addr, data);
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.mmio.write(addr, data);
    }
}

/// The machine.
pub struct Machine {
    host: Host,
    ram: GuestRam,
    root: Root,
    buses: Arc<Buses>,
    wiring: Wiring,
    console: ConsoleLog,
    serial: Arc<Mutex<Serial>>,
    i8042: Arc<Mutex<I8042>>,
    vmgenid: VmGenId,
    virtio: Vec<Slotted>,
    vsock: VsockEndpoint,
    /// Fds of the disks' base images.
    disks: Vec<RawFd>,
    /// The disks.
    blocks: Vec<Arc<MmioTransport<Block>>>,
    blueprint: Blueprint,
    past: Past,
    hot: Hot,
}

/// What a machine is built to, besides its RAM.
#[derive(Debug, Clone)]
pub struct Blueprint {
    /// The VM's id, which its disks tell the guest.
    pub id: String,
    /// File of the root image.
    pub root: PathBuf,
    /// Block devices.
    pub drives: Vec<DriveConfig>,
    /// Digest of the kernel that was booted.
    pub kernel: String,
    /// How it runs kernel mode.
    pub mode: GuestMode,
    /// The durable snapshot whose files RAM is mapped from, if it is: pages that were not written since are its own.
    pub base: Option<Parent>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("ram", &self.ram).field("root", &self.root).finish()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens KVM, with what the user wants of a host with PVM.
///
/// # Errors
/// It is not there, or not usable.
pub fn open_host(pvm: &PvmConfig) -> Result<Host, HostError> {
    let choice = match pvm.mode {
        PvmMode::Auto => Choice::Auto,
        PvmMode::Native => Choice::Native,
        PvmMode::Emulated => Choice::Emulated,
    };
    Host::open_with(HostOptions { pvm: choice, memo: pvm.memo.clone() })
}

impl Machine {
    /// Builds a machine that is to boot.
    ///
    /// # Errors
    /// The first part that could not be had.
    pub fn build(config: &VmConfig, dir: &RunDir) -> Result<Self, MachineError> {
        let host = open_host(&config.pvm)?;
        let mode = host.mode_for(&config.kernel)?;
        let ram = GuestRam::anonymous(config.mem_mib, AnonOptions { thp: true })?;
        let kernel = std::fs::read(&config.kernel).map_err(|source| MachineError::File {
            what: "kernel",
            path: config.kernel.clone(),
            source,
        })?;
        let blueprint = Blueprint {
            id: config.id.clone(),
            root: config.root.clone(),
            drives: config.drives.clone(),
            kernel: Digest::of(&kernel).to_string(),
            mode,
            base: None,
        };
        let machine = Self::assemble(host, ram, blueprint, dir)?;
        machine.listen_vsock(dir)?;
        Ok(machine)
    }

    /// Puts a machine together over some RAM. It does not listen for connections yet.
    ///
    /// # Errors
    /// The first part that could not be had.
    pub fn assemble(
        host: Host,
        ram: GuestRam,
        blueprint: Blueprint,
        dir: &RunDir,
    ) -> Result<Self, MachineError> {
        let wiring = Wiring::new().map_err(|e| MachineError::Io("cannot make an eventfd", e))?;
        let root = Root::map(&blueprint.root, &ram)?;
        let console_path = dir.file("console.log");
        let console = ConsoleLog::create(&console_path, CONSOLE_LIMIT)
            .map_err(|e| MachineError::Io("cannot make the console's log", e.into()))?;
        let serial = Serial::new(wiring.interrupt(layout::SERIAL_GSI), console.clone());
        let serial = Arc::new(Mutex::new(serial));
        let i8042 = I8042::new(wiring.interrupt(I8042_GSI), wiring.doorbell());
        let i8042 = Arc::new(Mutex::new(i8042));
        let mut buses = Buses { pio: Bus::new(), mmio: Bus::new() };
        buses.pio.insert(
            layout::SERIAL_PORT.into(),
            layout::SERIAL_PORTS.into(),
            serial.clone(),
        )?;
        buses.pio.insert(layout::I8042_PORT.into(), I8042_PORTS, i8042.clone())?;
        let genid_irq = wiring.interrupt(layout::GED_GSI);
        let vmgenid = VmGenId::new(ram.guest().clone(), layout::VMGENID_PAGE, genid_irq)?;
        let mut slots =
            Slots { ram: &ram, wiring: &wiring, mmio: &mut buses.mmio, taken: Vec::new() };
        slots.add("pmem0", Pmem::new(PmemConfig { start: root.gpa, size: root.len() }))?;
        slots.add("rng", Rng::new())?;
        let vsock = VsockEndpoint::new(slots.add("vsock", Vsock::new())?);
        let (mut disks, mut blocks) = (Vec::new(), Vec::new());
        for (index, drive) in blueprint.drives.iter().enumerate() {
            let (disk, fd) = open_disk(index, drive)?;
            disks.extend(fd);
            let id = format!("{}-{index}", blueprint.id);
            blocks
                .push(slots.add(&format!("drive{index}"), Block::new(disk, &BlockConfig { id }))?);
        }
        let virtio = slots.taken;
        let buses = Arc::new(buses);
        Ok(Self {
            host,
            ram,
            root,
            buses,
            wiring,
            console,
            serial,
            i8042,
            vmgenid,
            virtio,
            vsock,
            disks,
            blocks,
            blueprint,
            past: Past::default(),
            hot: Hot::default(),
        })
    }

    /// The host that it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What it was built to.
    pub fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// A durable snapshot of this machine has been written.
    pub fn set_latest(&mut self, snapshot: Parent) {
        self.past.add(Forebear::Snapshot(snapshot));
    }

    /// Its earlier states of which there are durable snapshots, or may be.
    pub fn past(&self) -> &Past {
        &self.past
    }

    /// The same, to add to it or to forget what is gone. What the machine was started from stays named.
    pub fn past_mut(&mut self) -> &mut Past {
        &mut self.past
    }

    /// What a diff can be over, the best first. No page that was written since one of them is one of the base's own.
    pub fn forebears(&self) -> Vec<Forebear> {
        let base = self.blueprint.base.clone().map(Forebear::Snapshot);
        self.past.iter().cloned().chain(base).collect()
    }

    /// Fds of the disks' base images.
    pub fn disk_fds(&self) -> &[RawFd] {
        &self.disks
    }

    /// Memory slots for KVM, RAM first.
    pub fn slots(&self) -> Vec<MemSlot> {
        let mut slots: Vec<MemSlot> = self
            .ram
            .regions()
            .map(|r| MemSlot {
                slot: r.slot,
                gpa: r.gpa,
                len: r.len,
                host_addr: r.host_addr,
                read_only: false,
            })
            .collect();
        let mut gpa = self.root.gpa;
        for mapping in [Some(&self.root.file), self.root.tail.as_ref()].into_iter().flatten() {
            let len = mapping.len() as u64;
            let slot = slots.len() as u32;
            let host_addr = mapping.address() as u64;
            slots.push(MemSlot { slot, gpa, len, host_addr, read_only: true });
            gpa += len;
        }
        slots
    }

    /// Works on virtqueues that the guest has notified.
    pub fn process_pending(&self, reactor: &Reactor) {
        for device in self.virtio.iter().filter(|d| d.transport.has_pending()) {
            device.transport.process_pending();
        }
        self.vsock.process(reactor);
    }

    /// Takes back the rings of the waker.
    ///
    /// # Errors
    /// The eventfd is broken.
    pub fn drain_wakes(&self) -> io::Result<()> {
        self.wiring.waker().drain().map(drop)
    }

    /// The waker of the event loop.
    pub fn waker(&self) -> &Waker {
        self.wiring.waker()
    }

    /// How its guest runs kernel mode.
    pub fn mode(&self) -> GuestMode {
        self.blueprint.mode
    }

    /// The same, in the words of the API.
    pub fn kernel_mode(&self) -> KernelMode {
        match self.mode() {
            GuestMode::Hardware => KernelMode::Hardware,
            GuestMode::PvmEmulated => KernelMode::PvmEmulated,
            GuestMode::PvmNative => KernelMode::PvmNative,
        }
    }

    /// How many children may wake up at once, if that is limited.
    pub fn waking_limit(&self) -> Option<usize> {
        self.mode().waking_limit()
    }

    /// True once the guest has asked for a reset through the keyboard controller.
    pub fn take_reset_request(&self) -> bool {
        lock(&self.i8042).take_reset_request()
    }

    /// Presses Ctrl+Alt+Del. False if the guest does not listen to its keyboard.
    pub fn press_ctrl_alt_del(&self) -> bool {
        lock(&self.i8042).press_ctrl_alt_del()
    }

    /// The console's last lines.
    pub fn console_tail(&self) -> String {
        self.console.last_lines(TAIL_LINES)
    }

    /// Registers what the event loop watches.
    ///
    /// # Errors
    /// The reactor fails.
    pub fn register(&self, reactor: &Reactor) -> Result<(), VmmError> {
        reactor
            .add(self.wiring.waker(), tokens::WAKER, Interest::READ)
            .map_err(VmmError::io("cannot watch the devices"))?;
        self.vsock.register(reactor, tokens::VSOCK);
        Ok(())
    }

    /// Counters of all devices, and of the remedies for PVM where there are any.
    pub fn metrics(&self, engine: Option<&Engine>) -> Metrics {
        let mut metrics = Metrics::new();
        for device in &self.virtio {
            let counters = device.transport.metrics();
            metrics.extend(counters.into_iter().map(|(k, v)| (format!("{}.{k}", device.name), v)));
        }
        let (reads, writes) = self.buses.mmio.unclaimed();
        metrics.insert("mmio.unclaimed_reads".into(), reads);
        metrics.insert("mmio.unclaimed_writes".into(), writes);
        let (printed, lost) = self.console.counters();
        metrics.insert("console.printed_bytes".into(), printed);
        metrics.insert("console.lost_bytes".into(), lost);
        if let Some(lazy) = self.ram.lazy() {
            metrics.insert("ram.faults".into(), lazy.faults());
            let missing = match lazy.status() {
                LoadStatus::Loading { remaining } => remaining,
                LoadStatus::Failed(_) | LoadStatus::Complete => 0,
            };
            metrics.insert("ram.missing_bytes".into(), missing);
        }
        metrics.extend(engine.map(Engine::metrics).unwrap_or_default());
        metrics
    }
}

/// What a forked child does with its machine.
impl Machine {
    /// Which fds the machine keeps in a child: what it shares, and what it replaces itself.
    pub fn register_fds(&self, registry: &mut Registry) {
        registry.register_raw(self.host.kvm().as_raw_fd(), Disposition::Inherit, "kvm");
        for disk in &self.disks {
            registry.register_raw(*disk, Disposition::Inherit, "disk");
        }
        if let Some(memfd) = self.ram.memfd_region() {
            registry.register(memfd, Disposition::Inherit, "ram");
        }
        for fd in self.ram.lazy().map(Userfault::descriptors).iter().flatten() {
            registry.register(fd, Disposition::Inherit, "userfault");
        }
        registry.register(self.wiring.waker(), Disposition::Reopen, "waker");
        if let Some(fd) = self.console.raw_fd() {
            registry.register_raw(fd, Disposition::Reopen, "console.log");
        }
    }

    /// Gives the devices a waker of this process. Before anything is swept.
    ///
    /// # Errors
    /// No eventfd to be had.
    pub fn rewire(&mut self) -> io::Result<()> {
        self.wiring.renew_waker()?;
        lock(&self.serial).rewire(self.wiring.interrupt(layout::SERIAL_GSI));
        lock(&self.i8042).rewire(self.wiring.interrupt(I8042_GSI), self.wiring.doorbell());
        for device in &self.virtio {
            let gsi = layout::virtio_mmio_gsi(device.slot).unwrap_or_default();
            device.transport.rewire(self.wiring.interrupt(gsi), self.wiring.doorbell());
        }
        Ok(())
    }

    /// Gives the guest a new generation id, and tells it. After interrupts work, before vCPUs run.
    ///
    /// # Errors
    /// No random bytes to be had.
    pub fn renew_generation(&self) -> Result<(), MachineError> {
        Ok(self.vmgenid.renew()?)
    }

    /// Lets the console go on in this VM's own log.
    ///
    /// # Errors
    /// The file can't be made.
    pub fn reopen_logs(&self, dir: &RunDir) -> Result<(), VmmError> {
        self.console
            .reopen(&dir.file("console.log"))
            .map_err(|e| VmmError::Setup("cannot make the console's log", e.into()))
    }

    /// Rings for work that was pending at the fork, and repeats interrupts that were not taken.
    pub fn resume_devices(&self) {
        for device in &self.virtio {
            device.transport.resume();
        }
    }
}

/// The socket device, which has a host side.
impl Machine {
    fn listen_vsock(&self, dir: &RunDir) -> Result<(), MachineError> {
        self.vsock
            .listen(&dir.file("vsock.sock"))
            .map_err(|e| MachineError::Io("cannot listen for vsock connections", e.into()))
    }

    /// Whether `token` belongs to a device.
    pub fn owns(&self, token: Token) -> bool {
        self.vsock.owns(token)
    }

    /// Handles an event on a device's token.
    pub fn handle(&self, reactor: &Reactor, readiness: &Readiness) {
        self.vsock.handle(reactor, readiness);
        self.copy_for_eval();
    }

    /// Accepts the guest's connections to `port` within this process.
    pub fn vsock_listen_internal(&self, port: u32) {
        self.vsock.listen_internal(port);
    }

    /// What has come of that.
    pub fn take_vsock_incoming(&self) -> Vec<(u32, UnixStream)> {
        self.vsock.take_internal_incoming()
    }

    /// Connects to a port of the guest, whatever the gate says.
    ///
    /// # Errors
    /// No fds.
    pub fn connect_internal(&self, port: u32) -> io::Result<UnixStream> {
        self.vsock.connect_internal(port)
    }

    /// Lets the host's connections in, holds or refuses them.
    pub fn set_gate(&self, gate: Gate) {
        self.vsock.set_gate(gate);
    }

    /// In a child: closes the source's connections, and has the guest told that they are gone.
    ///
    /// # Errors
    /// None in practice: there is no socket to be bound.
    pub fn drop_host_side(&self) -> Result<(), VmmError> {
        self.vsock
            .begin_child(None)
            .map_err(|e| VmmError::Setup("cannot drop the source's connections", e.into()))
    }

    /// In a zygote: maps what the page cache holds of a part of the root image, from byte `offset`; gives where the next
    /// part begins, or none at the end. Its children's pages of it are then shared with the zygote as well, and nothing
    /// that one child maps counts as its alone. If the kernel refuses, the log says so: nothing depends on it but the
    /// accounting.
    pub fn share_root(&self, offset: usize) -> Option<usize> {
        let file = &self.root.file;
        let len = SHARED_AT_ONCE.min(file.len().checked_sub(offset)?);
        if let Err(error) = file.populate_resident(offset, len) {
            crate::log::line(&format!("children map the root image on their own: {error}"));
            return None;
        }
        Some(offset + len).filter(|next| *next < file.len())
    }

    /// In a child: listens at its own socket.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn listen(&self, dir: &RunDir) -> Result<(), VmmError> {
        Ok(self.listen_vsock(dir)?)
    }
}

/// The keyboard's interrupt (ISA IRQ 1) and ports 0x60 to 0x64.
const I8042_GSI: u32 = 1;
const I8042_PORTS: u64 = 5;
