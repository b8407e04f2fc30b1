//! Bytes in, values out.

use serde::de::DeserializeOwned;

use crate::{
    CHECKSUM_LEN, FORMAT_VERSION, MAGIC, MAX_LEN, MAX_SECTIONS, SECTION_HEADER_LEN, StateError, Tag,
};

/// One section.
#[derive(Debug, Clone, Copy)]
struct Section<'a> {
    tag: Tag,
    version: u16,
    payload: &'a [u8],
}

/// A state file whose envelope is sound.
#[derive(Debug)]
pub struct Reader<'a> {
    sections: Vec<Section<'a>>,
}

/// What is left to be read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) =
            self.0.split_at_checked(len).ok_or(StateError::Damaged("it ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (taken, rest) =
            self.0.split_first_chunk().ok_or(StateError::Damaged("it ends too early"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, StateError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, StateError> {
        self.array().map(u32::from_le_bytes)
    }
}

impl<'a> Reader<'a> {
    /// Checks the envelope: magic, version, checksum, and that sections fill it exactly.
    ///
    /// # Errors
    /// [`StateError`], of which the first that applies in that order.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        if bytes.len() > MAX_LEN {
            return Err(StateError::TooLong { len: bytes.len(), limit: MAX_LEN });
        }
        let mut input = Input(bytes.strip_prefix(&MAGIC).ok_or(StateError::NotState)?);
        let found = input.u16()?;
        if found != FORMAT_VERSION {
            return Err(StateError::FormatVersion { found, supported: FORMAT_VERSION });
        }
        let count = usize::from(input.u16()?);
        let (body, checksum) = input
            .0
            .split_last_chunk::<CHECKSUM_LEN>()
            .ok_or(StateError::Damaged("it ends too early"))?;
        let stored = u32::from_le_bytes(*checksum);
        let computed = crc32fast::hash(&bytes[..bytes.len() - CHECKSUM_LEN]);
        if stored != computed {
            return Err(StateError::Checksum { stored, computed });
        }
        if count > MAX_SECTIONS {
            return Err(StateError::TooManySections { limit: MAX_SECTIONS });
        }
        // Do not even reserve what cannot be there.
        let mut sections = Vec::with_capacity(count.min(body.len() / SECTION_HEADER_LEN));
        let mut input = Input(body);
        for _ in 0..count {
            let section = read_section(&mut input)?;
            if sections.iter().any(|other: &Section<'_>| other.tag == section.tag) {
                return Err(StateError::Duplicate(section.tag));
            }
            sections.push(section);
        }
        if !input.0.is_empty() {
            return Err(StateError::Damaged("it goes on behind its last section"));
        }
        Ok(Self { sections })
    }

    /// Whether there is such a section.
    pub fn has(&self, tag: Tag) -> bool {
        self.find(tag).is_ok()
    }

    /// Version of a section, to choose the type to read; `None` if it is not there.
    pub fn version(&self, tag: Tag) -> Option<u16> {
        self.find(tag).ok().map(|section| section.version)
    }

    /// Tags of all sections, in order.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        self.sections.iter().map(|section| section.tag)
    }

    /// The value of a section, which must have exactly the version that `T` is the type of.
    ///
    /// # Errors
    /// [`StateError::Missing`], [`StateError::SectionTooNew`], [`StateError::SectionTooOld`],
    /// [`StateError::Decode`] and [`StateError::Trailing`].
    pub fn section<T: DeserializeOwned>(&self, tag: Tag, version: u16) -> Result<T, StateError> {
        let section = self.find(tag)?;
        let found = section.version;
        match found.cmp(&version) {
            std::cmp::Ordering::Greater => {
                return Err(StateError::SectionTooNew { tag, found, supported: version });
            }
            std::cmp::Ordering::Less => {
                return Err(StateError::SectionTooOld { tag, found, wanted: version });
            }
            std::cmp::Ordering::Equal => {}
        }
        let (value, rest) = postcard::take_from_bytes(section.payload)
            .map_err(|error| StateError::Decode { tag, reason: error.to_string() })?;
        if !rest.is_empty() {
            return Err(StateError::Trailing { tag, extra: rest.len() });
        }
        Ok(value)
    }

    fn find(&self, tag: Tag) -> Result<&Section<'a>, StateError> {
        self.sections.iter().find(|section| section.tag == tag).ok_or(StateError::Missing(tag))
    }
}

fn read_section<'a>(input: &mut Input<'a>) -> Result<Section<'a>, StateError> {
    let tag = Tag(input.u32()?);
    let version = input.u16()?;
    if input.u16()? != 0 {
        return Err(StateError::Damaged("a reserved field is not zero"));
    }
    let len = usize::try_from(input.u32()?)
        .map_err(|_| StateError::Damaged("a section is longer than memory"))?;
    Ok(Section { tag, version, payload: input.take(len)? })
}
