//! The earlier states of a machine of which there are, or may be, durable snapshots: what a diff can be over.

use forkd_snapshot::{Digest, Parent};

/// So many are known: others may be removed meanwhile.
const MOST: usize = 16;

/// An earlier state of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forebear {
    /// A durable snapshot.
    Snapshot(Parent),
    /// A zygote was forked off then. It may have become durable since, which nobody tells this process: what has the tag
    /// in a store is it, if it names the same instant.
    Zygote {
        /// Its tag.
        tag: String,
        /// Random.
        instant: Digest,
    },
}

/// All of them. Forked children inherit it: the past of their source is theirs.
#[derive(Debug, Default)]
pub struct Past {
    /// The last first, and at the end the first.
    all: Vec<Forebear>,
}

impl Past {
    /// There is another one, of now.
    pub fn add(&mut self, forebear: Forebear) {
        self.all.insert(0, forebear);
        if self.all.len() > MOST {
            // The first is what the machine was loaded from, if it was: that stays longest.
            self.all.remove(MOST - 1);
        }
    }

    /// These are not there any more.
    pub fn forget(&mut self, gone: &[Forebear]) {
        self.all.retain(|forebear| !gone.contains(forebear));
    }

    /// The last first.
    pub fn iter(&self) -> impl Iterator<Item = &Forebear> {
        self.all.iter()
    }

    /// The instant at which the last zygote of a tag was forked off.
    pub fn instant_of(&self, wanted: &str) -> Option<Digest> {
        self.all.iter().find_map(|forebear| match forebear {
            Forebear::Zygote { tag, instant } if tag == wanted => Some(*instant),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zygote(tag: &str, number: u8) -> Forebear {
        Forebear::Zygote { tag: tag.to_owned(), instant: Digest([number; 32]) }
    }

    #[test]
    fn the_first_and_the_last_stay() {
        let mut past = Past::default();
        let numbers = 0..40;
        numbers.clone().for_each(|number| past.add(zygote("z", number)));
        let kept: Vec<_> = past.iter().cloned().collect();
        let expected = numbers.rev().take(MOST - 1).chain([0]);
        assert_eq!(kept, expected.map(|number| zygote("z", number)).collect::<Vec<_>>());
        past.forget(&kept[1..]);
        assert_eq!(past.iter().collect::<Vec<_>>(), [&zygote("z", 39)]);
    }

    #[test]
    fn of_a_tag_that_was_used_again_it_is_the_last() {
        let mut past = Past::default();
        [("a", 1), ("b", 2), ("a", 3)].iter().for_each(|(tag, n)| past.add(zygote(tag, *n)));
        assert_eq!(past.instant_of("a"), Some(Digest([3; 32])));
        assert_eq!(past.instant_of("b"), Some(Digest([2; 32])));
        assert_eq!(past.instant_of("c"), None);
    }
}
