//! Credit, backpressure, bounds.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::virtio::vsock::BUFFER;
use crate::virtio::vsock::packet::shut;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

/// Writes as much as the socket takes.
fn write_some(stream: &mut UnixStream, data: &[u8]) -> usize {
    let mut done = 0;
    while done < data.len() {
        match stream.write(&data[done..]) {
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    done
}

#[test]
fn guest_without_credit_is_asked_and_not_flooded() {
    let mut rig = Rig::new();
    let mut client = rig.client(1);
    let request = rig.recv_op(op::REQUEST);
    let mut conn = Conn { buf_alloc: 1000, ..Conn::new(&request.header) };
    rig.send(conn.header(op::RESPONSE), &[]);
    rig.pump();
    read_some(&mut client);
    let data = pattern(5000);
    client.write_all(&data).unwrap();
    let mut got = Vec::new();
    let mut asked = 0;
    while got.len() < data.len() {
        rig.pump();
        let mut burst = 0;
        while let Some(packet) = rig.inbox.pop_front() {
            match packet.header.op {
                op::RW => {
                    burst += packet.payload.len();
                    got.extend(packet.payload);
                }
                op::CREDIT_REQUEST => {
                    asked += 1;
                    assert_eq!(burst, 1000, "asked when the credit was used up");
                }
                other => panic!("operation {other}"),
            }
        }
        assert_eq!(burst, 1000);
        conn.fwd_cnt += 1000;
        rig.send(conn.header(op::CREDIT_UPDATE), &[]);
    }
    assert_eq!(got, data);
    assert_eq!(asked, 5);
}

#[test]
fn nonsense_credit_is_no_credit() {
    let mut rig = Rig::new();
    let (mut client, conn) = rig.connect(1);
    // The guest claims to have consumed what it never got.
    rig.send(Conn { fwd_cnt: 1 << 20, ..conn }.header(op::CREDIT_UPDATE), &[]);
    client.write_all(b"x").unwrap();
    rig.assert_silent();
    rig.send(conn.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(rig.recv_op(op::RW).payload, b"x");
}

#[test]
fn client_that_closes_while_the_guest_has_no_credit_does_not_make_the_loop_spin() {
    let mut rig = Rig::new();
    let (mut client, mut conn) = rig.connect(1);
    conn.buf_alloc = 0;
    rig.send(conn.header(op::CREDIT_UPDATE), &[]);
    rig.pump();
    client.write_all(b"waiting").unwrap();
    drop(client);
    // `pump` panics if readiness is told over and over.
    rig.assert_silent();
    conn.buf_alloc = 100;
    rig.send(conn.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(rig.recv_op(op::RW).payload, b"waiting");
}

#[test]
fn guest_without_receive_buffers_is_felt_by_the_client() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::with(features, 4);
        let (mut client, mut conn) = rig.connect(1);
        conn.buf_alloc = u32::MAX;
        rig.send(conn.header(op::CREDIT_UPDATE), &[]);
        rig.pump();
        // The guest gets what it has buffers for, and posts no more.
        rig.rx_buffers = 0;
        let data = pattern(4 << 20);
        let mut sent = 0;
        for _ in 0..50 {
            sent += write_some(&mut client, &data[sent..]);
            rig.pump();
        }
        assert!(sent < data.len(), "all {sent} bytes were taken, nobody knows where to");
        rig.rx_buffers = 4;
        rig.post_buffers();
        let mut got = Vec::new();
        while got.len() < data.len() {
            let before = got.len();
            sent += write_some(&mut client, &data[sent..]);
            rig.pump();
            rig.inbox.drain(..).for_each(|p| got.extend(p.payload));
            assert!(got.len() > before, "stuck at {before}");
        }
        assert_eq!(got, data);
    }
}

#[test]
fn receive_buffers_without_room_for_data_do_not_make_the_device_spin() {
    let mut rig = Rig::with(0, 0);
    (rig.rx_size, rig.rx_buffers) = (HEADER_LEN, 4);
    rig.post_buffers();
    let (mut client, conn) = rig.connect(1);
    client.write_all(b"does not fit").unwrap();
    rig.assert_silent();
    // What fits still goes through.
    rig.send(conn.header(op::CREDIT_REQUEST), &[]);
    rig.recv_op(op::CREDIT_UPDATE);
}

#[test]
fn receive_buffer_too_short_for_a_header_is_given_back_empty() {
    let mut rig = Rig::with(0, 0);
    let _client = rig.client(1);
    for size in [HEADER_LEN - 1, 4096] {
        rig.guest.submit(RX, &[], &[size]).unwrap();
    }
    rig.guest.notify(RX);
    let mut ready = Vec::new();
    while rig.guest.free(RX) < 128 {
        rig.endpoint.process(&rig.reactor);
        rig.reactor.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        ready.iter().for_each(|r| rig.endpoint.handle(&rig.reactor, r));
        if let Some(used) = rig.guest.take_used(RX) {
            let expected = if used.written.len() < HEADER_LEN { 0 } else { HEADER_LEN };
            assert_eq!(used.len as usize, expected);
        }
    }
}

#[test]
fn client_that_does_not_read_is_felt_by_the_guest() {
    let mut rig = Rig::new();
    let (mut client, conn) = rig.connect(1);
    let data = pattern(3 << 20);
    let (mut sent, mut forwarded, mut got) = (0usize, 0u32, Vec::new());
    let mut stalled = 0;
    while got.len() < data.len() {
        // As a good driver: no more than the credit.
        let credit = BUFFER - (sent as u32 - forwarded);
        let n = (credit as usize).min(data.len() - sent).min(60_000);
        if n > 0 {
            rig.send(conn.header(op::RW), &data[sent..sent + n]);
            sent += n;
        } else {
            stalled += 1;
            got.extend(read_some(&mut client));
        }
        rig.pump();
        for packet in rig.inbox.drain(..) {
            assert_eq!(packet.header.op, op::CREDIT_UPDATE);
            forwarded = packet.header.fwd_cnt;
        }
        if sent == data.len() {
            got.extend(read_some(&mut client));
        }
    }
    assert!(stalled > 0, "the guest was slowed down");
    assert_eq!(got, data);
    // One that sends beyond its credit is reset.
    for _ in 0..20 {
        rig.send(conn.header(op::RW), &data[..60_000]);
    }
    rig.pump();
    assert!(rig.inbox.iter().any(|p| p.header.op == op::RST));
}

#[test]
fn credit_request_is_answered_at_once() {
    let mut rig = Rig::new();
    let (_client, conn) = rig.connect(1);
    rig.send(conn.header(op::RW), b"12345");
    rig.send(conn.header(op::CREDIT_REQUEST), &[]);
    let update = rig.recv_op(op::CREDIT_UPDATE);
    assert_eq!((update.header.buf_alloc, update.header.fwd_cnt), (BUFFER, 5));
}

#[test]
fn payload_may_be_spread_over_buffers() {
    let mut rig = Rig::new();
    let (mut client, conn) = rig.connect(1);
    let header = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        kind: TYPE_STREAM,
        len: 9,
        ..conn.header(op::RW)
    };
    rig.send_raw(header, &[b"one", b"two", b"three"]);
    rig.pump();
    assert_eq!(read_some(&mut client), b"onetwothr", "the header says how much of it");
}

#[test]
fn packets_that_make_no_sense_are_dropped_or_refused() {
    let mut rig = Rig::new();
    let good = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        kind: TYPE_STREAM,
        op: op::RW,
        ..Header::default()
    };
    // From someone else, longer than any packet, longer than its buffers, an answer to nothing.
    rig.send_raw(Header { src_cid: 4, ..good }, &[]);
    rig.send_raw(Header { len: u32::MAX, ..good }, &[b"x"]);
    rig.send_raw(Header { len: 2, ..good }, &[b"x"]);
    rig.send_raw(Header { op: op::RST, ..good }, &[]);
    rig.assert_silent();
    for bad in [
        good,
        Header { dst_cid: 9, ..good },
        Header { kind: 2, op: op::REQUEST, ..good },
        Header { op: 77, ..good },
    ] {
        rig.send_raw(bad, &[]);
        rig.recv_op(op::RST);
    }
    // A short header, and none at all.
    rig.guest.submit(TX, &[&[0; 43]], &[]).unwrap();
    rig.guest.submit(TX, &[], &[64]).unwrap();
    rig.guest.notify(TX);
    rig.assert_silent();
    assert_eq!(rig.transport.fault(), None);
}

