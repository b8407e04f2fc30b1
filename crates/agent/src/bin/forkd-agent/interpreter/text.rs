//! Output of an interpreter as text: UTF-8 whose characters may be split between reads.

/// Bytes of a character that has not arrived as a whole.
#[derive(Debug, Default)]
pub struct Decoder {
    rest: Vec<u8>,
}

impl Decoder {
    /// Text of what has arrived; the beginning of a character at its end is kept for the next.
    /// Bytes that are no UTF-8 become U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.rest);
        all.extend_from_slice(bytes);
        let cut = all.len() - incomplete_tail(&all);
        self.rest = all.split_off(cut);
        match String::from_utf8(all) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        }
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned()
    }
}

/// Bytes at the end that begin a character but do not end it: 0 to 3.
fn incomplete_tail(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let byte = bytes[bytes.len() - back];
        let len = match byte {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            0x80..=0xbf => continue,
            _ => return 0,
        };
        return if len > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_survives_any_split(text in "\\PC{0,40}", cut in 1usize..7) {
            let mut decoder = Decoder::default();
            let mut got = String::new();
            for piece in text.as_bytes().chunks(cut) {
                got += &decoder.push(piece);
            }
            got += &decoder.finish();
            prop_assert_eq!(got, text);
        }

        #[test]
        fn little_is_kept(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            prop_assert!(decoder.rest.len() < 4);
        }
    }

    #[test]
    fn what_is_no_utf8_is_replaced() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"a\xffb\xe2\x82"), "a\u{fffd}b");
        assert_eq!(decoder.finish(), "\u{fffd}");
        assert_eq!(decoder.finish(), "");
    }
}
