//! Who may connect, and what they are told.

use std::net::Shutdown;
use std::os::unix::net::UnixListener;

use super::*;
use crate::virtio::vsock::packet::shut;
use crate::virtio::vsock::{BUFFER, MAX_CONNECTIONS};

#[test]
fn host_client_talks_to_the_guest_and_back() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::with(features, 8);
        let (mut client, conn) = rig.connect(52);
        client.write_all(b"ping").unwrap();
        let data = rig.recv_op(op::RW);
        assert_eq!(data.payload, b"ping");
        assert_eq!(data.header.buf_alloc, BUFFER);
        assert_eq!((data.header.src_cid, data.header.dst_cid), (HOST_CID, GUEST_CID));
        rig.send(conn.header(op::RW), b"pong");
        rig.pump();
        assert_eq!(read_some(&mut client), b"pong");
        assert!(rig.interrupt.take() > 0);
    }
}

#[test]
fn data_sent_along_with_the_greeting_reaches_the_guest() {
    let mut rig = Rig::new();
    let mut client = UnixStream::connect(rig.path()).unwrap();
    client.write_all(b"CONNECT 7\nearly").unwrap();
    let request = rig.recv_op(op::REQUEST);
    rig.send(Conn::new(&request.header).header(op::RESPONSE), &[]);
    assert_eq!(rig.recv_op(op::RW).payload, b"early");
}

#[test]
fn greeting_may_come_in_pieces_and_nonsense_is_refused() {
    let mut rig = Rig::new();
    let mut slow = UnixStream::connect(rig.path()).unwrap();
    for byte in b"CONNECT 9\n" {
        slow.write_all(&[*byte]).unwrap();
        rig.pump();
    }
    assert_eq!(rig.recv_op(op::REQUEST).header.dst_port, 9);
    for nonsense in ["GET / HTTP/1.1\r\n", "CONNECT x\n", &"CONNECT 1".repeat(10)] {
        let mut client = UnixStream::connect(rig.path()).unwrap();
        client.write_all(nonsense.as_bytes()).unwrap();
        rig.assert_silent();
        let mut answer = String::new();
        // The end of file may come as a reset, if the device did not read everything.
        let _reset = client.read_to_string(&mut answer);
        assert!(answer.starts_with("ERR "), "{nonsense:?}: {answer:?}");
    }
}

#[test]
fn guest_that_refuses_is_reported() {
    let mut rig = Rig::new();
    let mut client = rig.client(99);
    let request = rig.recv_op(op::REQUEST);
    rig.send(Conn::new(&request.header).header(op::RST), &[]);
    rig.pump();
    assert_eq!(read_some(&mut client), b"ERR connection to guest port 99 refused\n");
    assert!(at_eof(&mut client));
    rig.assert_silent();
}

#[test]
fn client_that_leaves_early_is_forgotten() {
    let mut rig = Rig::new();
    drop(rig.client(5));
    rig.pump();
    // It may have been asked for already, but then it was also taken back.
    let ops: Vec<u16> = rig.inbox.drain(..).map(|p| p.header.op).collect();
    assert!(ops.is_empty() || ops == [op::REQUEST, op::RST], "{ops:?}");
    let client = rig.client(6);
    let request = rig.recv_op(op::REQUEST);
    drop(client);
    assert_eq!(rig.recv_op(op::RST).header.src_port, request.header.src_port);
    // The guest's answer comes too late.
    rig.send(Conn::new(&request.header).header(op::RESPONSE), &[]);
    rig.recv_op(op::RST);
}

#[test]
fn half_closes_pass_in_both_directions() {
    let mut rig = Rig::new();
    let (mut client, mut conn) = rig.connect(1);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.recv_op(op::RW).payload, b"last words");
    assert_eq!(rig.recv_op(op::SHUTDOWN).header.flags, shut::SEND);
    rig.send(conn.header(op::RW), b"still here");
    rig.pump();
    assert_eq!(read_some(&mut client), b"still here");
    conn.flags = shut::SEND;
    rig.send(conn.header(op::SHUTDOWN), &[]);
    rig.pump();
    assert!(at_eof(&mut client));
    // Both directions are shut, each by its sender.
    assert_eq!(rig.recv_op(op::SHUTDOWN).header.flags, shut::BOTH);
    rig.send(conn.header(op::RST), &[]);
    rig.assert_silent();
}

