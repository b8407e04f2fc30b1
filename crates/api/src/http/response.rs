//! Responses.

use serde::Serialize;

use super::body::{BodyDecoder, Framing};
use super::decoder::{Decoder, Event};
use super::request::keeps_alive;
use super::{Headers, HttpError, Limits, MAX_HEADERS};
use crate::types::Fault;

/// A whole response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code: 200.
    pub status: u16,
    /// Headers, without those that frame the body.
    pub headers: Headers,
    /// Body.
    pub body: Vec<u8>,
    /// Say that the connection is closed afterwards.
    pub close: bool,
}

impl Response {
    /// Without a body.
    pub fn empty(status: u16) -> Self {
        Self { status, headers: Headers::new(), body: Vec::new(), close: false }
    }

    /// With a body.
    pub fn bytes(status: u16, content_type: &str, body: Vec<u8>) -> Self {
        let headers = Headers::new().with("Content-Type", content_type);
        Self { status, headers, body, close: false }
    }

    /// With a value as JSON. A value that JSON cannot express gives a 500 that says so.
    pub fn json<T: Serialize + ?Sized>(status: u16, value: &T) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::bytes(status, "application/json", body),
            Err(error) => Self::fault(500, &format!("the answer cannot be put as JSON: {error}")),
        }
    }

    /// An error, in Firecracker's form ([`Fault`]).
    pub fn fault(status: u16, message: &str) -> Self {
        // A string always serialises, so this does not come back from `json`.
        Self::json(status, &Fault { fault_message: message.to_owned() })
    }

    /// Adds a header, and returns itself.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(name, value);
        self
    }

    /// Says that the connection is closed afterwards, and returns itself.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Appends the response as bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_head(out, self.status, &self.headers, self.close);
        if has_no_body(self.status) {
            out.extend_from_slice(b"\r\n");
            return;
        }
        out.extend_from_slice(format!("Content-Length: {}\r\n\r\n", self.body.len()).as_bytes());
        out.extend_from_slice(&self.body);
    }
}

fn encode_head(out: &mut Vec<u8>, status: u16, headers: &Headers, close: bool) {
    out.extend_from_slice(format!("HTTP/1.1 {status} {}\r\n", reason(status)).as_bytes());
    headers.encode(out);
    if close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
}

/// RFC 9110, sections 15.2, 15.3.5 and 15.4.5.
fn has_no_body(status: u16) -> bool {
    status < 200 || status == 204 || status == 304
}

/// The words for a status (RFC 9110, section 15); none for those not used here.
fn reason(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    }
}

/// Writes a response whose body comes piece by piece.
#[derive(Debug)]
#[must_use = "a chunked body has to be ended"]
pub struct ChunkedEncoder(());

impl ChunkedEncoder {
    /// Appends the head. `headers` must not have Content-Length nor Transfer-Encoding.
    pub fn head(out: &mut Vec<u8>, status: u16, headers: &Headers) -> Self {
        encode_head(out, status, headers, false);
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
        Self(())
    }

    /// Appends a piece of the body. An empty piece is nothing: it would end the body.
    pub fn chunk(&mut self, out: &mut Vec<u8>, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }

    /// Appends the end of the body.
    pub fn end(self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"0\r\n\r\n");
    }
}

/// Start line and headers of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// Status code.
    pub status: u16,
    /// Headers.
    pub headers: Headers,
    /// Whether the connection may be used for another request afterwards.
    pub keep_alive: bool,
}

/// A piece of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResponseEvent {
    /// It begins. Interim responses (100 Continue) are not told.
    Head(ResponseHead),
    /// Some of its body, never empty.
    Body(Vec<u8>),
    /// It ends.
    End,
}

/// Takes responses piece by piece.
#[derive(Debug)]
pub struct ResponseParser {
    decoder: Decoder,
    /// Within an interim response.
    interim: bool,
}

impl ResponseParser {
    /// For a new connection. Not for answers to HEAD.
    pub fn new(limits: Limits) -> Self {
        Self { decoder: Decoder::new(limits), interim: false }
    }

    /// Adds bytes as they came. Take events until there is none before feeding more: what was fed
    /// and not taken is kept without a bound.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
    }

    /// The next piece, or `None` until more is fed.
    ///
    /// # Errors
    /// [`HttpError`]; then the same for ever.
    #[expect(clippy::should_implement_trait, reason = "an iterator's None would be final")]
    pub fn next(&mut self) -> Result<Option<ResponseEvent>, HttpError> {
        while let Some(event) = self.decoder.next(parse_head)? {
            match event {
                Event::Head(head) if head.status < 200 => self.interim = true,
                Event::Head(head) => return Ok(Some(ResponseEvent::Head(head))),
                Event::End if self.interim => self.interim = false,
                Event::End => return Ok(Some(ResponseEvent::End)),
                Event::Body(data) => return Ok(Some(ResponseEvent::Body(data))),
            }
        }
        Ok(None)
    }

    /// Tells that the stream has ended, after all events were taken. `Some(End)` if that ends a
    /// response whose body goes up to the end of the stream.
    ///
    /// # Errors
    /// [`HttpError::Truncated`] if it ended within a response.
    pub fn finish(&mut self) -> Result<Option<ResponseEvent>, HttpError> {
        Ok(self.decoder.finish()?.then_some(ResponseEvent::End))
    }

    /// Whether a response has begun and not ended.
    pub fn is_within_message(&self) -> bool {
        self.interim || self.decoder.is_within_message()
    }
}

fn parse_head(bytes: &[u8], limits: Limits) -> Result<(ResponseHead, BodyDecoder), HttpError> {
    let mut space = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut space);
    let malformed = HttpError::Malformed("the head ends before it is complete");
    match parsed.parse(bytes)? {
        httparse::Status::Complete(len) if len == bytes.len() => {}
        _ => return Err(malformed),
    }
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(malformed);
    };
    if !(100..=999).contains(&status) || status == 101 {
        return Err(HttpError::Malformed("the status is not one that can be expected"));
    }
    let headers = Headers::from_parsed(parsed.headers)?;
    let version_1_1 = minor >= 1;
    let framing = if has_no_body(status) {
        Framing::Length(0)
    } else {
        Framing::of(&headers, version_1_1, Framing::UntilClose)?
    };
    let keep_alive = framing != Framing::UntilClose && keeps_alive(&headers, version_1_1);
    Ok((ResponseHead { status, headers, keep_alive }, BodyDecoder::new(framing, limits)?))
}
