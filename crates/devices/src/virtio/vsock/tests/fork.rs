//! What a child of a fork, and a restored device, do with connections that are not theirs.

use super::*;
use crate::virtio::vsock::{ResetPhase, VsockState};
use crate::virtio::{DeviceState, RestoreError, VirtioDevice};

impl Rig {
    /// What the child of a fork does: own socket, own reactor.
    fn begin_child(&mut self) {
        let path = self.dir.path().join("child.sock");
        self.endpoint.begin_child(Some(&path)).unwrap();
        self.reactor = Reactor::new().unwrap();
        self.endpoint.register(&self.reactor, BASE);
        self.transport.resume();
    }
}

#[test]
fn child_tells_the_guest_before_it_sends_anything() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::with(features, 8);
        let (_client, old) = rig.connect(1);
        // The guest does not handle events for a while.
        rig.event_buffers = 0;
        rig.begin_child();
        rig.event_buffers = 7;
        let mut agent = rig.endpoint.connect_internal(49_983).unwrap();
        agent.write_all(b"notice").unwrap();
        rig.assert_silent();
        assert_eq!(rig.events, 1, "{features:#x}");
        // It handles the event, and gives the buffer back.
        rig.event_buffers = 8;
        rig.post_buffers();
        let request = rig.recv_op(op::REQUEST);
        assert_ne!(
            request.header.src_port, old.host_port,
            "the old connection's port is not reused"
        );
        rig.send(Conn::new(&request.header).header(op::RESPONSE), &[]);
        assert_eq!(rig.recv_op(op::RW).payload, b"notice");
        // A process of the guest that has not noticed yet.
        rig.send(old.header(op::RW), b"from the past");
        rig.recv_op(op::RST);
        assert_eq!(rig.events, 1);
    }
}

#[test]
fn event_waits_for_a_buffer() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::with(features, 8);
        let _old = rig.connect(1);
        rig.event_buffers = 0;
        // Use up all event buffers.
        for _ in 0..8 {
            rig.transport.with_io(EVENT, |_, io| {
                let io = io.unwrap();
                let mut chain = io.queues[EVENT].pop(io.mem).unwrap().unwrap();
                chain.writable.write(io.mem, &[0; 4]).unwrap();
                io.queues[EVENT].push_used(io.mem, chain.head, 4).unwrap();
                ((), Ok(crate::virtio::Progress::Done))
            });
        }
        rig.pump();
        rig.events = 0;
        rig.begin_child();
        let _agent = rig.endpoint.connect_internal(1).unwrap();
        rig.assert_silent();
        assert_eq!(rig.events, 0);
        rig.event_buffers = 1;
        rig.post_buffers();
        rig.pump();
        assert_eq!(rig.events, 1);
        rig.pump();
        rig.recv_op(op::REQUEST);
    }
}

#[test]
fn child_closes_what_it_inherited_and_says_nothing_on_it() {
    let mut rig = Rig::new();
    let (mut client, _) = rig.connect(1);
    let mut waiting = UnixStream::connect(rig.path()).unwrap();
    waiting.set_nonblocking(true).unwrap();
    rig.pump();
    // The source's descriptors: they stay open when the child closes its own.
    let source: Vec<UnixStream> = rig
        .transport
        .with_device(|vsock| vsock.muxer.streams().map(|s| s.try_clone().unwrap()).collect());
    assert_eq!(source.len(), 2);
    rig.begin_child();
    rig.pump();
    for stream in [&mut client, &mut waiting] {
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "neither data nor end of file");
    }
    drop(source);
    assert!(at_eof(&mut client) && at_eof(&mut waiting));
}

#[test]
fn child_holds_its_own_clients_until_it_has_its_identity() {
    let mut rig = Rig::new();
    rig.begin_child();
    rig.pump();
    let path = rig.dir.path().join("child.sock");
    let mut client = UnixStream::connect(path).unwrap();
    client.write_all(b"CONNECT 3\n").unwrap();
    rig.assert_silent();
    rig.endpoint.set_gate(Gate::Open);
    assert_eq!(rig.recv_op(op::REQUEST).header.dst_port, 3);
}

