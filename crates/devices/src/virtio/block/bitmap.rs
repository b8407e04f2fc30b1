//! A fixed number of bits, with runs.

/// Bits, all clear at first.
#[derive(Debug, Clone)]
pub(super) struct Bitmap {
    words: Vec<u64>,
    len: usize,
}

impl Bitmap {
    pub(super) fn new(len: usize) -> Self {
        // Zeroed memory that is not touched costs nothing.
        Self { words: vec![0; len.div_ceil(64)], len }
    }

    pub(super) fn get(&self, index: usize) -> bool {
        self.words.get(index / 64).is_some_and(|w| w >> (index % 64) & 1 != 0)
    }

    /// Sets or clears a bit, and returns what it was. Bits past the end stay clear.
    pub(super) fn replace(&mut self, index: usize, value: bool) -> bool {
        let old = self.get(index);
        if index < self.len
            && let Some(word) = self.words.get_mut(index / 64)
        {
            let mask = 1 << (index % 64);
            if value {
                *word |= mask;
            } else {
                *word &= !mask;
            }
        }
        old
    }

    /// The indices of set bits, ascending. Words without any are skipped.
    pub(super) fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().filter(|(_, w)| **w != 0).flat_map(|(i, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| i * 64 + bit)
        })
    }
}
