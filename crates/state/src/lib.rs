//! Versioned, checksummed save format.
//!
//! State is saved as an envelope of *sections*. Each section is one saved type of one owner: a tag
//! says which, a version says in which shape, and the payload is the type in postcard's encoding.
//! The envelope has a version of its own and a checksum over everything.
//!
//! ```text
//! offset  size  what
//!      0     8  magic: "FORKD\r\n\x1a"
//!      8     2  format version, 1
//!     10     2  number of sections, at most 256
//!     12        sections, one after the other:
//!                 0  4  tag
//!                 4  2  section version
//!                 6  2  zero
//!                 8  4  length of the payload in bytes
//!                12     payload
//!    end     4  CRC-32 (IEEE 802.3) of all before it
//! ```
//!
//! All numbers are little-endian. The magic's line ends tell a transfer that altered them, as PNG's
//! does.
//!
//! Rules for saved types: they are not runtime types; a change of shape is a new type with the next
//! version; a reader asks [`Reader::version`] and reads the type of that version. What is newer than
//! the reader knows is refused, naming both versions.
//!
//! The bytes may be hostile: a [`Reader`] takes no length from them on trust, and allocates nothing
//! before the checksum holds. The checksum is against accidents, not against forgers, so decoding
//! must stand anything as well: postcard never allocates more than the payload can fill. Keep
//! recursive types, and sequences of zero-sized ones, out of saved types: those a forger could make
//! deep or long.
#![forbid(unsafe_code)]

mod error;
mod reader;
mod writer;

pub use error::StateError;
pub use reader::Reader;
pub use writer::Writer;

/// What a file begins with.
pub const MAGIC: [u8; 8] = *b"FORKD\r\n\x1a";
/// Version of the envelope.
pub const FORMAT_VERSION: u16 = 1;
/// Most sections of a file.
pub const MAX_SECTIONS: usize = 256;
/// Most bytes of a file: far above what any state needs, far below what hurts.
pub const MAX_LEN: usize = 256 << 20;

const HEADER_LEN: usize = 12;
const SECTION_HEADER_LEN: usize = 12;
const CHECKSUM_LEN: usize = 4;

/// Names a section: four characters, as in `Tag::new(b"VCPU")`, and an index for owners that there
/// are several of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u32);

impl Tag {
    /// The tag that reads so in a dump of the file.
    pub const fn new(name: &[u8; 4]) -> Self {
        Self(u32::from_le_bytes(*name))
    }

    /// The tag of the `index`th of several owners: three characters, and the index as the fourth.
    pub const fn indexed(name: &[u8; 3], index: u8) -> Self {
        Self(u32::from_le_bytes([name[0], name[1], name[2], index]))
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.to_le_bytes().escape_ascii())
    }
}

impl std::fmt::Debug for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tag({self})")
    }
}

#[cfg(test)]
mod tests;
