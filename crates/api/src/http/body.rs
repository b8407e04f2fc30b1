//! Where a body ends: by length, by chunks, or by the end of the stream (RFC 9112, sections 6, 7).

use super::{Headers, HttpError, Limits};

/// Longest line of a chunk's size with its extensions, and longest trailer section, in bytes.
const MAX_CHUNK_LINE: usize = 1024;

/// How a body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// This many bytes; 0 for no body.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
    /// Up to the end of the stream: responses only.
    UntilClose,
}

impl Framing {
    /// Of a message with these headers; `absent` if they do not say.
    pub(super) fn of(
        headers: &Headers,
        version_1_1: bool,
        absent: Framing,
    ) -> Result<Self, HttpError> {
        let mut lengths = headers.get_all("content-length");
        let length = lengths.next();
        if lengths.next().is_some() {
            return Err(HttpError::Malformed("it has more than one Content-Length"));
        }
        let mut codings = headers.get_all("transfer-encoding");
        let coding = codings.next();
        if let Some(second) = codings.next() {
            return Err(HttpError::TransferEncoding(second.to_owned()));
        }
        match (coding, length) {
            (Some(_), Some(_)) => {
                Err(HttpError::Malformed("it has both Transfer-Encoding and Content-Length"))
            }
            (Some(_), None) if !version_1_1 => {
                Err(HttpError::Malformed("HTTP/1.0 has no Transfer-Encoding"))
            }
            (Some(coding), None) if coding.trim().eq_ignore_ascii_case("chunked") => {
                Ok(Self::Chunked)
            }
            (Some(coding), None) => Err(HttpError::TransferEncoding(coding.to_owned())),
            (None, Some(length)) => parse_length(length).map(Self::Length),
            (None, None) => Ok(absent),
        }
    }
}

fn parse_length(text: &str) -> Result<u64, HttpError> {
    let text = text.trim_matches([' ', '\t']);
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(HttpError::Malformed("Content-Length is not a number"));
    }
    text.parse().map_err(|_| HttpError::Malformed("Content-Length is too large a number"))
}

/// Where in a chunked body we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// In the line that gives a chunk's size; the size so far, whether digits are over.
    Size { size: u64, digits: u32, extension: bool, line: usize },
    /// Behind the carriage return of that line.
    SizeEnd { size: u64 },
    /// In the data, with this much to go.
    Data(u64),
    /// Behind the data: CR, then LF.
    DataEnd { cr: bool },
    /// In the trailers: bytes in all so far, bytes of this line, whether its CR was seen.
    Trailer { total: usize, line: usize, cr: bool },
}

impl Chunk {
    const START: Self = Self::Size { size: 0, digits: 0, extension: false, line: 0 };
}

#[derive(Debug)]
enum State {
    Length(u64),
    Chunked(Chunk),
    UntilClose,
    Done,
}

/// Takes a body out of a stream.
#[derive(Debug)]
pub(super) struct BodyDecoder {
    state: State,
    /// Bytes that may still come, by the limit.
    allowed: u64,
    limit: u64,
}

