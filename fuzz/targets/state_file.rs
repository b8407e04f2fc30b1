//! Arbitrary bytes as a state file: as they are, and with a checksum that fits, as a forger's has.
//!
//! What must hold: nothing panics and nothing is allocated on a forged length's word; a value that
//! is decoded can be saved and read back the same.
#![no_main]

use forkd_state::{Reader, Writer};
use libfuzzer_sys::fuzz_target;
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
        if let Ok(value) = reader.section::<Vec<Shape>>(tag, version) {
            let saved = Writer::new().section(tag, version, &value).expect("it was saved once");
            let saved = saved.finish();
            let again = Reader::parse(&saved).expect("what was written is sound");
            assert_eq!(again.section::<Vec<Shape>>(tag, version).as_ref(), Ok(&value));
        }
        if version < u16::MAX {
            assert!(reader.section::<Vec<Shape>>(tag, version + 1).is_err());
        }
    }
}
