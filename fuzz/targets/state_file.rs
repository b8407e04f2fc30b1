//! Arbitrary bytes as a state file: as they are, and with a checksum that fits, as a forger's has.
//!
//! Each section is read as every type that forkd saves, and as one that has every shape that saved
//! types are made of. What must hold: nothing panics and nothing is allocated on a forged length's
//! word; a value that is decoded can be saved and read back the same.
#![no_main]

use forkd_devices::virtio::DeviceState;
use forkd_devices::virtio::block::LayerState;
use forkd_devices::virtio::mmio::TransportState;
use forkd_vm::{VcpuState, VmState};

use forkd_state::{Reader, Tag, Writer};
use libfuzzer_sys::fuzz_target;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Every shape that saved types are made of.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shape {
    Unit,
    Numbers(u8, u16, u32, u64, i64, bool),
    Text { text: String, letter: char },
    Lists(Vec<u8>, Vec<(u32, u64)>, Vec<Option<String>>),
    Fixed([u64; 8], Box<[u16; 3]>),
}

fuzz_target!(|data: &[u8]| {
    read(data);
    if let Some(body) = data.len().checked_sub(4) {
        let mut forged = data.to_vec();
        let checksum = crc32fast::hash(&forged[..body]);
        forged[body..].copy_from_slice(&checksum.to_le_bytes());
        read(&forged);
    }
});

fn read(bytes: &[u8]) {
    let Ok(reader) = Reader::parse(bytes) else { return };
    for tag in reader.tags() {
        let version = reader.version(tag).expect("a tag that is listed has a version");
        through::<Vec<Shape>>(&reader, tag, version);
        through::<VcpuState>(&reader, tag, version);
        through::<VmState>(&reader, tag, version);
        through::<DeviceState>(&reader, tag, version);
        through::<TransportState>(&reader, tag, version);
        through::<LayerState>(&reader, tag, version);
        if version < u16::MAX {
            assert!(reader.section::<Vec<Shape>>(tag, version + 1).is_err());
        }
    }
}

/// Decodes a section, saves the value, reads it back, and saves it again: the same bytes.
fn through<T: Serialize + DeserializeOwned>(reader: &Reader<'_>, tag: Tag, version: u16) {
    let save = |value: &T| {
        let writer = Writer::new().section(tag, version, value).expect("what was decoded saves");
        writer.finish()
    };
    let Ok(value) = reader.section::<T>(tag, version) else { return };
    let saved = save(&value);
    let again = Reader::parse(&saved).expect("what was written is sound");
    let value = again.section::<T>(tag, version).expect("what was saved decodes");
    assert_eq!(save(&value), saved);
}
