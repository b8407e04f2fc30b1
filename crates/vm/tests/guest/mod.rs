//! A machine just large enough to boot the guest kernel: RAM, vCPU threads, a serial port by which the guest's init
//! talks to the host, and a reset port.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkd_vm::boot::{self, ElfEntry, LoadArgs};
use forkd_vm::{
    Exit, ExitBus, GuestMode, Host, IrqLine, KickHandle, MemSlot, Vcpu, VcpuState, Vm, VmState,
};
use forkd_vm::{cmdline, layout};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};
use vm_superio::{Serial, Trigger};

/// The kernel that `guest/kernel/build.sh` built.
pub fn kernel() -> PathBuf {
    if let Some(path) = std::env::var_os("FORKD_TEST_KERNEL") {
        return path.into();
    }
    let cache = std::env::var_os("FORKD_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|d| PathBuf::from(d).join("forkd")))
        .or_else(|| std::env::var_os("HOME").map(|d| PathBuf::from(d).join(".cache/forkd")))
        .expect("HOME is set");
    // The flavour that this host runs quicker, as forkd takes it.
    let native = cache.join("kernels/current-pvm/vmlinux");
    let runs = Host::open().is_ok_and(|host| host.native_pvm().is_ok());
    if native.exists() && runs { native } else { cache.join("kernels/current/vmlinux") }
}

/// Compiles init.c and packs it into an initramfs in `dir`.
pub fn initramfs(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init.c");
    let init = dir.join("init");
    let status = std::process::Command::new("cc")
        .args(["-static", "-O2", "-o"])
        .args([&init, &source])
        .status()
        .expect("a C compiler (cc) is installed");
    assert!(status.success(), "cc {}", source.display());
    let path = dir.join("initramfs.cpio");
    let mut cpio = Vec::new();
    entry(&mut cpio, "init", 0o100_755, &std::fs::read(&init).expect("init was built"));
    entry(&mut cpio, "TRAILER!!!", 0, &[]);
    std::fs::write(&path, cpio).expect("initramfs can be written");
    path
}

/// One entry of a newc cpio archive.
fn entry(out: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let ino = out.len() as u32 + 1;
    out.extend(b"070701");
    let namesize = name.len() as u32 + 1;
    for field in [ino, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, namesize, 0] {
        out.extend(format!("{field:08x}").bytes());
    }
    out.extend(name.bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// What the guest, or a vCPU, has to say.
#[derive(Debug)]
pub enum Event {
    /// A line `@MARK x` on the console.
    Mark(u8),
    /// Reset by the i8042.
    Reset,
    /// A vCPU cannot go on.
    Stopped(String),
}

/// Where the guest's console goes: kept, and copied to standard error if asked for.
#[derive(Clone, Default)]
pub struct Console {
    text: Arc<Mutex<String>>,
    echo: Arc<Mutex<Option<String>>>,
}

impl Console {
    /// Everything so far.
    pub fn text(&self) -> String {
        self.text.lock().expect("console").clone()
    }

    /// Copies to standard error from now on, each line after `tag`.
    pub fn echo(&self, tag: &str) {
        *self.echo.lock().expect("console") = Some(tag.to_owned());
    }

    /// The mark in the last line, if that is one.
    fn last_mark(&self) -> Option<u8> {
        let text = self.text.lock().expect("console");
        let line = text.trim_end().lines().next_back()?;
        line.trim().strip_prefix("@MARK ")?.bytes().next()
    }

    /// The last line that starts with `@when `, as words.
    pub fn report(&self, when: &str) -> Option<Report> {
        let text = self.text();
        let start = format!("@{when} ");
        let line =
            text.lines().rev().find_map(|l| l.trim().strip_prefix(&start).map(str::to_owned));
        line.map(Report)
    }
}

/// A line of `key=value` words.
#[derive(Debug)]
pub struct Report(String);

impl Report {
    pub fn get(&self, key: &str) -> &str {
        let words = self.0.split_whitespace();
        words.filter_map(|w| w.split_once('=')).find(|(k, _)| *k == key).map_or("", |(_, v)| v)
    }

    pub fn number(&self, key: &str) -> i64 {
        self.get(key).parse().unwrap_or_else(|_| panic!("no number {key} in: {}", self.0))
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = self.text.lock().expect("console");
        for byte in bytes {
            text.push(char::from(*byte));
            if *byte == b'\n'
                && let Some(tag) = &*self.echo.lock().expect("console")
            {
                eprintln!("{tag}{}", text.trim_end().lines().next_back().unwrap_or(""));
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct SerialIrq(IrqLine);

impl Trigger for SerialIrq {
    type E = forkd_vm::VmError;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse(layout::SERIAL_GSI)
    }
}

/// The guest's ports.
struct Bus {
    serial: Mutex<Serial<SerialIrq, vm_superio::serial::NoEvents, Console>>,
    events: Mutex<Sender<Event>>,
    reset: AtomicBool,
}

impl Bus {
    fn tell(&self, event: Event) {
        let _ = self.events.lock().expect("events").send(event);
    }
}

impl ExitBus for Bus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port.checked_sub(layout::SERIAL_PORT) {
            Some(offset) if offset < layout::SERIAL_PORTS && data.len() == 1 => {
                data[0] = self.serial.lock().expect("serial").read(offset as u8);
            }
            // An i8042 with empty buffers.
            _ if port == 0x64 => data.fill(0),
            _ => {}
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (0x64, [0xfe]) if !self.reset.swap(true, Ordering::SeqCst) => self.tell(Event::Reset),
            (_, [byte]) => {
                if let Some(offset) = port.checked_sub(layout::SERIAL_PORT)
                    && offset < layout::SERIAL_PORTS
                {
                    let mut serial = self.serial.lock().expect("serial");
                    let _ = serial.write(offset as u8, *byte);
                    if offset == 0
                        && *byte == b'\n'
                        && let Some(mark) = serial.writer().last_mark()
                    {
                        self.tell(Event::Mark(mark));
                    }
                }
            }
            _ => {}
        }
    }

    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

/// How to boot.
#[derive(Debug, Clone)]
pub struct Config {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub vcpus: u8,
    pub mem: u64,
    pub entry: ElfEntry,
    /// More words for the command line, such as `acpi=off`.
    pub extra: String,
}

/// A VM with its vCPU threads.
pub struct Machine {
    pub host: Host,
    pub ram: GuestMemoryMmap,
    pub vm: Vm,
    pub console: Console,
    bus: Arc<Bus>,
    events: Receiver<Event>,
    threads: Vec<VcpuThread>,
    parked: Receiver<Vcpu>,
    park: Sender<Vcpu>,
    vcpus: u8,
}

struct VcpuThread {
    kick: KickHandle,
    resume: Sender<Vcpu>,
}

/// All that is saved.
pub struct Saved {
    pub mode: GuestMode,
    pub vm: VmState,
    pub vcpus: Vec<VcpuState>,
}

pub fn slots(ram: &GuestMemoryMmap) -> Vec<MemSlot> {
    ram.iter()
        .enumerate()
        .map(|(slot, r)| MemSlot {
            slot: slot as u32,
            gpa: r.start_addr().0,
            len: r.len(),
            host_addr: r.get_host_address(MemoryRegionAddress(0)).expect("mapped") as u64,
            read_only: false,
        })
        .collect()
}

impl Machine {
    pub fn boot(host: &Host, config: &Config) -> Self {
        let ranges: Vec<_> = layout::ram_ranges(config.mem)
            .into_iter()
            .map(|(start, len)| (GuestAddress(start), len as usize))
            .collect();
        let ram = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
        let mode = host.mode_for(&config.kernel).unwrap_or_else(|e| panic!("{e}"));
        let vm = Vm::new(host, mode, &slots(&ram), config.vcpus).expect("VM");
        let line = cmdline::build(mode, &config.extra);
        let args = LoadArgs {
            kernel: &config.kernel,
            initrd: Some(&config.initrd),
            cmdline: &line,
            vcpus: config.vcpus,
            virtio_slots: &[],
            vmgenid: true,
            entry: config.entry,
            mode,
        };
        let entry = boot::load(&ram, &args).expect("load");
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let mut vcpu = vm.create_vcpu(index, &ram).expect("vCPU");
            vcpu.configure_boot(&entry).expect("configure");
            vcpus.push(vcpu);
        }
        let console = Console::default();
        let mut machine = Self::assemble(host.clone(), ram, vm, console);
        machine.start(vcpus);
        machine
    }

    fn assemble(host: Host, ram: GuestMemoryMmap, vm: Vm, console: Console) -> Self {
        let (send_event, events) = channel();
        let (park, parked) = channel();
        let serial = Serial::new(SerialIrq(vm.irq_line()), console.clone());
        let bus = Arc::new(Bus {
            serial: Mutex::new(serial),
            events: Mutex::new(send_event),
            reset: AtomicBool::new(false),
        });
        let vcpus = vm.vcpus();
        Self { host, ram, vm, console, bus, events, threads: Vec::new(), parked, park, vcpus }
    }

    fn start(&mut self, vcpus: Vec<Vcpu>) {
        for vcpu in vcpus {
            let (resume, resumed) = channel::<Vcpu>();
            let kick = vcpu.kick_handle();
            let (bus, park) = (self.bus.clone(), self.park.clone());
            thread::spawn(move || {
                while let Ok(mut vcpu) = resumed.recv() {
                    match vcpu.run(&*bus) {
                        Ok(Exit::Kicked) => {}
                        Ok(exit) => bus.tell(Event::Stopped(format!("{exit:?}"))),
                        Err(e) => bus.tell(Event::Stopped(e.to_string())),
                    }
                    if park.send(vcpu).is_err() {
                        return;
                    }
                }
            });
            resume.send(vcpu).expect("thread lives");
            self.threads.push(VcpuThread { kick, resume });
        }
    }

    /// Waits for what the guest says.
    pub fn wait(&self, limit: Duration) -> Result<Event, RecvTimeoutError> {
        self.events.recv_timeout(limit)
    }

    /// Waits for `mark`, or fails with the console's end.
    pub fn expect_mark(&self, mark: u8, limit: Duration) {
        let end = Instant::now() + limit;
        let event = self.wait(end.saturating_duration_since(Instant::now()));
        match event {
            Ok(Event::Mark(m)) if m == mark => {}
            other => {
                let text = self.console.text();
                let tail: Vec<_> = text.lines().rev().take(25).collect();
                let tail: Vec<_> = tail.into_iter().rev().collect();
                panic!(
                    "waited for mark {:?}, got {other:?}; console ends:\n{}",
                    char::from(mark),
                    tail.join("\n")
                );
            }
        }
    }

    /// Kicks all vCPUs and takes them from their threads.
    pub fn park(&mut self) -> Vec<Vcpu> {
        for thread in &self.threads {
            thread.kick.kick();
        }
        let mut vcpus: Vec<_> =
            self.threads.iter().map(|_| self.parked.recv().expect("vCPU")).collect();
        vcpus.sort_by_key(Vcpu::index);
        vcpus
    }

    /// Ends all vCPUs and their threads.
    pub fn stop(&mut self) {
        drop(self.park());
        self.threads.clear();
    }

    pub fn resume(&self, vcpus: Vec<Vcpu>) {
        for vcpu in vcpus {
            self.threads[usize::from(vcpu.index())].resume.send(vcpu).expect("thread lives");
        }
    }

    pub fn save(&self, vcpus: &mut [Vcpu]) -> Saved {
        let vcpus = vcpus.iter_mut().map(|v| v.save().expect("save vCPU")).collect();
        Saved { mode: self.vm.mode(), vcpus, vm: self.vm.save().expect("save VM") }
    }

    /// In a child of fork(2): a new VM over the inherited RAM. The vCPUs are ready but do not run yet.
    pub fn rebuild(self, saved: &Saved) -> (Self, Vec<Vcpu>) {
        let Self { host, ram, vm, console, bus, .. } = self;
        let line = vm.irq_line();
        vm.abandon();
        let (mut vm, vcpus) = restore(&host, &ram, saved);
        vm.adopt(&line);
        let (send_event, events) = channel();
        *bus.events.lock().expect("events") = send_event;
        bus.reset.store(false, Ordering::SeqCst);
        let (park, parked) = channel();
        let count = vm.vcpus();
        let machine = Self {
            host,
            ram,
            vm,
            console,
            bus,
            events,
            threads: Vec::new(),
            parked,
            park,
            vcpus: count,
        };
        (machine, vcpus)
    }

    /// Starts what [`Machine::rebuild`] made.
    pub fn go(&mut self, vcpus: Vec<Vcpu>) {
        assert_eq!(vcpus.len(), usize::from(self.vcpus));
        self.start(vcpus);
    }
}

/// A new VM over `ram` that goes on from `saved`.
pub fn restore(host: &Host, ram: &GuestMemoryMmap, saved: &Saved) -> (Vm, Vec<Vcpu>) {
    let count = u8::try_from(saved.vcpus.len()).expect("few vCPUs");
    let vm = Vm::new(host, saved.mode, &slots(ram), count).expect("VM");
    let shift = saved.vm.clock_shift();
    let mut vcpus = Vec::new();
    for state in &saved.vcpus {
        let mut vcpu = vm.create_vcpu(state.index, ram).expect("vCPU");
        vcpu.restore(state, shift).expect("restore vCPU");
        vcpus.push(vcpu);
    }
    vm.restore(&saved.vm).expect("restore VM");
    (vm, vcpus)
}
