//! Why state could not be written or read.

use crate::Tag;

/// State cannot be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not a state file.
    #[error("this is no forkd state: it does not begin with the magic bytes")]
    NotState,
    /// The envelope is of a later version.
    #[error(
        "the state's format version is {found}, this forkd reads {supported}: a newer forkd wrote it"
    )]
    FormatVersion {
        /// Version of the file.
        found: u16,
        /// Version of this reader.
        supported: u16,
    },
    /// Ends too early, or goes on behind its end.
    #[error("the state is damaged: {0}")]
    Damaged(&'static str),
    /// The checksum does not match.
    #[error("the state is damaged: its checksum is {computed:#010x}, and it says {stored:#010x}")]
    Checksum {
        /// What the file says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// Too long to be read or written.
    #[error("{len} bytes of state are more than the limit of {limit}")]
    TooLong {
        /// Length in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many sections.
    #[error("more than {limit} sections of state")]
    TooManySections {
        /// The limit.
        limit: usize,
    },
    /// Two sections have the same tag.
    #[error("two sections of state are called {0}")]
    Duplicate(Tag),
    /// A section is not there.
    #[error("the state has no section {0}")]
    Missing(Tag),
    /// A section's version is later than the reader knows.
    #[error(
        "section {tag} has version {found}, this forkd reads up to {supported}: a newer forkd wrote it"
    )]
    SectionTooNew {
        /// The section.
        tag: Tag,
        /// Version of the section.
        found: u16,
        /// Version asked for.
        supported: u16,
    },
    /// A section's version is earlier than what was asked for.
    #[error("section {tag} has version {found}, and version {wanted} was asked for")]
    SectionTooOld {
        /// The section.
        tag: Tag,
        /// Version of the section.
        found: u16,
        /// Version asked for.
        wanted: u16,
    },
    /// A payload is not an encoding of the type.
    #[error("section {tag} cannot be decoded: {reason}")]
    Decode {
        /// The section.
        tag: Tag,
        /// What the decoder says.
        reason: String,
    },
    /// A payload goes on behind the value.
    #[error("section {tag} has {extra} bytes behind its value")]
    Trailing {
        /// The section.
        tag: Tag,
        /// How many.
        extra: usize,
    },
    /// A value cannot be encoded.
    #[error("section {tag} cannot be encoded: {reason}")]
    Encode {
        /// The section.
        tag: Tag,
        /// What the encoder says.
        reason: String,
    },
}
