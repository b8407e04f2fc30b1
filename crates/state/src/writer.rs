//! Values in, bytes out.

use serde::Serialize;

use crate::{
    CHECKSUM_LEN, FORMAT_VERSION, HEADER_LEN, MAGIC, MAX_LEN, MAX_SECTIONS, SECTION_HEADER_LEN,
    StateError, Tag,
};

/// Builds a state file, section by section.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    tags: Vec<Tag>,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// Without sections.
    pub fn new() -> Self {
        let mut bytes = Vec::with_capacity(4096);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0, 0]);
        debug_assert_eq!(bytes.len(), HEADER_LEN);
        Self { bytes, tags: Vec::new() }
    }

    /// Adds a section.
    ///
    /// # Errors
    /// [`StateError::Duplicate`], [`StateError::TooManySections`], [`StateError::TooLong`] and
    /// [`StateError::Encode`].
    pub fn section<T: Serialize + ?Sized>(
        mut self,
        tag: Tag,
        version: u16,
        value: &T,
    ) -> Result<Self, StateError> {
        self.add(tag, version, value)?;
        Ok(self)
    }

    /// Adds a section; for loops. After an error nothing of the section is there.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn add<T: Serialize + ?Sized>(
        &mut self,
        tag: Tag,
        version: u16,
        value: &T,
    ) -> Result<(), StateError> {
        if self.tags.contains(&tag) {
            return Err(StateError::Duplicate(tag));
        }
        if self.tags.len() == MAX_SECTIONS {
            return Err(StateError::TooManySections { limit: MAX_SECTIONS });
        }
        let payload = postcard::to_stdvec(value)
            .map_err(|error| StateError::Encode { tag, reason: error.to_string() })?;
        let whole = self.bytes.len() + SECTION_HEADER_LEN + payload.len() + CHECKSUM_LEN;
        let too_long = StateError::TooLong { len: whole, limit: MAX_LEN };
        if whole > MAX_LEN {
            return Err(too_long);
        }
        let len = u32::try_from(payload.len()).map_err(|_| too_long)?;
        self.bytes.extend_from_slice(&tag.0.to_le_bytes());
        self.bytes.extend_from_slice(&version.to_le_bytes());
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(&payload);
        self.tags.push(tag);
        Ok(())
    }

    /// The file.
    pub fn finish(mut self) -> Vec<u8> {
        // At most MAX_SECTIONS, which fits.
        let count = self.tags.len() as u16;
        self.bytes[HEADER_LEN - 2..HEADER_LEN].copy_from_slice(&count.to_le_bytes());
        let checksum = crc32fast::hash(&self.bytes);
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
        self.bytes
    }
}
