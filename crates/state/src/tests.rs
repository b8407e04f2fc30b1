use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::*;

const ONE: Tag = Tag::new(b"ONE ");
const TWO: Tag = Tag::indexed(b"TWO", 2);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Saved {
    number: u64,
    name: String,
    list: Vec<Option<i16>>,
    bytes: [u8; 4],
}

fn saved() -> impl Strategy<Value = Saved> {
    let list = proptest::collection::vec(any::<Option<i16>>(), 0..20);
    (any::<u64>(), ".{0,20}", list, any::<[u8; 4]>())
        .prop_map(|(number, name, list, bytes)| Saved { number, name, list, bytes })
}

fn file(value: &Saved) -> Vec<u8> {
    let writer = Writer::new().section(ONE, 3, value).expect("one");
    writer.section(TWO, 1, &(value.number, value.bytes)).expect("two").finish()
}

/// Recomputes the checksum, as a forger would.
fn reseal(bytes: &mut [u8]) {
    let body = bytes.len() - CHECKSUM_LEN;
    let checksum = crc32fast::hash(&bytes[..body]);
    bytes[body..].copy_from_slice(&checksum.to_le_bytes());
}

proptest! {
    #[test]
    fn what_is_written_is_read(value in saved()) {
        let bytes = file(&value);
        let reader = Reader::parse(&bytes).expect("sound");
        prop_assert_eq!(reader.tags().collect::<Vec<_>>(), [ONE, TWO]);
        prop_assert_eq!(reader.version(ONE), Some(3));
        let two: (u64, [u8; 4]) = reader.section(TWO, 1).expect("two");
        prop_assert_eq!(two, (value.number, value.bytes));
        prop_assert_eq!(reader.section::<Saved>(ONE, 3).expect("one"), value);
    }

    #[test]
    fn any_flipped_bit_is_an_error(value in saved(), at: prop::sample::Index, bit in 0u8..8) {
        let mut bytes = file(&value);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(Reader::parse(&bytes).is_err());
    }

    #[test]
    fn any_truncation_or_extension_is_an_error(value in saved(), at: prop::sample::Index, more: u8) {
        let mut bytes = file(&value);
        prop_assert!(Reader::parse(&bytes[..at.index(bytes.len())]).is_err());
        bytes.push(more);
        prop_assert!(Reader::parse(&bytes).is_err());
    }

    #[test]
    fn garbage_is_an_error_and_no_panic(garbage: Vec<u8>, behind_magic: bool) {
        let mut bytes = if behind_magic { file(&Saved {
            number: 1, name: String::new(), list: vec![], bytes: [0; 4],
        })[..HEADER_LEN].to_vec() } else { Vec::new() };
        bytes.extend_from_slice(&garbage);
        if bytes.len() > CHECKSUM_LEN {
            reseal(&mut bytes);
        }
        if let Ok(reader) = Reader::parse(&bytes) {
            for tag in reader.tags().collect::<Vec<_>>() {
                let version = reader.version(tag).unwrap_or(0);
                // Only that it comes back matters.
                drop(reader.section::<Saved>(tag, version));
            }
        }
    }

    #[test]
    fn forged_bytes_are_decoded_or_refused(value in saved(), at: prop::sample::Index, byte: u8) {
        let mut bytes = file(&value);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        reseal(&mut bytes);
        if let Ok(reader) = Reader::parse(&bytes) {
            drop(reader.section::<Saved>(ONE, 3));
            drop(reader.section::<(u64, [u8; 4])>(TWO, 1));
        }
    }
}

/// The format as it is on disk. If this fails, the format has changed: give it a new version.
#[test]
fn golden_file_of_version_1() {
    let bytes = Writer::new()
        .section(Tag::new(b"VCPU"), 7, &(1u8, 0x1234u16, "ab"))
        .and_then(|writer| writer.section(Tag(0x0102_0304), 1, &()))
        .expect("a file")
        .finish();
    let golden = [
        b"FORKD\r\n\x1a\x01\x00\x02\x00".as_slice(),
        b"VCPU\x07\x00\x00\x00\x06\x00\x00\x00",
        b"\x01\xb4\x24\x02ab",
        b"\x04\x03\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00",
    ]
    .concat();
    assert_eq!(&bytes[..bytes.len() - CHECKSUM_LEN], golden);
    let checksum = crc32fast::hash(&golden).to_le_bytes();
    assert_eq!(&bytes[bytes.len() - CHECKSUM_LEN..], checksum);
}

#[test]
fn newer_versions_are_refused_naming_both() {
    let mut bytes = Writer::new().section(ONE, 5, &1u8).expect("one").finish();
    let reader = Reader::parse(&bytes).expect("sound");
    let error = reader.section::<u8>(ONE, 4).expect_err("too new");
    assert_eq!(error, StateError::SectionTooNew { tag: ONE, found: 5, supported: 4 });
    assert!(error.to_string().contains('5') && error.to_string().contains('4'), "{error}");
    assert!(matches!(reader.section::<u8>(ONE, 6), Err(StateError::SectionTooOld { .. })));
    bytes[8] = 2;
    reseal(&mut bytes);
    let error = Reader::parse(&bytes).expect_err("too new");
    assert_eq!(error, StateError::FormatVersion { found: 2, supported: 1 });
}

#[test]
fn sections_are_told_apart() {
    let bytes = Writer::new().section(ONE, 1, &(1u8, 2u8)).expect("one").finish();
    let reader = Reader::parse(&bytes).expect("sound");
    assert_eq!(reader.section::<u8>(TWO, 1), Err(StateError::Missing(TWO)));
    assert_eq!(reader.section::<u8>(ONE, 1), Err(StateError::Trailing { tag: ONE, extra: 1 }));
    assert!(matches!(reader.section::<[u8; 3]>(ONE, 1), Err(StateError::Decode { .. })));
    assert!(reader.has(ONE) && !reader.has(TWO));
    let twice = Writer::new().section(ONE, 1, &1u8).expect("one").section(ONE, 2, &2u8);
    assert_eq!(twice.map(drop), Err(StateError::Duplicate(ONE)));
    assert_eq!(ONE.to_string(), "ONE ");
    assert_eq!(TWO.to_string(), "TWO\\x02");
}

#[test]
fn a_forged_length_allocates_nothing() {
    // A list of 2^63 entries, in a payload of a dozen bytes.
    let huge = (u64::MAX >> 1, 0u8);
    let bytes = Writer::new().section(ONE, 1, &huge).expect("one").finish();
    let reader = Reader::parse(&bytes).expect("sound");
    assert!(matches!(reader.section::<Vec<u64>>(ONE, 1), Err(StateError::Decode { .. })));
    assert!(matches!(reader.section::<String>(ONE, 1), Err(StateError::Decode { .. })));
}

#[test]
fn the_number_of_sections_is_bounded() {
    let mut writer = Writer::new();
    for index in 0..MAX_SECTIONS {
        writer.add(Tag(index as u32), 1, &()).expect("a section");
    }
    let over = writer.add(Tag(u32::MAX), 1, &());
    assert_eq!(over, Err(StateError::TooManySections { limit: MAX_SECTIONS }));
    let mut bytes = writer.finish();
    assert_eq!(Reader::parse(&bytes).expect("sound").tags().count(), MAX_SECTIONS);
    bytes[10..12].copy_from_slice(&u16::MAX.to_le_bytes());
    reseal(&mut bytes);
    assert!(matches!(Reader::parse(&bytes), Err(StateError::TooManySections { .. })));
}
