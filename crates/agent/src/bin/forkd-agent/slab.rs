//! Things by key, where a key of something gone never means something new.

/// Names a thing in a [`Slab`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    index: u32,
    generation: u32,
}

/// Generations fit a [`Key`]'s 48 bits of an epoll token.
const GENERATIONS: u32 = 1 << 16;

impl Key {
    /// As a number of 48 bits.
    pub const fn to_bits(self) -> u64 {
        (self.generation as u64) << 32 | self.index as u64
    }

    /// The inverse of [`Key::to_bits`]; higher bits are ignored.
    pub const fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 % GENERATIONS }
    }
}

struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

/// A set of things with keys.
pub struct Slab<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new(), len: 0 }
    }
}

impl<T> Slab<T> {
    /// Number of things.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Adds a thing.
    pub fn insert(&mut self, value: T) -> Key {
        self.len += 1;
        if let Some(index) = self.free.pop()
            && let Some(entry) = self.entries.get_mut(index as usize)
        {
            entry.value = Some(value);
            return Key { index, generation: entry.generation };
        }
        let index = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        self.entries.push(Entry { generation: 0, value: Some(value) });
        Key { index, generation: 0 }
    }

    /// Takes a thing out.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        if entry.generation != key.generation {
            return None;
        }
        let value = entry.value.take()?;
        entry.generation = (entry.generation + 1) % GENERATIONS;
        self.free.push(key.index);
        self.len -= 1;
        Some(value)
    }

    /// A thing.
    pub fn get(&self, key: Key) -> Option<&T> {
        let entry = self.entries.get(key.index as usize)?;
        (entry.generation == key.generation).then_some(entry.value.as_ref()).flatten()
    }

    /// A thing, to change.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        (entry.generation == key.generation).then_some(entry.value.as_mut()).flatten()
    }

    /// All things.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        (0..).zip(&self.entries).filter_map(|(index, entry)| {
            let key = Key { index, generation: entry.generation };
            entry.value.as_ref().map(|value| (key, value))
        })
    }

    /// All keys, so that the slab can change while they are used.
    pub fn keys(&self) -> Vec<Key> {
        self.iter().map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_keys_find_nothing() {
        let mut slab = Slab::default();
        let a = slab.insert('a');
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert_eq!((slab.remove(a), slab.get(a), slab.get(b)), (None, None, Some(&'b')));
        assert_eq!((slab.len(), slab.keys()), (1, vec![b]));
        assert_eq!(Key::from_bits(b.to_bits()), b);
    }
}