#[test]
fn guest_that_closes_has_its_data_delivered_first() {
    let mut rig = Rig::new();
    let (mut client, mut conn) = rig.connect(1);
    // As much as goes: socket and device are full then.
    let data: Vec<u8> = (0..4 << 20).map(|i: u32| (i / 7) as u8).collect();
    let (mut sent, mut forwarded) = (0, 0);
    while sent - forwarded < BUFFER as usize {
        let end = sent + (BUFFER as usize - (sent - forwarded)).min(50_000);
        rig.send(conn.header(op::RW), &data[sent..end]);
        sent = end;
        rig.pump();
        for packet in rig.inbox.drain(..) {
            forwarded = packet.header.fwd_cnt as usize;
        }
    }
    conn.flags = shut::BOTH;
    rig.send(conn.header(op::SHUTDOWN), &[]);
    rig.assert_silent();
    // The guest does not wait until all is written.
    rig.send(conn.header(op::RST), &[]);
    rig.pump();
    let mut got = Vec::new();
    while got.len() < sent {
        let before = got.len();
        got.extend(read_some(&mut client));
        rig.pump();
        assert!(got.len() > before, "stuck at {before} of {sent}");
    }
    assert!(got == data[..sent]);
    assert!(at_eof(&mut client));
    rig.assert_silent();
}

#[test]
fn guest_that_closes_and_waits_is_told_when_all_is_written() {
    let mut rig = Rig::new();
    let (mut client, mut conn) = rig.connect(1);
    rig.send(conn.header(op::RW), b"all");
    conn.flags = shut::BOTH;
    rig.send(conn.header(op::SHUTDOWN), &[]);
    rig.recv_op(op::RST);
    assert_eq!(read_some(&mut client), b"all");
    assert!(at_eof(&mut client));
}

#[test]
fn host_that_closes_is_told_to_the_guest_after_its_data() {
    let mut rig = Rig::new();
    let (mut client, conn) = rig.connect(1);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(rig.recv_op(op::RW).payload, b"bye");
    let mut told = 0;
    while told != shut::BOTH {
        told = rig.recv_op(op::SHUTDOWN).header.flags;
    }
    // Data that was under way is dropped, not refused.
    rig.send(conn.header(op::RW), b"too late");
    rig.assert_silent();
    rig.send(conn.header(op::RST), &[]);
    rig.assert_silent();
    rig.send(conn.header(op::RW), b"much too late");
    rig.recv_op(op::RST);
}

#[test]
fn guest_connects_to_a_socket_of_the_host() {
    let mut rig = Rig::new();
    let header = Header {
        src_port: 4000,
        dst_port: 80,
        op: op::REQUEST,
        buf_alloc: 1000,
        ..Header::default()
    };
    rig.send(header, &[]);
    rig.recv_op(op::RST);
    let mut path = rig.path().into_os_string();
    path.push("_80");
    let listener = UnixListener::bind(path).unwrap();
    rig.send(header, &[]);
    let response = rig.recv_op(op::RESPONSE);
    assert_eq!((response.header.src_port, response.header.dst_port), (80, 4000));
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"hello guest").unwrap();
    assert_eq!(rig.recv_op(op::RW).payload, b"hello guest");
}

#[test]
fn internal_connections_work_both_ways_and_pass_the_gate() {
    let mut rig = Rig::new();
    rig.endpoint.set_gate(Gate::Hold);
    let mut stream = rig.endpoint.connect_internal(49_983).unwrap();
    stream.write_all(b"POST /init").unwrap();
    let request = rig.recv_op(op::REQUEST);
    let conn = Conn::new(&request.header);
    rig.send(conn.header(op::RESPONSE), &[]);
    assert_eq!(rig.recv_op(op::RW).payload, b"POST /init");
    rig.send(conn.header(op::RW), b"204");
    rig.pump();
    assert_eq!(read_some(&mut stream), b"204", "and no OK line");

    let mut refused = rig.endpoint.connect_internal(1).unwrap();
    let request = rig.recv_op(op::REQUEST);
    rig.send(Conn::new(&request.header).header(op::RST), &[]);
    rig.pump();
    assert!(at_eof(&mut refused));

    rig.endpoint.listen_internal(1024);
    let hello = Header {
        src_port: 9,
        dst_port: 1024,
        op: op::REQUEST,
        buf_alloc: 4096,
        ..Header::default()
    };
    rig.send(hello, &[]);
    rig.recv_op(op::RESPONSE);
    rig.send(Header { op: op::RW, ..hello }, b"hello");
    rig.pump();
    let mut incoming = rig.endpoint.take_internal_incoming();
    assert_eq!(incoming.len(), 1);
    assert_eq!(incoming[0].0, 1024);
    assert_eq!(read_some(&mut incoming[0].1), b"hello");
    assert!(rig.endpoint.take_internal_incoming().is_empty());
}

