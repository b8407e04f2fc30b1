//! BLAKE3 digests, and how the hash of a 2 MiB block is put together from its pages.
//!
//! The hash of a block is that of its 2 MiB as they read from the layer's file, where pages that the
//! layer does not hold, and what is behind the end of the file, count as zeroes. BLAKE3 is a tree
//! over chunks of 1 KiB, so each page is a subtree of its own: pages are hashed from the writer's
//! buffers in any order, and the block's hash follows from theirs without reading anything again.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use blake3::hazmat::{self, HasherExt, Mode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Unit of what a layer holds, in bytes. Not the host's page size, which the manifest records.
pub const PAGE_SIZE: u64 = 4096;
/// Unit of hashing, in bytes.
pub const BLOCK_SIZE: u64 = 2 << 20;
pub(crate) const PAGES_PER_BLOCK: usize = (BLOCK_SIZE / PAGE_SIZE) as usize;
pub(crate) const PAGE: usize = PAGE_SIZE as usize;

/// A BLAKE3 digest; 64 lower-case hex digits in text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Stands in the manifest where its own root will be, while that is computed.
    pub(crate) const ZERO: Self = Self([0; 32]);

    /// Of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Not 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no digest: it is not 64 lower-case hex digits")]
pub struct NotADigest(String);

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let bad = || NotADigest(text.to_string());
        // from_hex takes capitals too; one digest must have one spelling.
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        blake3::Hash::from_hex(text).map(|hash| Self(*hash.as_bytes())).map_err(|_| bad())
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hash of a page as a subtree of its block.
pub(crate) type PageHash = [u8; 32];

/// Hashes the page that is number `index` of its block.
pub(crate) fn page_hash(index: usize, page: &[u8]) -> PageHash {
    blake3::Hasher::new()
        .set_input_offset(index as u64 * PAGE_SIZE)
        .update(page)
        .finalize_non_root()
}

/// Which pages of a block are meant, one bit a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageSet([u64; PAGES_PER_BLOCK / 64]);

impl PageSet {
    pub(crate) fn has(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 == 1
    }

    pub(crate) fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    pub(crate) fn insert_all(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(word, more)| *word |= more);
    }

    pub(crate) fn remove(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; PAGES_PER_BLOCK / 64]
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0 == [u64::MAX; PAGES_PER_BLOCK / 64]
    }

    /// Whether any of `count` pages from `first` on is in the set. `first` is a multiple of `count`,
    /// which is a power of two.
    fn touches(&self, first: usize, count: usize) -> bool {
        if count >= 64 {
            return self.0[first / 64..(first + count) / 64].iter().any(|word| *word != 0);
        }
        self.0[first / 64] >> (first % 64) & ((1 << count) - 1) != 0
    }
}

/// The hash of a block of which `data` pages are given by `hash_of`, and the others are zero.
pub(crate) fn block_hash(data: &PageSet, hash_of: &impl Fn(usize) -> PageHash) -> Digest {
    let half = PAGES_PER_BLOCK / 2;
    let left = subtree(data, hash_of, 0, half);
    let right = subtree(data, hash_of, half, half);
    Digest(*hazmat::merge_subtrees_root(&left, &right, Mode::Hash).as_bytes())
}

fn subtree(
    data: &PageSet,
    hash_of: &impl Fn(usize) -> PageHash,
    first: usize,
    count: usize,
) -> PageHash {
    if !data.touches(first, count) {
        return zero_subtree(first, count);
    }
    if count == 1 {
        return hash_of(first);
    }
    let half = count / 2;
    let left = subtree(data, hash_of, first, half);
    let right = subtree(data, hash_of, first + half, half);
    hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash)
}

/// Hash of `count` zero pages from `first` on: it depends on where in the block they are.
fn zero_subtree(first: usize, count: usize) -> PageHash {
    static LEVELS: OnceLock<Vec<Vec<PageHash>>> = OnceLock::new();
    let levels = LEVELS.get_or_init(|| {
        let zeroes = [0; PAGE];
        let mut levels: Vec<Vec<PageHash>> =
            vec![(0..PAGES_PER_BLOCK).map(|index| page_hash(index, &zeroes)).collect()];
        while let Some(below) = levels.last().filter(|level| level.len() > 2) {
            let pairs = below.chunks_exact(2);
            let merge = |p: &[PageHash]| hazmat::merge_subtrees_non_root(&p[0], &p[1], Mode::Hash);
            levels.push(pairs.map(merge).collect());
        }
        levels
    });
    levels[count.trailing_zeros() as usize][first / count]
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In strides, so that the compiler makes vectors of the inner loop and the outer can stop early.
    bytes.chunks(256).all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_block_from_its_pages_is_blake3_of_its_bytes(
            pages in proptest::collection::btree_map(0..PAGES_PER_BLOCK, 1u8.., 0..30),
            all: bool,
        ) {
            let mut block = vec![0; BLOCK_SIZE as usize];
            let mut data = PageSet::default();
            for index in 0..PAGES_PER_BLOCK {
                let byte = match pages.get(&index) {
                    Some(byte) => *byte,
                    None if all => 7,
                    None => continue,
                };
                data.insert(index);
                block[index * PAGE + index..][..100].fill(byte);
            }
            let of = |index: usize| page_hash(index, &block[index * PAGE..][..PAGE]);
            prop_assert_eq!(data.is_full(), all || pages.len() == PAGES_PER_BLOCK);
            prop_assert_eq!(block_hash(&data, &of), Digest::of(&block));
        }
    }

    #[test]
    fn zero_is_told_from_nearly_zero() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page));
        for at in [0, 255, 256, PAGE - 1] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }

    #[test]
    fn a_digest_has_one_spelling() {
        let digest = Digest::of(b"x");
        let text = digest.to_string();
        assert_eq!(text.parse(), Ok(digest));
        assert!(text.to_uppercase().parse::<Digest>().is_err());
        assert!(text[1..].parse::<Digest>().is_err());
    }
}
