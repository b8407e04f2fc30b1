//! Header fields, in order, with names that compare without case.

use super::HttpError;

/// Header fields of one message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// The first field of that name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// All fields of that name, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// Adds a field. Bytes that could end the field (control characters) become spaces, so that a
    /// value cannot bring fields of its own; the same in the name become hyphens.
    pub fn push(&mut self, name: &str, value: &str) {
        let clean = |text: &str, bad: fn(char) -> bool, with: char| -> String {
            text.chars().map(|c| if bad(c) { with } else { c }).collect()
        };
        let name = clean(name, |c| !c.is_ascii_graphic() || c == ':', '-');
        let value = clean(value, |c| c.is_control() && c != '\t', ' ');
        self.0.push((name, value));
    }

    /// Adds a field, and returns itself: for chains.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.push(name, value);
        self
    }

    /// All fields.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a field that lists words separated by commas has one of them, without case.
    pub fn lists(&self, name: &str, word: &str) -> bool {
        self.get_all(name)
            .flat_map(|value| value.split(','))
            .any(|item| item.trim().eq_ignore_ascii_case(word))
    }

    pub(super) fn from_parsed(parsed: &[httparse::Header<'_>]) -> Result<Self, HttpError> {
        let mut headers = Vec::with_capacity(parsed.len());
        for header in parsed {
            let value = std::str::from_utf8(header.value)
                .map_err(|_| HttpError::Malformed("a header's value is not UTF-8"))?;
            headers.push((header.name.to_owned(), value.to_owned()));
        }
        Ok(Self(headers))
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for (name, value) in self.iter() {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_case_and_order_is_kept() {
        let headers = Headers::new().with("A", "1").with("b", "x, Y").with("a", "2");
        assert_eq!(headers.get("a"), Some("1"));
        assert_eq!(headers.get_all("A").collect::<Vec<_>>(), ["1", "2"]);
        assert!(headers.lists("B", "y") && !headers.lists("b", "z"));
    }

    #[test]
    fn values_cannot_smuggle_fields() {
        let headers = Headers::new().with("X:\r\nA", "v\r\nEvil: 1");
        let mut out = Vec::new();
        headers.encode(&mut out);
        assert_eq!(out, b"X---A: v  Evil: 1\r\n");
    }
}