#[test]
fn gate_holds_opens_and_refuses() {
    let mut rig = Rig::new();
    rig.endpoint.set_gate(Gate::Hold);
    let clients: Vec<_> = (0..5).map(|n| rig.client(100 + n)).collect();
    rig.assert_silent();
    rig.endpoint.set_gate(Gate::Open);
    rig.pump();
    let ports: Vec<u32> = rig.inbox.drain(..).map(|p| p.header.dst_port).collect();
    assert_eq!(ports, [100, 101, 102, 103, 104], "in the order they came");
    drop(clients);
    rig.pump();
    rig.inbox.clear();

    rig.endpoint.set_gate(Gate::Hold);
    let mut held = rig.client(1);
    rig.pump();
    rig.endpoint.set_gate(Gate::Refuse("no\nidentity".into()));
    rig.pump();
    assert_eq!(read_some(&mut held), b"ERR no identity\n");
    assert!(at_eof(&mut held));
    let mut late = rig.client(2);
    rig.assert_silent();
    assert_eq!(read_some(&mut late), b"ERR no identity\n");
}

#[test]
fn held_and_silent_clients_are_bounded() {
    let mut rig = Rig::new();
    rig.endpoint.set_gate(Gate::Hold);
    let mut held: Vec<_> = (0..200)
        .map(|_| {
            let client = rig.client(1);
            rig.pump();
            client
        })
        .collect();
    let refused = held.iter_mut().filter_map(|c| Some(read_some(c)).filter(|r| !r.is_empty()));
    assert_eq!(refused.inspect(|r| assert!(r.starts_with(b"ERR "))).count(), 200 - 128);
    held.drain(..64);
    rig.pump();
    let mut again = rig.client(1);
    rig.pump();
    assert_eq!(read_some(&mut again), b"", "those that left make room");

    let mut silent: Vec<_> = (0..80)
        .map(|_| {
            let stream = UnixStream::connect(rig.path()).unwrap();
            stream.set_nonblocking(true).unwrap();
            rig.pump();
            stream
        })
        .collect();
    let pushed_out: Vec<bool> = silent.iter_mut().map(|c| !read_some(c).is_empty()).collect();
    assert!(pushed_out[..16].iter().all(|&x| x) && pushed_out[16..].iter().all(|&x| !x));
}

#[test]
fn connections_are_bounded_and_finished_ones_make_room() {
    let mut rig = Rig::new();
    rig.endpoint.listen_internal(1);
    let request = |port| Header {
        src_port: port,
        dst_port: 1,
        op: op::REQUEST,
        buf_alloc: 4096,
        ..Header::default()
    };
    let mut streams = Vec::new();
    for n in 0..MAX_CONNECTIONS as u32 {
        rig.send(request(n), &[]);
        rig.recv_op(op::RESPONSE);
        streams.extend(rig.endpoint.take_internal_incoming());
    }
    rig.send(request(600), &[]);
    rig.recv_op(op::RST);
    assert!(rig.endpoint.connect_internal(1).is_err());
    let mut client = rig.client(5);
    rig.pump();
    assert_eq!(read_some(&mut client), b"ERR too many vsock connections\n");
    // The host closes one; the guest never says its last word.
    streams.pop();
    rig.pump();
    rig.inbox.clear();
    rig.send(request(601), &[]);
    rig.pump();
    let ops: Vec<u16> = rig.inbox.drain(..).map(|p| p.header.op).collect();
    assert_eq!(ops, [op::RST, op::RESPONSE]);
}
