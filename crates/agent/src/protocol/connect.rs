//! Connect's framing and errors (<https://connectrpc.com/docs/protocol>), JSON only.
//!
//! A unary call is one JSON body each way (`application/json`). A stream
//! (`application/connect+json`) is a run of frames: one byte of flags, the length as four bytes
//! big-endian, then JSON. The last frame of an answer has [`FLAG_END`] and holds `{}` or
//! `{"error": {"code", "message"}}`. Compression (flag 1) is never negotiated, so it is an error.

use serde::{Deserialize, Serialize};

/// Flag of a compressed frame: not supported.
pub const FLAG_COMPRESSED: u8 = 1;
/// Flag of the frame that ends a stream.
pub const FLAG_END: u8 = 2;
/// Bytes before the payload of a frame.
pub const HEADER_LEN: usize = 5;
/// Longest payload accepted, in bytes. envd's own clients send far less; output is chunked.
pub const MAX_FRAME: usize = 4 << 20;

/// Content type of a unary call.
pub const UNARY_TYPE: &str = "application/json";
/// Content type of a stream.
pub const STREAM_TYPE: &str = "application/connect+json";

/// The codes of Connect that the agent uses, with the HTTP status of a unary answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The caller went away.
    Canceled,
    /// The request itself is wrong.
    InvalidArgument,
    /// `Connect-Timeout-Ms` has passed.
    DeadlineExceeded,
    /// No such process or user.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// The user may not do this.
    PermissionDenied,
    /// A limit of the agent is reached.
    ResourceExhausted,
    /// The thing's state forbids it.
    FailedPrecondition,
    /// Overtaken by something else.
    Aborted,
    /// Not spoken here.
    Unimplemented,
    /// The guest's kernel refused.
    Internal,
    /// The peer cannot be reached.
    Unavailable,
    /// No or wrong credentials.
    Unauthenticated,
    /// Anything else; also what an unknown code is read as.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// The HTTP status that goes with the code in a unary answer (Connect, "Error codes").
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Canceled => 499,
            Self::Unknown | Self::Internal => 500,
            Self::InvalidArgument | Self::FailedPrecondition => 400,
            Self::DeadlineExceeded => 504,
            Self::NotFound => 404,
            Self::AlreadyExists | Self::Aborted => 409,
            Self::PermissionDenied => 403,
            Self::ResourceExhausted => 429,
            Self::Unimplemented => 501,
            Self::Unavailable => 503,
            Self::Unauthenticated => 401,
        }
    }
}

/// Connect's error: a code and one line for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// What kind.
    pub code: Code,
    /// What happened, naming the thing.
    #[serde(default)]
    pub message: String,
}

impl RpcError {
    /// An error of this code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Payload of the frame that ends a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndOfStream {
    /// Why the stream failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

/// A frame cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame says that it is compressed.
    #[error("frame is compressed, which was not negotiated")]
    Compressed,
    /// The frame is longer than [`MAX_FRAME`].
    #[error("frame of {0} bytes is longer than {MAX_FRAME}")]
    TooLong(usize),
}

/// One frame, borrowed from the buffer it was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Flags.
    pub flags: u8,
    /// JSON.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Bytes that the frame takes in the stream.
    #[must_use]
    pub const fn encoded_len(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }

    /// Whether it ends the stream.
    #[must_use]
    pub const fn is_end(&self) -> bool {
        self.flags & FLAG_END != 0
    }
}

/// Reads the frame at the start of `buf`; `None` while it is incomplete.
///
/// # Errors
///
/// The header is refused as soon as it is there, whatever follows.
pub fn decode(buf: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    let Some((header, rest)) = buf.split_first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let [flags, length @ ..] = *header;
    let len = u32::from_be_bytes(length) as usize;
    if flags & FLAG_COMPRESSED != 0 {
        return Err(FrameError::Compressed);
    }
    if len > MAX_FRAME {
        return Err(FrameError::TooLong(len));
    }
    Ok(rest.get(..len).map(|payload| Frame { flags, payload }))
}

/// Appends a frame whose payload is written by `write`, so that no temporary is needed.
pub fn encode_with(out: &mut Vec<u8>, flags: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[flags, 0, 0, 0, 0]);
    write(out);
    let len = u32::try_from(out.len() - start - HEADER_LEN).unwrap_or(u32::MAX);
    out[start + 1..start + HEADER_LEN].copy_from_slice(&len.to_be_bytes());
}

/// Appends a frame.
pub fn encode(out: &mut Vec<u8>, flags: u8, payload: &[u8]) {
    encode_with(out, flags, |out| out.extend_from_slice(payload));
}

/// Appends the frame that ends a stream.
pub fn encode_end(out: &mut Vec<u8>, error: Option<&RpcError>) {
    encode_with(out, FLAG_END, |out| match error {
        None => out.extend_from_slice(b"{}"),
        Some(error) => {
            out.extend_from_slice(b"{\"error\":");
            write_json(out, error);
            out.push(b'}');
        }
    });
}

/// Appends `value` as JSON.
pub fn write_json<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    let start = out.len();
    // Fails only for maps with keys that are no strings; none of ours has.
    if serde_json::to_writer(&mut *out, value).is_err() {
        out.truncate(start);
        out.extend_from_slice(b"null");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_survive_any_split(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cut in 1usize..64,
        ) {
            let mut wire = Vec::new();
            for payload in &payloads {
                encode(&mut wire, 0, payload);
            }
            encode_end(&mut wire, None);
            let (mut buf, mut got, mut ended) = (Vec::new(), Vec::new(), false);
            for piece in wire.chunks(cut) {
                buf.extend_from_slice(piece);
                while let Some(frame) = decode(&buf).unwrap() {
                    let n = frame.encoded_len();
                    if frame.is_end() {
                        prop_assert_eq!(frame.payload, b"{}");
                        ended = true;
                    } else {
                        got.push(frame.payload.to_vec());
                    }
                    buf.drain(..n);
                }
            }
            prop_assert!(ended && buf.is_empty());
            prop_assert_eq!(got, payloads);
        }

        #[test]
        fn hostile_bytes_never_panic_nor_read_past_the_limit(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(Some(frame)) = decode(&bytes) {
                prop_assert!(frame.encoded_len() <= bytes.len());
                prop_assert!(frame.flags & FLAG_COMPRESSED == 0);
            }
        }
    }

    #[test]
    fn length_and_compression_are_refused_from_the_header_alone() {
        assert_eq!(decode(&[0, 0xff, 0, 0, 0]), Err(FrameError::TooLong(0xff00_0000)));
        assert_eq!(decode(&[1, 0, 0, 0, 0]), Err(FrameError::Compressed));
        assert_eq!(decode(&[0, 0, 0, 0]), Ok(None));
    }

    #[test]
    fn error_ends_a_stream() {
        let mut out = Vec::new();
        encode_end(&mut out, Some(&RpcError::new(Code::NotFound, "no process 7")));
        let frame = decode(&out).unwrap().unwrap();
        assert!(frame.is_end());
        let end: EndOfStream = serde_json::from_slice(frame.payload).unwrap();
        assert_eq!(end.error.unwrap(), RpcError::new(Code::NotFound, "no process 7"));
        assert_eq!(
            std::str::from_utf8(frame.payload).unwrap(),
            r#"{"error":{"code":"not_found","message":"no process 7"}}"#
        );
    }

    #[test]
    fn unknown_code_is_read_as_unknown() {
        let error: RpcError = serde_json::from_str(r#"{"code":"data_loss"}"#).unwrap();
        assert_eq!(error.code, Code::Unknown);
    }
}
