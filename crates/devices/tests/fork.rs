//! Devices over a real fork(2): both processes go on with what they had, and neither feels the other.
//!
//! Without libtest: its threads and fork(2) do not go together. A child runs to its end in one function and
//! reports by its exit status.

#![allow(unsafe_code, missing_docs, clippy::expect_used, clippy::print_stdout)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forkd_devices::NoInterrupt;
use forkd_devices::serial::{ConsoleLog, Serial};
use forkd_devices::virtio::block::{Block, BlockConfig, Disk, DiskConfig};
use forkd_devices::virtio::mmio::{MmioTransport, Transport};
use forkd_devices::virtio::testing::{Counter, Guest, memory};
use forkd_devices::virtio::vsock::{Gate, Vsock, VsockEndpoint};
use forkd_sys::fork::{Child, Fork, exit_now, fork};
use forkd_sys::reactor::{Reactor, Token};

fn main() {
    type Test = fn(&Path);
    let tests: [(&str, Test); 3] = [
        ("a disk's layer is captured by fork and then private", disk_layer),
        ("vsock connections stay with the source", vsock_connections),
        ("each process has a console log of its own", console_logs),
    ];
    for (name, test) in tests {
        let dir = tempfile::tempdir().expect("a temporary directory");
        test(dir.path());
        println!("{name} ... ok");
    }
}

fn forked(body: impl FnOnce()) -> Child {
    // SAFETY: this process has one thread, so no lock is held by another.
    match unsafe { fork() }.expect("fork") {
        Fork::Parent(child) => child,
        Fork::Child => exit_now(i32::from(catch_unwind(AssertUnwindSafe(body)).is_err())),
    }
}

fn assert_good_end(mut child: Child) {
    assert_eq!(child.wait().expect("wait").code(), Some(0), "the child failed: see above");
}

fn start<D: forkd_devices::virtio::VirtioDevice + 'static>(
    device: D,
) -> (Arc<MmioTransport<D>>, Guest) {
    let mem = memory();
    let counter = Arc::new(Counter::default());
    let transport = Arc::new(MmioTransport::new(device, mem.clone(), counter.clone(), counter));
    let mut guest = Guest::new(mem, transport.front());
    guest.start(0);
    transport.process_pending();
    (transport, guest)
}

fn disk_layer(_: &Path) {
    let mut base = tempfile::tempfile().expect("a base image");
    base.write_all(&[1; 3 * 4096]).expect("write");
    let config =
        DiskConfig { base: Some(base), size: None, read_only: false, layer_quota: u64::MAX };
    let disk = Disk::new(config).expect("a disk");
    let (transport, mut guest) = start(Block::new(disk, &BlockConfig::default()));
    let mut request = |kind: u8, sector: u8, data: &[u8], room: usize| -> Vec<u8> {
        let mut header = [0; 16];
        (header[0], header[8]) = (kind, sector);
        let readable: &[&[u8]] = if data.is_empty() { &[&header] } else { &[&header, data] };
        guest.submit(0, readable, &[room + 1]).expect("room in the queue");
        guest.notify(0);
        transport.process_pending();
        let mut written = guest.take_used(0).expect("an answer").written;
        assert_eq!(written.pop(), Some(0), "status of request {kind} at {sector}");
        written
    };
    request(1, 0, &[2; 512], 0);
    let child = forked(|| {
        assert_eq!(request(0, 0, &[], 512), [2; 512], "written before the fork");
        request(1, 1, &[3; 512], 0);
        request(1, 8, &[3; 4096], 0);
        // Sector 2 is of the base still.
        assert_eq!(request(0, 1, &[], 1024), [[3; 512], [1; 512]].concat());
        // Discard of the second block, with a segment of 8 sectors at 8.
        let mut segment = [0; 16];
        (segment[0], segment[8]) = (8, 8);
        request(11, 0, &segment, 0);
        assert_eq!(request(0, 8, &[], 4096), [0; 4096]);
    });
    assert_good_end(child);
    assert_eq!(request(0, 0, &[], 1024), [[2; 512], [1; 512]].concat(), "the child's is not seen");
    assert_eq!(request(0, 8, &[], 4096), [1; 4096]);
    assert_eq!(transport.with_device(|d| d.dirty_bytes()), 4096);
}

const BASE: Token = Token(7);
const HEADER: usize = 44;

/// A guest with one connection: enough of a driver to see packets and answer.
struct Vm {
    endpoint: VsockEndpoint,
    reactor: Reactor,
    guest: Guest,
    events: usize,
    packets: Vec<Vec<u8>>,
}