#[test]
fn zygote_listens_nowhere_and_its_children_tell_once() {
    let mut rig = Rig::new();
    let (_client, _) = rig.connect(1);
    rig.endpoint.begin_child(None).unwrap();
    rig.begin_child();
    rig.pump();
    assert_eq!(rig.events, 1);
    let _agent = rig.endpoint.connect_internal(1).unwrap();
    rig.recv_op(op::REQUEST);
}

#[test]
fn source_goes_on_as_if_nothing_had_happened() {
    // What a fork does to a source: nothing but a look at its state.
    let mut rig = Rig::new();
    let (mut client, conn) = rig.connect(1);
    client.write_all(b"in flight").unwrap();
    let _state = rig.transport.save();
    assert_eq!(rig.recv_op(op::RW).payload, b"in flight");
    rig.send(conn.header(op::RW), b"answer");
    rig.pump();
    assert_eq!(read_some(&mut client), b"answer");
    assert_eq!(rig.events, 0);
}

#[test]
fn without_established_connections_there_is_nothing_to_wait_for() {
    let mut rig = Rig::new();
    // One was asked for, and one was closed by the host.
    let (closed, _) = rig.connect(1);
    drop(closed);
    let _asked = rig.client(2);
    rig.pump();
    let asked = rig.inbox.drain(..).find(|p| p.header.op == op::REQUEST).unwrap();
    rig.begin_child();
    let _agent = rig.endpoint.connect_internal(3).unwrap();
    rig.pump();
    let mut packets: Vec<_> =
        rig.inbox.drain(..).map(|p| (p.header.op, p.header.dst_port)).collect();
    packets[..2].sort_unstable();
    assert_eq!(packets, [(op::RST, 1), (op::RST, 2), (op::REQUEST, 3)]);
    assert_eq!(rig.events, 0);
    // The guest accepts what the source asked for.
    rig.send(Conn::new(&asked.header).header(op::RESPONSE), &[]);
    rig.recv_op(op::RST);
}

#[test]
fn driver_that_starts_over_loses_its_connections() {
    let mut rig = Rig::new();
    let (mut client, _) = rig.connect(1);
    rig.guest.start(0);
    rig.post_buffers();
    rig.pump();
    assert!(at_eof(&mut client));
    let _again = rig.connect(2);
    assert_eq!(rig.events, 0);
}

#[test]
fn restored_device_tells_the_guest_and_serves_it() {
    let mut rig = Rig::new();
    let (_client, old) = rig.connect(1);
    let state = rig.transport.save();
    let DeviceState::Vsock(saved) = state.device else { panic!("{state:?}") };
    assert_eq!(saved.reset, ResetPhase::Pending);

    let mut restored = Rig::with(0, 0);
    restored.guest.mem = rig.guest.mem.clone();
    restored.transport = Arc::new(MmioTransport::new(
        Vsock::new(),
        rig.guest.mem.clone(),
        restored.interrupt.clone(),
        Arc::new(Counter::default()),
    ));
    restored.transport.restore(&state).unwrap();
    assert_eq!(restored.transport.save().queues, state.queues);
    restored.endpoint = VsockEndpoint::new(Arc::clone(&restored.transport));
    restored.endpoint.register(&restored.reactor, BASE);
    // The same driver goes on.
    restored.guest.adopt(&mut rig.guest, restored.transport.front());
    restored.rx_buffers = 64;
    restored.transport.resume();
    restored.pump();
    assert_eq!(restored.events, 1);
    let _agent = restored.endpoint.connect_internal(5).unwrap();
    let request = restored.recv_op(op::REQUEST);
    assert!(request.header.src_port > old.host_port);
}

#[test]
fn state_of_another_guest_is_refused() {
    let mut vsock = Vsock::new();
    let state = VsockState { guest_cid: 4, next_host_port: 1, reset: ResetPhase::None };
    let error = vsock.restore(&DeviceState::Vsock(state)).unwrap_err();
    assert!(matches!(error, RestoreError::Invalid(_)));
}
