//! The disk against a plain array, and the device against a driver.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::virtio_blk as blk;

use super::*;
use crate::virtio::mmio::{MmioTransport, Transport};
use crate::virtio::testing::{Counter, Guest, SLOT, memory};
use crate::virtio::{DeviceState, RestoreError, VirtioDevice};

const BLOCK: usize = BLOCK_SIZE;

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 241) as u8 | 1).collect()
}

fn disk(base: &[u8], size: Option<u64>, quota: u64) -> Disk {
    let base = (!base.is_empty()).then(|| file(base));
    Disk::new(DiskConfig { base, size, read_only: false, layer_quota: quota }).unwrap()
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0xaa; disk.size() as usize];
    disk.read(0, &mut all).unwrap();
    all
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Discard(u64, u64),
    Read(u64, usize),
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let at = move || prop_oneof![0..size, (0..size / BLOCK as u64).prop_map(|b| b * BLOCK as u64)];
    let len = || prop_oneof![1u64..600, Just(BLOCK as u64), 1u64..20_000];
    let step = prop_oneof![
        3 => (at(), len(), 1u8..).prop_map(|(at, n, x)| Step::Write(at, vec![x; n as usize])),
        1 => (at(), len()).prop_map(|(at, n)| Step::Zero(at, n)),
        1 => (at(), len()).prop_map(|(at, n)| Step::Discard(at, n)),
        2 => (at(), len()).prop_map(|(at, n)| Step::Read(at, n as usize)),
    ];
    prop::collection::vec(step, 1..40)
}