impl Vm {
    fn post(&mut self) {
        for (queue, count, size) in [(0, 32, 4096), (2, 8, 4)] {
            let capacity = if queue == 2 { 16 } else { 128 };
            while capacity - self.guest.free(queue) < count {
                self.guest.submit(queue, &[], &[size]).expect("room in the queue");
            }
            self.guest.notify(queue);
        }
    }

    fn pump(&mut self) {
        let mut ready = Vec::new();
        for _ in 0..20 {
            self.endpoint.process(&self.reactor);
            self.reactor.wait(&mut ready, Some(Duration::ZERO)).expect("wait");
            ready.iter().for_each(|r| self.endpoint.handle(&self.reactor, r));
            while let Some(used) = self.guest.take_used(0) {
                self.packets.push(used.written[..used.len as usize].to_vec());
            }
            while self.guest.take_used(1).is_some() {}
            self.events += std::iter::from_fn(|| self.guest.take_used(2)).count();
            self.post();
        }
    }

    /// Answers `packet` with operation `op` and `payload`.
    fn answer(&mut self, packet: &[u8], op: u8, payload: &[u8]) {
        let mut header = [0; HEADER];
        header[0] = 3;
        header[8] = 2;
        header[16..20].copy_from_slice(&packet[20..24]);
        header[20..24].copy_from_slice(&packet[16..20]);
        header[24] = payload.len() as u8;
        (header[28], header[30], header[38]) = (1, op, 1);
        let readable: &[&[u8]] = if payload.is_empty() { &[&header] } else { &[&header, payload] };
        self.guest.submit(1, readable, &[]).expect("room in the queue");
        self.guest.notify(1);
        self.pump();
    }

    fn connect(&mut self, path: &Path) -> (UnixStream, Vec<u8>) {
        let mut client = UnixStream::connect(path).expect("connect");
        client.write_all(b"CONNECT 52\n").expect("greet");
        self.pump();
        let request = self.packets.pop().expect("a request");
        assert_eq!(request[30], 1);
        self.answer(&request, 2, b"");
        let mut line = [0; 64];
        let n = client.read(&mut line).expect("an answer");
        assert!(line[..n].starts_with(b"OK "));
        (client, request)
    }
}

fn vsock_connections(dir: &Path) {
    let (transport, guest) = start(Vsock::new());
    let endpoint = VsockEndpoint::new(transport);
    let reactor = Reactor::new().expect("a reactor");
    let path = dir.join("source.sock");
    endpoint.listen(&path).expect("listen");
    endpoint.set_gate(Gate::Open);
    endpoint.register(&reactor, BASE);
    let mut vm = Vm { endpoint, reactor, guest, events: 0, packets: Vec::new() };
    vm.pump();
    let (mut client, request) = vm.connect(&path);

    let child = forked(|| {
        let path = dir.join("child.sock");
        vm.endpoint.begin_child(Some(&path)).expect("a child's socket");
        vm.reactor = Reactor::new().expect("a reactor");
        vm.endpoint.register(&vm.reactor, BASE);
        vm.endpoint.transport().resume();
        vm.pump();
        assert_eq!(vm.events, 1, "the guest is told");
        vm.answer(&request, 5, b"from the child's guest");
        let rst = vm.packets.pop().expect("an answer");
        assert_eq!(rst[30], 3, "its connection is gone");
        vm.endpoint.set_gate(Gate::Open);
        vm.connect(&path);
    });
    assert_good_end(child);

    // The source notices nothing, neither while the child lives nor after.
    vm.answer(&request, 5, b"still here");
    let mut data = [0; 64];
    let n = client.read(&mut data).expect("data");
    assert_eq!(&data[..n], b"still here");
    client.write_all(b"me too").expect("write");
    vm.pump();
    assert_eq!(&vm.packets.pop().expect("a packet")[HEADER..], b"me too");
    assert_eq!(vm.events, 0);
    vm.connect(&path);
}

fn console_logs(dir: &Path) {
    use forkd_devices::bus::BusDevice;
    let log = ConsoleLog::create(&dir.join("source.log"), 1 << 20).expect("a log");
    let mut serial = Serial::new(Arc::new(NoInterrupt), log.clone());
    let mut print = |text: &str| text.bytes().for_each(|b| serial.write(0, &[b]));
    print("before\nbegun ");
    let child = forked(|| {
        print("in the child, early\n");
        log.reopen(&dir.join("child.log")).expect("a log");
        print("in the child, late\n");
    });
    assert_good_end(child);
    print("in the source\n");
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).expect("a log");
    assert_eq!(read("source.log"), "before\nbegun in the source\n");
    assert_eq!(read("child.log"), "in the child, early\nin the child, late\n");
}