impl BodyDecoder {
    pub(super) fn new(framing: Framing, limits: Limits) -> Result<Self, HttpError> {
        let limit = limits.body;
        let state = match framing {
            Framing::Length(length) if length > limit => {
                return Err(HttpError::BodyTooLarge { limit });
            }
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Chunked(Chunk::START),
            Framing::UntilClose => State::UntilClose,
        };
        Ok(Self { state, allowed: limit, limit })
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether the end of the stream is the body's end.
    pub(super) fn ends_with_stream(&self) -> bool {
        matches!(self.state, State::UntilClose | State::Done)
    }

    /// Takes what belongs to the body from the front of `input`, and appends what it decodes to.
    /// Returns how many bytes it took: all, unless the body is done.
    pub(super) fn decode(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, HttpError> {
        let mut taken = 0;
        while taken < input.len() {
            let rest = &input[taken..];
            taken += match &mut self.state {
                State::Done => break,
                State::UntilClose => {
                    let count = rest.len();
                    self.take(rest, out)?;
                    count
                }
                State::Length(left) => {
                    let count = count_within(rest, *left);
                    *left -= count as u64;
                    if *left == 0 {
                        self.state = State::Done;
                    }
                    self.take(&rest[..count], out)?;
                    count
                }
                State::Chunked(Chunk::Data(left)) => {
                    let count = count_within(rest, *left);
                    *left -= count as u64;
                    if *left == 0 {
                        self.state = State::Chunked(Chunk::DataEnd { cr: false });
                    }
                    self.take(&rest[..count], out)?;
                    count
                }
                State::Chunked(chunk) => {
                    let next = step(*chunk, rest[0])?;
                    if let Some(Chunk::Data(size)) = next
                        && size > self.allowed
                    {
                        return Err(HttpError::BodyTooLarge { limit: self.limit });
                    }
                    self.state = next.map_or(State::Done, State::Chunked);
                    1
                }
            };
        }
        Ok(taken)
    }

    fn take(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), HttpError> {
        let left = self.allowed.checked_sub(data.len() as u64);
        self.allowed = left.ok_or(HttpError::BodyTooLarge { limit: self.limit })?;
        out.extend_from_slice(data);
        Ok(())
    }
}

/// How many bytes of `data` are within the next `left`.
fn count_within(data: &[u8], left: u64) -> usize {
    usize::try_from(left).map_or(data.len(), |left| left.min(data.len()))
}

/// One byte of chunked framing; `None` at the end of the body.
fn step(chunk: Chunk, byte: u8) -> Result<Option<Chunk>, HttpError> {
    let next = match (chunk, byte) {
        (Chunk::Size { line, .. }, _) if line >= MAX_CHUNK_LINE => {
            return Err(HttpError::Malformed("a chunk's size line is too long"));
        }
        (Chunk::Size { size, digits, .. }, b'\r') if digits > 0 => Chunk::SizeEnd { size },
        (Chunk::Size { extension: true, size, digits, line }, b' '..=b'~' | b'\t' | 0x80..) => {
            Chunk::Size { size, digits, extension: true, line: line + 1 }
        }
        (Chunk::Size { extension: false, size, digits, line }, b';' | b' ' | b'\t')
            if digits > 0 =>
        {
            Chunk::Size { size, digits, extension: true, line: line + 1 }
        }
        (Chunk::Size { extension: false, size, digits, line }, _) => {
            let digit = char::from(byte).to_digit(16);
            let digit = digit.ok_or(HttpError::Malformed("a chunk's size is not a number"))?;
            if size >> 60 != 0 {
                return Err(HttpError::Malformed("a chunk's size is too large a number"));
            }
            let size = size << 4 | u64::from(digit);
            Chunk::Size { size, digits: digits + 1, extension: false, line: line + 1 }
        }
        (Chunk::SizeEnd { size: 0 }, b'\n') => Chunk::Trailer { total: 0, line: 0, cr: false },
        (Chunk::SizeEnd { size }, b'\n') => Chunk::Data(size),
        (Chunk::DataEnd { cr: false }, b'\r') => Chunk::DataEnd { cr: true },
        (Chunk::DataEnd { cr: true }, b'\n') => Chunk::START,
        (Chunk::Trailer { total, .. }, _) if total >= MAX_CHUNK_LINE => {
            return Err(HttpError::Malformed("the trailers are too long"));
        }
        (Chunk::Trailer { line: 0, cr: true, .. }, b'\n') => return Ok(None),
        (Chunk::Trailer { total, cr: true, .. }, b'\n') => {
            Chunk::Trailer { total: total + 1, line: 0, cr: false }
        }
        (Chunk::Trailer { total, line, cr: false }, b'\r') => {
            Chunk::Trailer { total: total + 1, line, cr: true }
        }
        (Chunk::Trailer { total, line, cr: false }, b' '..=b'~' | b'\t' | 0x80..) => {
            Chunk::Trailer { total: total + 1, line: line + 1, cr: false }
        }
        _ => return Err(HttpError::Malformed("the chunks of the body are not framed as such")),
    };
    Ok(Some(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(input: &[u8], limit: u64) -> Result<(Vec<u8>, usize, bool), HttpError> {
        let mut decoder = BodyDecoder::new(Framing::Chunked, Limits::body(limit))?;
        let mut out = Vec::new();
        let taken = decoder.decode(input, &mut out)?;
        Ok((out, taken, decoder.is_done()))
    }

    #[test]
    fn chunks_are_joined() {
        let input = b"5;x=y\r\nhello\r\n00A \r\n, 10 bytes\r\n0\r\nT: 1\r\nU: 2\r\n\r\nnext";
        let (body, taken, done) = decode(input, 100).expect("valid");
        assert_eq!((body, taken, done), (b"hello, 10 bytes".to_vec(), input.len() - 4, true));
    }

    #[test]
    fn wrong_chunks_are_refused() {
        let bad: [&[u8]; 12] = [
            b"\r\n",
            b";\r\n",
            b"g\r\n",
            b"-1\r\n",
            b"0x5\r\n",
            b"5\nhello",
            b"5\r\nhelloX",
            b"5\r\nhello\n",
            b"11111111111111111\r\n",
            b"0\r\n\n",
            b"0\r\nA\r\r\n",
            b"1\rX",
        ];
        for input in bad {
            assert!(
                matches!(decode(input, 100), Err(HttpError::Malformed(_))),
                "{:?}",
                input.escape_ascii().to_string()
            );
        }
        let long_line = [b"1;".as_slice(), &[b'x'; MAX_CHUNK_LINE]].concat();
        assert!(decode(&long_line, 100).is_err());
        let long_trailer = [b"0\r\n".as_slice(), &[b'x'; MAX_CHUNK_LINE + 1]].concat();
        assert!(decode(&long_trailer, 100).is_err());
    }

    #[test]
    fn the_limit_holds_before_the_data_comes() {
        assert_eq!(decode(b"65\r\n", 100), Err(HttpError::BodyTooLarge { limit: 100 }));
        assert!(decode(b"64\r\n", 100).is_ok());
        let two = [b"60\r\n".as_slice(), &[b'x'; 96], b"\r\n5\r\n"].concat();
        assert_eq!(decode(&two, 100), Err(HttpError::BodyTooLarge { limit: 100 }));
        let framing = Framing::Length(101);
        assert!(BodyDecoder::new(framing, Limits::body(100)).is_err());
    }

    #[test]
    fn framing_that_is_ambiguous_is_refused() {
        let of = |headers: Headers| Framing::of(&headers, true, Framing::Length(0));
        let none = Headers::new;
        assert_eq!(of(none()), Ok(Framing::Length(0)));
        assert_eq!(of(none().with("Content-Length", "12")), Ok(Framing::Length(12)));
        assert_eq!(of(none().with("Transfer-Encoding", "Chunked")), Ok(Framing::Chunked));
        for bad in ["", "+1", "-1", "1, 1", "0x1", "99999999999999999999"] {
            assert!(of(none().with("Content-Length", bad)).is_err(), "{bad}");
        }
        assert!(of(none().with("Content-Length", "1").with("content-length", "1")).is_err());
        let both = none().with("Content-Length", "1").with("Transfer-Encoding", "chunked");
        assert!(of(both).is_err());
        let gzip = of(none().with("Transfer-Encoding", "gzip, chunked"));
        assert_eq!(gzip.map_err(|e| e.status()), Err(501));
        let old = Headers::new().with("Transfer-Encoding", "chunked");
        assert!(Framing::of(&old, false, Framing::Length(0)).is_err());
    }
}
