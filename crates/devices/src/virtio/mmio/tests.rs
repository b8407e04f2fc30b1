//! The transport against drivers that keep the rules, and such that do not.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::DeviceState;
use crate::virtio::pmem::{Pmem, PmemConfig};
use crate::virtio::rng::{Rng, RngState};
use crate::virtio::testing::{Counter, Guest, memory};

const EVENT_IDX: u64 = 1 << 29;
const NEEDS_RESET: u32 = 0x40;

struct Rig {
    transport: MmioTransport<Rng>,
    guest: Guest,
    interrupt: Arc<Counter>,
    bell: Arc<Counter>,
}

fn rig() -> Rig {
    let mem = memory();
    let (interrupt, bell) = (Arc::new(Counter::default()), Arc::new(Counter::default()));
    let transport = MmioTransport::new(Rng::new(), mem.clone(), interrupt.clone(), bell.clone());
    let guest = Guest::new(mem, transport.front());
    Rig { transport, guest, interrupt, bell }
}

impl Rig {
    fn run(&self) {
        while self.transport.has_pending() {
            self.transport.process_pending();
        }
    }
}

#[test]
fn identifies_itself() {
    let rig = rig();
    assert_eq!(rig.guest.read(reg::VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(rig.guest.read(reg::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(rig.guest.read(reg::VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(rig.guest.read(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(rig.transport.device_type(), 4);
}

#[test]
fn serves_a_good_driver() {
    let mut rig = rig();
    rig.guest.start(0);
    rig.run();
    rig.bell.take();
    let head = rig.guest.submit(0, &[], &[32, 32]).unwrap();
    rig.guest.notify(0);
    assert_eq!(rig.bell.take(), 1);
    assert!(rig.guest.take_used(0).is_none(), "the register write does no work");
    rig.run();
    let used = rig.guest.take_used(0).unwrap();
    assert_eq!((used.head, used.len), (head, 64));
    assert_ne!(used.written, vec![0; 64]);
    assert_eq!(rig.interrupt.take(), 1);
    assert_eq!(rig.guest.acknowledge(), 1);
    assert_eq!(rig.guest.acknowledge(), 0);
}

#[test]
fn status_steps_cannot_be_skipped() {
    let rig = rig();
    let status = |value| {
        rig.guest.write(reg::VIRTIO_MMIO_STATUS, value);
        rig.guest.status()
    };
    assert_eq!(status(2), 0, "DRIVER needs ACKNOWLEDGE");
    assert_eq!(status(4), 0);
    assert_eq!(status(1), 1);
    assert_eq!(status(3), 3);
    assert_eq!(status(11), 3, "FEATURES_OK needs VERSION_1");
    rig.guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    rig.guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 3);
    assert_eq!(status(11), 3, "bit 33 was not offered");
    rig.guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    assert_eq!(status(11), 11);
    rig.guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 3);
    assert_eq!(status(15), 15, "features are settled");
    assert_eq!(status(1), 15, "bits are not taken away");
    assert_eq!(status(0x80), 0x8f);
    assert_eq!(status(0), 0);
}

#[test]
fn misplaced_rings_stop_the_device() {
    for (register, value) in [
        (reg::VIRTIO_MMIO_QUEUE_NUM, 0),
        (reg::VIRTIO_MMIO_QUEUE_NUM, 3),
        (reg::VIRTIO_MMIO_QUEUE_NUM, 128),
        (reg::VIRTIO_MMIO_QUEUE_NUM, 0x1_0010),
        (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008),
        (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1001),
        (reg::VIRTIO_MMIO_QUEUE_USED_LOW, 0x1002),
        (reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, 1),
        (reg::VIRTIO_MMIO_QUEUE_USED_HIGH, u32::MAX),
    ] {
        let rig = rig();
        let guest = &rig.guest;
        for status in [1, 3] {
            guest.write(reg::VIRTIO_MMIO_STATUS, status);
        }
        guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        guest.write(reg::VIRTIO_MMIO_STATUS, 11);
        guest.write(reg::VIRTIO_MMIO_QUEUE_NUM, 16);
        guest.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
        guest.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
        guest.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
        guest.write(register, value);
        guest.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(guest.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "{register:#x} {value:#x}");
        assert_eq!(guest.status(), 11 | NEEDS_RESET);
        let fault = rig.transport.fault().unwrap();
        assert!(fault.starts_with("queue 0: rings are misplaced"), "{fault}");
    }
}

#[test]
fn rules_broken_at_run_time_stop_the_device_until_reset() {
    type Break = fn(&Guest);
    let cases: [(&str, Break); 5] = [
        ("index jumps", |g| g.mem.write_obj(200u16, GuestAddress(0x1002)).unwrap()),
        ("head out of range", |g| {
            g.mem.write_obj(64u16, GuestAddress(0x1004)).unwrap();
            g.mem.write_obj(1u16, GuestAddress(0x1002)).unwrap();
        }),
        ("loop", |g| {
            // Length 64, writable, next: itself.
            g.mem.write_obj(64u64 | 3 << 32, GuestAddress(8)).unwrap();
            g.mem.write_obj(1u16, GuestAddress(0x1002)).unwrap();
        }),
        ("next out of range", |g| {
            g.mem.write_obj(64u64 | 3 << 32 | 500 << 48, GuestAddress(8)).unwrap();
            g.mem.write_obj(1u16, GuestAddress(0x1002)).unwrap();
        }),
        ("readable after writable", |g| {
            g.mem.write_obj(64u64 | 3 << 32 | 1 << 48, GuestAddress(8)).unwrap();
            g.mem.write_obj(64u64, GuestAddress(24)).unwrap();
            g.mem.write_obj(1u16, GuestAddress(0x1002)).unwrap();
        }),
    ];
    for (name, break_rule) in cases {
        let mut rig = rig();
        rig.guest.start(0);
        rig.run();
        rig.interrupt.take();
        break_rule(&rig.guest);
        rig.guest.notify(0);
        rig.run();
        assert_eq!(rig.guest.status(), 15 | NEEDS_RESET, "{name}");
        assert_eq!(rig.guest.acknowledge(), 2, "{name}: a configuration change");
        assert_eq!(rig.interrupt.take(), 1, "{name}");
        // It stays stopped.
        rig.guest.notify(0);
        rig.run();
        assert_eq!(rig.interrupt.take(), 0, "{name}");
        rig.guest.start(0);
        assert_eq!((rig.guest.status(), rig.transport.fault()), (15, None), "{name}");
        rig.guest.submit(0, &[], &[8]).unwrap();
        rig.guest.notify(0);
        rig.run();
        assert_eq!(rig.guest.take_used(0).unwrap().len, 8, "{name}: it works again");
    }
}

#[test]
fn interrupts_are_suppressed_as_the_driver_asks() {
    let mut rig = rig();
    rig.guest.start(0);
    rig.run();
    // VRING_AVAIL_F_NO_INTERRUPT.
    rig.guest.mem.write_obj(1u16, GuestAddress(0x1000)).unwrap();
    rig.guest.submit(0, &[], &[8]).unwrap();
    rig.guest.notify(0);
    rig.run();
    assert!(rig.guest.take_used(0).is_some());
    assert_eq!(rig.interrupt.take(), 0);

    assert_ne!(rig.guest.start(EVENT_IDX) & EVENT_IDX, 0);
    rig.run();
    // used_event: tell after the third.
    rig.guest.mem.write_obj(2u16, GuestAddress(0x1000 + 4 + 2 * 64)).unwrap();
    let mut told = Vec::new();
    for _ in 0..4 {
        rig.guest.submit(0, &[], &[8]).unwrap();
        assert!(rig.guest.notify_if_wanted(0, 1, true), "the device wants each");
        rig.run();
        told.push(rig.interrupt.take());
    }
    assert_eq!(told, [0, 0, 1, 0]);
}

#[test]
fn accesses_of_other_widths_have_no_effect() {
    let rig = rig();
    let front = rig.transport.front();
    let mut front = front.lock().unwrap();
    for len in [0, 1, 2, 3, 5, 8] {
        front.write(0x70, &vec![1; len]);
        let mut data = vec![0xff; len];
        front.read(0x00, &mut data);
        assert_eq!(data, vec![0; len]);
    }
    drop(front);
    assert_eq!(rig.guest.status(), 0);
    // Unknown registers and queues.
    rig.guest.write(0x0c, 1);
    rig.guest.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    rig.guest.write(reg::VIRTIO_MMIO_QUEUE_SEL, u32::MAX);
    assert_eq!(rig.guest.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    rig.guest.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    assert!(!rig.transport.has_pending());
}

#[test]
fn child_uses_its_own_interrupt_and_bell() {
    let mut rig = rig();
    rig.guest.start(0);
    rig.guest.submit(0, &[], &[8]).unwrap();
    rig.guest.notify(0);
    rig.run();
    rig.interrupt.take();
    rig.bell.take();
    let (interrupt, bell) = (Arc::new(Counter::default()), Arc::new(Counter::default()));
    rig.transport.rewire(interrupt.clone(), bell.clone());
    rig.transport.resume();
    assert_eq!(interrupt.take(), 1, "the interrupt that the guest has not taken is repeated");
    assert_eq!(bell.take(), 1);
    rig.guest.submit(0, &[], &[8]).unwrap();
    rig.guest.notify(0);
    rig.run();
    assert_eq!((rig.interrupt.take(), rig.bell.take()), (0, 0));
    assert_eq!((interrupt.take(), bell.take()), (1, 1));
}

#[test]
fn notification_before_the_driver_is_ready_is_not_lost() {
    let mut rig = rig();
    rig.guest.start(0);
    rig.guest.submit(0, &[], &[8]).unwrap();
    // The driver adds a buffer before DRIVER_OK and never notifies again.
    let state = rig.transport.save();
    let early = TransportState { status: 11, pending: 0, ..state };
    rig.transport.restore(&early).unwrap();
    rig.guest.notify(0);
    rig.run();
    assert!(rig.guest.take_used(0).is_none());
    rig.guest.write(reg::VIRTIO_MMIO_STATUS, 15);
    rig.run();
    assert!(rig.guest.take_used(0).is_some());
}

#[test]
fn broken_states_are_refused_and_leave_a_reset_device() {
    let mut rig = rig();
    rig.guest.start(0);
    rig.run();
    let good = rig.transport.save();
    let with_queue = |f: &dyn Fn(&mut crate::virtio::queue::QueueState)| {
        let mut state = good.clone();
        f(&mut state.queues[0]);
        state
    };
    for state in [
        TransportState { queues: vec![], ..good.clone() },
        TransportState { driver_features: 0, ..good.clone() },
        TransportState { driver_features: u64::MAX, ..good.clone() },
        TransportState { status: 7, ..good.clone() },
        TransportState {
            device: DeviceState::Pmem(crate::virtio::pmem::PmemState { start: 0, size: 0 }),
            ..good.clone()
        },
        with_queue(&|q| q.size = 3),
        with_queue(&|q| q.desc = 1 << 40),
        with_queue(&|q| q.used = 2),
    ] {
        let error = rig.transport.restore(&state).unwrap_err();
        assert_eq!(rig.guest.status(), 0, "{error}");
    }
    rig.transport.restore(&good).unwrap();
    assert_eq!(rig.transport.save(), good);
    assert_eq!(good.device, DeviceState::Rng(RngState {}));
}

proptest! {
    /// A restored transport answers every register as the original, whatever a driver did to it.
    #[test]
    fn restored_transport_behaves_as_the_original(
        writes in prop::collection::vec(
            (
                prop_oneof![
                    Just(0x14u32), Just(0x20), Just(0x24), Just(0x30), Just(0x38), Just(0x44), Just(0x50),
                    Just(0x64), Just(0x70), Just(0x80), Just(0x90), Just(0xa0), 0u32..0x100,
                ],
                prop_oneof![0u32..16, Just(64), Just(0x1000), any::<u32>()],
            ),
            0..40,
        ),
        start in any::<bool>(),
        chains in 0usize..5,
    ) {
        let mut original = rig();
        if start {
            original.guest.start(EVENT_IDX);
            for _ in 0..chains { original.guest.submit(0, &[], &[16]).unwrap(); }
        }
        for (register, value) in writes {
            original.guest.write(register & !3, value);
        }
        let state = original.transport.save();
        let restored = rig();
        restored.transport.restore(&state).unwrap();
        prop_assert_eq!(restored.transport.save(), state);
        for register in (0..0x110).step_by(4) {
            prop_assert_eq!(original.guest.read(register), restored.guest.read(register), "{:#x}", register);
        }
    }
}

/// A vCPU that notifies only when it is asked to, and an event loop that sleeps when nothing is pending:
/// neither may wait for the other for ever.
#[test]
fn no_wake_up_is_lost_between_vcpu_and_event_loop() {
    use forkd_sys::reactor::wait_readable;
    use forkd_sys::wake::Waker;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    for event_idx in [false, true] {
        let mem = memory();
        let waker = Waker::new().unwrap();
        let transport = MmioTransport::new(
            Rng::new(),
            mem.clone(),
            Arc::new(Counter::default()),
            Arc::new(waker.clone()),
        );
        let mut guest = Guest::new(mem, transport.front());
        guest.start(if event_idx { EVENT_IDX } else { 0 });
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    // A minute is for ever.
                    assert!(wait_readable(&waker, Some(Duration::from_secs(60))).unwrap());
                    waker.drain().unwrap();
                    transport.process_pending();
                }
            });
            for n in 0..20_000 {
                // Mostly one at a time: the next comes just when the device is about to go to sleep.
                let batch = if n % 16 == 0 { 5 } else { 1 };
                for _ in 0..batch {
                    guest.submit(0, &[], &[8]).unwrap();
                }
                std::sync::atomic::fence(Ordering::SeqCst);
                guest.notify_if_wanted(0, batch, event_idx);
                for _ in 0..batch {
                    let begun = std::time::Instant::now();
                    let mut spins = 0;
                    while guest.take_used(0).is_none() {
                        spins += 1;
                        if spins % 1000 == 0 {
                            assert!(begun.elapsed() < Duration::from_secs(60), "lost in batch {n}");
                            std::thread::yield_now();
                        }
                    }
                }
            }
            stop.store(true, Ordering::Release);
            waker.wake().unwrap();
        });
    }
}

#[test]
fn pmem_tells_its_region_and_answers_flushes() {
    let mem = memory();
    let counter = Arc::new(Counter::default());
    let config = PmemConfig { start: 0x1_4000_0000, size: 0x20_0000 };
    let transport = MmioTransport::new(Pmem::new(config), mem.clone(), counter.clone(), counter);
    let mut guest = Guest::new(mem, transport.front());
    guest.start(u64::MAX);
    let numbers = guest.config(0, 16);
    assert_eq!(numbers[..8], config.start.to_le_bytes());
    assert_eq!(numbers[8..], config.size.to_le_bytes());
    guest.submit(0, &[&[0; 4]], &[4]).unwrap();
    guest.submit(0, &[&[7, 0, 0, 0]], &[4]).unwrap();
    guest.submit(0, &[&[0; 4]], &[3]).unwrap();
    guest.notify(0);
    transport.process_pending();
    let answers: Vec<_> =
        std::iter::from_fn(|| guest.take_used(0)).map(|u| (u.len, u.written[0])).collect();
    assert_eq!(answers, [(4, 0), (4, 1), (0, 0)]);
    let state = transport.save();
    transport.restore(&state).unwrap();
    assert_eq!(transport.save(), state);
    let moved = Pmem::new(PmemConfig { start: 0, ..config }).restore(&state.device);
    assert!(moved.unwrap_err().to_string().contains("the region was 0x140000000+0x200000"));
}

#[test]
fn rng_bounds_a_request_and_survives_unusable_buffers() {
    let mut rig = rig();
    rig.guest.start(0);
    rig.guest.submit(0, &[], &[10_000]).unwrap();
    rig.guest.submit(0, &[&[1; 4]], &[]).unwrap();
    rig.guest.notify(0);
    rig.run();
    assert_eq!(rig.guest.take_used(0).unwrap().len, 4096);
    assert_eq!(rig.guest.take_used(0).unwrap().len, 0);
    // A buffer beyond all memory.
    let head = rig.guest.submit(0, &[], &[16]).unwrap();
    rig.guest.mem.write_obj(u64::MAX - 4, GuestAddress(16 * u64::from(head))).unwrap();
    rig.guest.notify(0);
    rig.run();
    assert_eq!(rig.guest.take_used(0).unwrap().len, 0);
    let metrics: std::collections::BTreeMap<_, _> = rig.transport.metrics().into_iter().collect();
    assert_eq!((metrics["requests"], metrics["bytes"], metrics["failures"]), (1, 4096, 2));
    assert_eq!(metrics["faults"], 0);
}