/// What discard may do to the model: whole blocks become zeroes, the last one of the disk may be short.
fn model_discard(model: &mut [u8], at: usize, len: usize) {
    let end = at + len;
    let first = at.div_ceil(BLOCK) * BLOCK;
    let last = if end == model.len() { end } else { end / BLOCK * BLOCK };
    if first < last {
        model[first..last].fill(0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A disk over any base reads as an array does, and saves and restores as it is.
    #[test]
    fn disk_behaves_as_an_array(
        base_len in prop_oneof![Just(0usize), 1usize..70_000],
        extra in 0u64..30_000,
        steps in steps(100_000),
    ) {
        let base = pattern(base_len);
        let size = (base_len as u64 + extra).max(1);
        let mut disk = disk(&base, Some(size), u64::MAX);
        let size = size.next_multiple_of(512);
        prop_assert_eq!(disk.size(), size);
        let mut model = base.clone();
        model.resize(size as usize, 0);
        for step in steps {
            let (at, len) = match &step {
                Step::Write(at, data) => (*at, data.len() as u64),
                Step::Zero(at, n) | Step::Discard(at, n) => (*at, *n),
                Step::Read(at, n) => (*at, *n as u64),
            };
            let fits = at + len <= size;
            let range = at as usize..(at + len) as usize;
            let result = match &step {
                Step::Write(at, data) => disk.write(*at, data),
                Step::Zero(at, n) => disk.write_zeroes(*at, *n),
                Step::Discard(at, n) => disk.discard(*at, *n),
                Step::Read(at, n) => {
                    let mut out = vec![0xaa; *n];
                    let result = disk.read(*at, &mut out);
                    if fits { prop_assert_eq!(&out, &model[range.clone()]); }
                    result
                }
            };
            prop_assert_eq!(result.is_ok(), fits);
            if fits {
                match step {
                    Step::Write(_, data) => model[range].copy_from_slice(&data),
                    Step::Zero(..) => model[range].fill(0),
                    Step::Discard(at, n) => model_discard(&mut model, at as usize, n as usize),
                    Step::Read(..) => {}
                }
            }
        }
        prop_assert!(content(&disk) == model);

        let state = disk.layer_state();
        let mut data = Vec::new();
        disk.write_layer(&mut data).unwrap();
        prop_assert_eq!(data.len() as u64, state.data_len());
        prop_assert_eq!(data.len() as u64, disk.dirty_bytes());
        let mut restored = self::disk(&base, Some(size), u64::MAX);
        restored.read_layer(&state, &mut data.as_slice()).unwrap();
        prop_assert!(content(&restored) == model);
        prop_assert_eq!(restored.layer_state(), state);
    }

    /// Whatever is written, the layer keeps its quota and what was acknowledged.
    #[test]
    fn layer_keeps_its_quota(blocks in 0u64..6, writes in prop::collection::vec((0u64..10, 1u8..), 1..40)) {
        let mut disk = disk(&pattern(10 * BLOCK), None, blocks * BLOCK as u64 + 100);
        let mut model = content(&disk);
        for (block, value) in writes {
            let at = block as usize * BLOCK;
            match disk.write(at as u64, &[value; BLOCK]) {
                Ok(()) => model[at..at + BLOCK].fill(value),
                Err(error) => prop_assert!(matches!(error, DiskError::Full), "{}", error),
            }
            prop_assert!(disk.dirty_bytes() <= blocks * BLOCK as u64);
        }
        prop_assert!(content(&disk) == model);
    }
}

#[test]
fn zeroes_and_discards_give_memory_back() {
    let mut disk = disk(&pattern(4 * BLOCK), Some(8 * BLOCK as u64), 8 * BLOCK as u64);
    disk.write(0, &vec![7; 8 * BLOCK]).unwrap();
    assert_eq!(disk.dirty_bytes(), 8 * BLOCK as u64);
    disk.discard(0, 6 * BLOCK as u64).unwrap();
    assert_eq!(disk.dirty_bytes(), 2 * BLOCK as u64);
    disk.write_zeroes(100, 8 * BLOCK as u64 - 100).unwrap();
    // The head of the first block was written with zeroes, byte by byte.
    assert_eq!(disk.dirty_bytes(), BLOCK as u64);
    assert_eq!(content(&disk), vec![0; 8 * BLOCK]);
    let kinds: Vec<_> =
        disk.layer_state().extents.into_iter().map(|e| (e.first, e.count, e.kind)).collect();
    assert_eq!(
        kinds,
        [(0, 1, ExtentKind::Data), (1, 3, ExtentKind::Zero)],
        "past the base nothing is kept"
    );
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let new = |base: Option<File>, size| {
        Disk::new(DiskConfig { base, size, read_only: false, layer_quota: 0 })
    };
    assert!(matches!(new(None, None), Err(DiskError::NoSize)));
    assert!(matches!(new(Some(file(b"")), None), Err(DiskError::NoSize)));
    assert!(matches!(
        new(Some(file(b"abc")), Some(2)),
        Err(DiskError::TooSmall { size: 2, base: 3 })
    ));
    assert!(matches!(new(None, Some(u64::MAX)), Err(DiskError::TooLarge(_))));
    // Far more than there is memory: nothing is reserved.
    assert_eq!(new(None, Some(1 << 40)).unwrap().dirty_bytes(), 0);
}

#[test]
fn base_that_shrinks_is_an_error_and_no_crash() {
    let base = file(&pattern(8 * BLOCK));
    let other = base.try_clone().unwrap();
    let disk =
        Disk::new(DiskConfig { base: Some(base), size: None, read_only: true, layer_quota: 0 })
            .unwrap();
    other.set_len(BLOCK as u64).unwrap();
    assert!(matches!(disk.read(0, &mut vec![0; 2 * BLOCK]), Err(DiskError::BaseShrunk(0))));
    disk.read(0, &mut vec![0; BLOCK]).unwrap();
}

#[test]
fn base_is_never_written() {
    let base = file(&pattern(2 * BLOCK));
    let mut other = base.try_clone().unwrap();
    let config =
        DiskConfig { base: Some(base), size: None, read_only: false, layer_quota: u64::MAX };
    let mut disk = Disk::new(config).unwrap();
    disk.write(10, b"changed").unwrap();
    disk.discard(0, 2 * BLOCK as u64).unwrap();
    let mut now = Vec::new();
    other.seek(SeekFrom::Start(0)).unwrap();
    std::io::Read::read_to_end(&mut other, &mut now).unwrap();
    assert!(now == pattern(2 * BLOCK));
}

#[test]
fn broken_saved_layers_are_refused() {
    let extent = |first, count, kind| Extent { first, count, kind };
    for extents in [
        vec![extent(0, 0, ExtentKind::Zero)],
        vec![extent(3, 2, ExtentKind::Zero)],
        vec![extent(1, u64::MAX, ExtentKind::Zero)],
        vec![extent(1, 1, ExtentKind::Zero), extent(1, 1, ExtentKind::Zero)],
        vec![extent(2, 1, ExtentKind::Zero), extent(0, 1, ExtentKind::Zero)],
        // No data follows.
        vec![extent(0, 1, ExtentKind::Data)],
    ] {
        let mut disk = disk(&[], Some(4 * BLOCK as u64), u64::MAX);
        let state = LayerState { extents };
        assert!(disk.read_layer(&state, &mut std::io::empty()).is_err(), "{state:?}");
    }
}

struct Rig {
    transport: MmioTransport<Block>,
    guest: Guest,
}

impl Rig {
    fn new(disk: Disk) -> Self {
        let mem = memory();
        let device = Block::new(disk, &BlockConfig { id: "root-0".into() });
        let counter = Arc::new(Counter::default());
        let transport = MmioTransport::new(device, mem.clone(), counter.clone(), counter);
        let mut guest = Guest::new(mem, transport.front());
        guest.start(u64::MAX);
        Self { transport, guest }
    }

    /// Does one request; returns its status and what was written before it.
    fn request(&mut self, kind: u32, sector: u64, out: &[&[u8]], room: &[usize]) -> (u32, Vec<u8>) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let mut readable: Vec<&[u8]> = vec![&header];
        readable.extend(out);
        let mut writable = room.to_vec();
        writable.push(1);
        self.guest.submit(0, &readable, &writable).unwrap();
        self.guest.notify(0);
        self.run();
        let used = self.guest.take_used(0).expect("an answer");
        let mut written = used.written;
        let status = written.pop().unwrap();
        (u32::from(status), written)
    }

    fn run(&self) {
        while self.transport.has_pending() {
            self.transport.process_pending();
        }
        assert_eq!(self.transport.fault(), None);
    }
}

#[test]
fn requests_read_and_write_the_disk() {
    let base = pattern(8 * BLOCK);
    let mut rig = Rig::new(disk(&base, None, u64::MAX));
    let (status, data) = rig.request(blk::VIRTIO_BLK_T_IN, 3, &[], &[512, 1024, 100, 412]);
    assert_eq!(status, blk::VIRTIO_BLK_S_OK);
    assert!(data == base[3 * 512..7 * 512]);
    let (status, _) = rig.request(blk::VIRTIO_BLK_T_OUT, 1, &[&[0xee; 100], &[0xdd; 412]], &[]);
    assert_eq!(status, blk::VIRTIO_BLK_S_OK);
    let (_, data) = rig.request(blk::VIRTIO_BLK_T_IN, 0, &[], &[1536]);
    let mut expected = base[..1536].to_vec();
    expected[512..612].fill(0xee);
    expected[612..1024].fill(0xdd);
    assert!(data == expected);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_FLUSH, 0, &[], &[]).0, blk::VIRTIO_BLK_S_OK);
    let (status, id) = rig.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[], &[20]);
    assert_eq!((status, &id[..7]), (blk::VIRTIO_BLK_S_OK, &b"root-0\0"[..]));
    assert_eq!(rig.transport.with_device(|d| d.dirty_bytes()), BLOCK as u64);
}