#[test]
fn flood_of_packets_for_nobody_waits_for_receive_buffers() {
    let mut rig = Rig::with(0, 0);
    let mut sent = 0u32;
    let flood = |port| Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: port,
        kind: TYPE_STREAM,
        op: op::RW,
        ..Header::default()
    };
    // The driver's queue fills up, as the device takes no more than it can answer.
    for _ in 0..20 {
        while rig.guest.submit(TX, &[&flood(sent).to_bytes()], &[]).is_some() {
            sent += 1;
        }
        rig.guest.notify(TX);
        rig.pump();
    }
    assert_eq!(sent, 256 + 128);
    rig.rx_buffers = 16;
    rig.post_buffers();
    rig.pump();
    let ports: Vec<u32> = rig.inbox.drain(..).map(|p| p.header.dst_port).collect();
    assert_eq!(ports, (0..sent).collect::<Vec<_>>(), "each is answered, in order");
}

#[test]
fn hundred_connections_share_the_device() {
    let mut rig = Rig::with(EVENT_IDX, 64);
    let mut ends = HashMap::new();
    for n in 0..100u32 {
        let (client, conn) = rig.connect(n);
        ends.insert(conn.host_port, (client, conn, pattern(20_000 + n as usize), 0, Vec::new()));
    }
    // Every client sends its own data; the guest echoes what it gets; every client gets its own back.
    loop {
        let mut open = 0;
        for (client, _, data, sent, got) in ends.values_mut() {
            *sent += write_some(client, &data[*sent..]);
            got.extend(read_some(client));
            open += usize::from(got.len() < data.len());
        }
        if open == 0 {
            break;
        }
        rig.pump();
        for packet in std::mem::take(&mut rig.inbox) {
            if packet.header.op == op::RW {
                let (_, conn, ..) = ends.get_mut(&packet.header.src_port).unwrap();
                conn.fwd_cnt += packet.payload.len() as u32;
                let header = conn.header(op::RW);
                rig.send(header, &packet.payload);
            }
        }
        rig.pump();
    }
    for (_, _, data, _, got) in ends.into_values() {
        assert!(got == data);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    HostWrites(usize),
    HostReads,
    GuestWrites(usize),
    GuestConsumes,
    Pump,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1usize..40_000).prop_map(Step::HostWrites),
        Just(Step::HostReads),
        (1usize..40_000).prop_map(Step::GuestWrites),
        Just(Step::GuestConsumes),
        Just(Step::Pump),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the order in which both sides write and read, both get exactly what the other wrote, and
    /// neither gets more than it has room for.
    #[test]
    fn both_streams_arrive_whole(
        steps in steps(),
        guest_buffer in 1u32..100_000,
        rx_buffers in 1usize..20,
        rx_size in 100usize..5000,
        features in prop_oneof![Just(0), Just(EVENT_IDX)],
    ) {
        let mut rig = Rig::with(features, 0);
        rig.rx_size = rx_size;
        rig.rx_buffers = rx_buffers;
        rig.post_buffers();
        let (mut client, mut conn) = rig.connect(1);
        conn.buf_alloc = guest_buffer;
        rig.send(conn.header(op::CREDIT_UPDATE), &[]);
        let source = pattern(1 << 20);
        let (mut host_sent, mut guest_sent, mut forwarded) = (0, 0, 0u32);
        let (mut host_got, mut guest_got) = (Vec::new(), Vec::new());
        let mut tail = [Step::GuestConsumes, Step::HostReads, Step::Pump].repeat(2000);
        let mut steps = steps;
        let planned = steps.len();
        steps.append(&mut tail);
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::HostWrites(n) => {
                    let end = (host_sent + n).min(source.len());
                    host_sent += write_some(&mut client, &source[host_sent..end]);
                }
                Step::HostReads => host_got.extend(read_some(&mut client)),
                Step::GuestWrites(n) => {
                    let credit = (BUFFER - (guest_sent as u32 - forwarded)) as usize;
                    let end = (guest_sent + n.min(credit)).min(source.len());
                    rig.send(conn.header(op::RW), &source[guest_sent..end]);
                    guest_sent = end;
                }
                Step::GuestConsumes => {
                    conn.fwd_cnt = guest_got.len() as u32;
                    rig.send(conn.header(op::CREDIT_UPDATE), &[]);
                }
                Step::Pump => rig.pump(),
            }
            for packet in rig.inbox.drain(..) {
                prop_assert!(packet.header.op != op::RST && packet.header.op != op::SHUTDOWN);
                forwarded = packet.header.fwd_cnt;
                guest_got.extend(packet.payload);
                prop_assert!(guest_got.len() as u32 - conn.fwd_cnt <= guest_buffer);
            }
            if n >= planned && host_got.len() == guest_sent && guest_got.len() == host_sent {
                break;
            }
        }
        prop_assert!(host_got == source[..guest_sent], "host got {} of {guest_sent}", host_got.len());
        prop_assert!(guest_got == source[..host_sent], "guest got {} of {host_sent}", guest_got.len());
        conn.flags = shut::BOTH;
        rig.send(conn.header(op::SHUTDOWN), &[]);
        rig.pump();
        prop_assert!(at_eof(&mut client));
    }
}
