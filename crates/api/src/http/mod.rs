//! HTTP/1.1 without I/O: bytes in, messages out, and back.
//!
//! Decoders are fed bytes as they come and asked for what they make up, so the same code serves an
//! event loop, a blocking client and a fuzzer. How the bytes are split makes no difference. Decoders
//! are strict where leniency lets two readers see different messages (RFC 9112, section 11.2): both
//! a length and chunks, several lengths, bare line feeds in chunks are refused. After an error the
//! stream has no known boundary any more: the decoder repeats the error, and the connection must be
//! closed.
//!
//! | to | use |
//! |---|---|
//! | take whole requests | [`RequestParser`] |
//! | take a request's body piece by piece | [`RequestDecoder`] |
//! | take a response, whole or piece by piece | [`ResponseParser`] |
//! | write a response | [`Response::encode`] |
//! | write a response whose length is not known yet | [`ChunkedEncoder`] |
//! | write a request | [`encode_request`] |
//!
//! Known holes: trailers are read and dropped; no upgrade, no compression, no HEAD on the serving
//! side.

mod body;
mod decoder;
mod error;
mod headers;
mod request;
mod response;

pub use error::HttpError;
pub use headers::Headers;
pub use request::{
    Request, RequestDecoder, RequestEvent, RequestHead, RequestParser, encode_request,
};
pub use response::{ChunkedEncoder, Response, ResponseEvent, ResponseHead, ResponseParser};

/// What to send when a request says `Expect: 100-continue`.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Bounds on what a decoder takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the start line and all headers, with the empty line.
    pub head: usize,
    /// Bytes of a whole body after decoding.
    pub body: u64,
}

/// Most headers of a message.
pub const MAX_HEADERS: usize = 64;

impl Limits {
    /// Heads of 16 KiB, bodies of any length: for those who take a body piece by piece.
    pub const STREAMING: Self = Self { head: 16 << 10, body: u64::MAX };

    /// Heads of 16 KiB, bodies of `body` bytes.
    pub const fn body(body: u64) -> Self {
        Self { head: 16 << 10, body }
    }
}

impl Default for Limits {
    /// Heads of 16 KiB, bodies of 1 MiB.
    fn default() -> Self {
        Self::body(1 << 20)
    }
}

#[cfg(test)]
mod tests;