#[test]
fn configuration_tells_size_and_limits() {
    let rig = Rig::new(disk(&[1; 1000], None, u64::MAX));
    let field = |at, len| {
        let mut bytes = rig.guest.config(at, len);
        bytes.resize(8, 0);
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    assert_eq!(field(0, 8), 2, "capacity in sectors, rounded up");
    assert_eq!(field(12, 4), 254, "most segments");
    assert_eq!(field(20, 4), 512, "block size");
    assert_eq!(field(24, 1), 3, "physical block of 4 KiB");
    assert_eq!(field(60, 4), 0);
    assert_eq!(rig.guest.config(u64::MAX - 0x200, 4), [0; 4]);
}

#[test]
fn what_cannot_be_done_gets_an_error_status() {
    let mut rig = Rig::new(disk(&pattern(4 * BLOCK), None, 0));
    let (io, unsupported) = (blk::VIRTIO_BLK_S_IOERR, blk::VIRTIO_BLK_S_UNSUPP);
    let seg = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let out = blk::VIRTIO_BLK_T_OUT;
    for (kind, sector, data, room, expected) in [
        (blk::VIRTIO_BLK_T_IN, 32, vec![], vec![512], io),
        (blk::VIRTIO_BLK_T_IN, 31, vec![], vec![1024], io),
        (blk::VIRTIO_BLK_T_IN, u64::MAX, vec![], vec![512], io),
        (blk::VIRTIO_BLK_T_IN, u64::MAX / 512, vec![], vec![512], io),
        (blk::VIRTIO_BLK_T_IN, 0, vec![], vec![511], io),
        (blk::VIRTIO_BLK_T_IN, 0, vec![], vec![], io),
        (out, 0, vec![0; 512], vec![], io),
        (out, 32, vec![0; 512], vec![], io),
        (blk::VIRTIO_BLK_T_DISCARD, 0, vec![0; 15], vec![], io),
        (blk::VIRTIO_BLK_T_DISCARD, 0, seg(0, 8, 1), vec![], unsupported),
        (blk::VIRTIO_BLK_T_DISCARD, 0, seg(0, u32::MAX, 0), vec![], io),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, seg(31, 2, 0), vec![], io),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, seg(0, 8, 2), vec![], unsupported),
        (blk::VIRTIO_BLK_T_SECURE_ERASE, 0, seg(0, 8, 0), vec![], unsupported),
        (777, 0, vec![], vec![], unsupported),
    ] {
        let (status, _) = rig.request(kind, sector, &[&data], &room);
        assert_eq!(status, expected, "{kind} {sector} {room:?}");
    }
    let (status, _) = rig.request(blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, &[&seg(0, 8, 1)], &[]);
    assert_eq!(status, blk::VIRTIO_BLK_S_OK);
    let (_, data) = rig.request(blk::VIRTIO_BLK_T_IN, 0, &[], &[BLOCK]);
    assert_eq!(data, vec![0; BLOCK]);
}

#[test]
fn read_only_disk_refuses_writes_and_says_so() {
    let config = DiskConfig {
        base: Some(file(&pattern(BLOCK))),
        size: None,
        read_only: true,
        layer_quota: 0,
    };
    let mut rig = Rig::new(Disk::new(config).unwrap());
    let features = rig.transport.with_device(|d| d.features());
    assert_ne!(features & 1 << blk::VIRTIO_BLK_F_RO, 0);
    assert_eq!(features & 1 << blk::VIRTIO_BLK_F_DISCARD, 0);
    let (status, _) = rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[&[1; 512]], &[]);
    assert_eq!(status, blk::VIRTIO_BLK_S_IOERR);
    let (status, _) = rig.request(blk::VIRTIO_BLK_T_DISCARD, 0, &[&[0; 16]], &[]);
    assert_eq!(status, blk::VIRTIO_BLK_S_UNSUPP);
    let (status, data) = rig.request(blk::VIRTIO_BLK_T_IN, 0, &[], &[BLOCK]);
    assert_eq!((status, data), (blk::VIRTIO_BLK_S_OK, pattern(BLOCK)));
}

#[test]
fn long_queue_is_worked_off_in_turns() {
    let mut rig = Rig::new(disk(&[], Some(1 << 20), u64::MAX));
    let header = [0; 16];
    // One call moves 4 MiB; the queue holds more.
    let mut chains = 0;
    while rig.guest.submit(0, &[&header], &[SLOT - 1023]).is_some() {
        chains += 1;
    }
    // A header of zeroes is a read from sector 0, here of 79 KiB each, with the status in the same buffer.
    rig.guest.notify(0);
    rig.transport.process_pending();
    let first = std::iter::from_fn(|| rig.guest.take_used(0)).count();
    assert!(first > 0 && first < chains && rig.transport.has_pending());
    rig.run();
    let rest = std::iter::from_fn(|| rig.guest.take_used(0)).count();
    assert_eq!(first + rest, chains);
}

#[test]
fn restored_device_serves_the_same_disk() {
    let base = pattern(4 * BLOCK);
    let mut rig = Rig::new(disk(&base, None, u64::MAX));
    rig.request(blk::VIRTIO_BLK_T_OUT, 2, &[&[9; 512]], &[]);
    let state = rig.transport.save();
    let (layer, data) = rig.transport.with_device(|d| {
        let mut data = Vec::new();
        d.disk().write_layer(&mut data).unwrap();
        (d.disk().layer_state(), data)
    });
    let counter = Arc::new(Counter::default());
    let device = Block::new(disk(&base, None, u64::MAX), &BlockConfig::default());
    let transport = MmioTransport::new(device, rig.guest.mem.clone(), counter.clone(), counter);
    transport.restore(&state).unwrap();
    transport.with_device(|d| d.disk_mut().read_layer(&layer, &mut data.as_slice())).unwrap();
    let mut guest = Guest::new(rig.guest.mem.clone(), transport.front());
    guest.adopt(&mut rig.guest, transport.front());
    let mut restored = Rig { transport, guest };
    assert_eq!(restored.transport.save(), state);
    let (status, data) = restored.request(blk::VIRTIO_BLK_T_IN, 2, &[], &[512]);
    assert_eq!((status, data), (blk::VIRTIO_BLK_S_OK, vec![9; 512]));
    let (_, id) = restored.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[], &[20]);
    assert_eq!(&id[..6], b"root-0");
}

#[test]
fn state_of_another_disk_is_refused() {
    let mut device = Block::new(disk(&[], Some(4096), 0), &BlockConfig::default());
    for state in [
        DeviceState::Rng(Default::default()),
        DeviceState::Block(BlockState { size: 8192, read_only: false, id: vec![0; 20] }),
        DeviceState::Block(BlockState { size: 4096, read_only: true, id: vec![0; 20] }),
        DeviceState::Block(BlockState { size: 4096, read_only: false, id: vec![0; 21] }),
    ] {
        let error = device.restore(&state).unwrap_err();
        assert!(matches!(error, RestoreError::Invalid(_) | RestoreError::WrongDevice { .. }));
    }
}
