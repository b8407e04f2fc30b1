//! Requests.

use super::body::{BodyDecoder, Framing};
use super::decoder::{Decoder, Event};
use super::{Headers, HttpError, Limits, MAX_HEADERS};

/// Start line and headers of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// Method, as sent: `GET`.
    pub method: String,
    /// Target, as sent: `/vm?full=1`.
    pub target: String,
    /// Headers.
    pub headers: Headers,
    /// Whether the connection may serve another request afterwards.
    pub keep_alive: bool,
    /// Whether the client waits for [`super::CONTINUE`] before it sends the body.
    pub expects_continue: bool,
}

impl RequestHead {
    /// The target's path, not decoded, without scheme, host and query.
    pub fn path(&self) -> &str {
        let origin = origin_form(&self.target);
        origin.split_once('?').map_or(origin, |(path, _)| path)
    }

    /// The target's query, not decoded, if it has one.
    pub fn query(&self) -> Option<&str> {
        origin_form(&self.target).split_once('?').map(|(_, query)| query)
    }

    /// The first value of a parameter of the query, decoded.
    pub fn query_param(&self, name: &str) -> Option<String> {
        find_param(self.query()?, name)
    }
}

fn find_param(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode_form(key) == name).then(|| decode_form(value))
    })
}

/// The part of a target from the path on.
fn origin_form(target: &str) -> &str {
    let Some((_, rest)) = target.split_once("://").filter(|_| !target.starts_with('/')) else {
        return target;
    };
    rest.find(['/', '?']).map_or("/", |at| &rest[at..])
}

/// Decodes `%20` and `+`. What is no escape stays as it is, and what is no UTF-8 is replaced.
fn decode_form(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |byte: &u8| char::from(*byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let escaped = match tail {
            [high, low, ..] if *first == b'%' => hex(high).zip(hex(low)),
            _ => None,
        };
        if let Some((high, low)) = escaped {
            out.push(high << 4 | low);
            rest = &tail[2..];
        } else {
            out.push(if *first == b'+' { b' ' } else { *first });
            rest = tail;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Method, as sent: `GET`.
    pub method: String,
    /// Target, as sent: `/vm?full=1`.
    pub target: String,
    /// Path of the target, not decoded.
    pub path: String,
    /// Query of the target, not decoded.
    pub query: Option<String>,
    /// Headers.
    pub headers: Headers,
    /// Body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the connection may serve another request afterwards.
    pub keep_alive: bool,
}

impl Request {
    /// The first value of a parameter of the query, decoded.
    pub fn query_param(&self, name: &str) -> Option<String> {
        find_param(self.query.as_deref()?, name)
    }

    fn new(head: RequestHead, body: Vec<u8>) -> Self {
        Self {
            path: head.path().to_owned(),
            query: head.query().map(str::to_owned),
            method: head.method,
            target: head.target,
            headers: head.headers,
            body,
            keep_alive: head.keep_alive,
        }
    }
}

/// A piece of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestEvent {
    /// It begins.
    Head(RequestHead),
    /// Some of its body, never empty.
    Body(Vec<u8>),
    /// It ends.
    End,
}

/// Takes requests piece by piece.
#[derive(Debug)]
pub struct RequestDecoder(Decoder);

impl RequestDecoder {
    /// For a new connection.
    pub fn new(limits: Limits) -> Self {
        Self(Decoder::new(limits))
    }

    /// Adds bytes as they came. Take events until there is none before feeding more: what was fed
    /// and not taken is kept without a bound.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.0.feed(bytes);
    }

    /// The next piece, or `None` until more is fed.
    ///
    /// # Errors
    /// [`HttpError`]; then the same for ever.
    #[expect(clippy::should_implement_trait, reason = "an iterator's None would be final")]
    pub fn next(&mut self) -> Result<Option<RequestEvent>, HttpError> {
        Ok(self.0.next(parse_head)?.map(|event| match event {
            Event::Head(head) => RequestEvent::Head(head),
            Event::Body(data) => RequestEvent::Body(data),
            Event::End => RequestEvent::End,
        }))
    }

    /// Bytes that were fed and not yet taken.
    pub fn buffered(&self) -> usize {
        self.0.buffered()
    }

    /// Whether a request has begun and not ended.
    pub fn is_within_message(&self) -> bool {
        self.0.is_within_message()
    }
}

/// Takes whole requests.
#[derive(Debug)]
pub struct RequestParser {
    decoder: RequestDecoder,
    head: Option<RequestHead>,
    body: Vec<u8>,
    wants_continue: bool,
}

impl RequestParser {
    /// For a new connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            decoder: RequestDecoder::new(limits),
            head: None,
            body: Vec::new(),
            wants_continue: false,
        }
    }

    /// Adds bytes as they came; see [`RequestDecoder::feed`].
    pub fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
    }

    /// The next request, or `None` until more is fed.
    ///
    /// # Errors
    /// [`HttpError`]; then the same for ever.
    #[expect(clippy::should_implement_trait, reason = "an iterator's None would be final")]
    pub fn next(&mut self) -> Result<Option<Request>, HttpError> {
        while let Some(event) = self.decoder.next()? {
            match event {
                RequestEvent::Head(head) => {
                    self.wants_continue = head.expects_continue;
                    self.head = Some(head);
                }
                RequestEvent::Body(data) => {
                    self.wants_continue = false;
                    if self.body.is_empty() {
                        self.body = data;
                    } else {
                        self.body.extend_from_slice(&data);
                    }
                }
                RequestEvent::End => {
                    self.wants_continue = false;
                    let body = std::mem::take(&mut self.body);
                    if let Some(head) = self.head.take() {
                        return Ok(Some(Request::new(head, body)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// True once for a request whose client waits for [`super::CONTINUE`]. Ask when
    /// [`RequestParser::next`] has returned `None`.
    pub fn take_continue(&mut self) -> bool {
        std::mem::take(&mut self.wants_continue)
    }

    /// Bytes that were fed and belong to requests not yet begun to be parsed.
    pub fn buffered(&self) -> usize {
        self.decoder.buffered()
    }

    /// Whether a request has begun and not ended.
    pub fn is_within_message(&self) -> bool {
        self.head.is_some() || self.decoder.is_within_message()
    }
}

fn parse_head(bytes: &[u8], limits: Limits) -> Result<(RequestHead, BodyDecoder), HttpError> {
    let mut space = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut space);
    let malformed = HttpError::Malformed("the head ends before it is complete");
    match parsed.parse(bytes)? {
        httparse::Status::Complete(len) if len == bytes.len() => {}
        _ => return Err(malformed),
    }
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(malformed);
    };
    let headers = Headers::from_parsed(parsed.headers)?;
    let version_1_1 = minor >= 1;
    let framing = Framing::of(&headers, version_1_1, Framing::Length(0))?;
    let body = BodyDecoder::new(framing, limits)?;
    let keep_alive = keeps_alive(&headers, version_1_1);
    let expects_continue = version_1_1
        && !body.is_done()
        && headers.get("expect").is_some_and(|e| e.trim().eq_ignore_ascii_case("100-continue"));
    let (method, target) = (method.to_owned(), target.to_owned());
    Ok((RequestHead { method, target, headers, keep_alive, expects_continue }, body))
}

/// RFC 9112, section 9.3.
pub(super) fn keeps_alive(headers: &Headers, version_1_1: bool) -> bool {
    if headers.lists("connection", "close") {
        return false;
    }
    version_1_1 || headers.lists("connection", "keep-alive")
}

/// Appends a request. With a body, its length is said; without, none is. `headers` must not have
/// Content-Length nor Transfer-Encoding. A `Host` is added unless there is one.
pub fn encode_request(
    out: &mut Vec<u8>,
    method: &str,
    target: &str,
    headers: &Headers,
    body: Option<&[u8]>,
) {
    let clean = |text: &str| -> String { text.chars().filter(char::is_ascii_graphic).collect() };
    out.extend_from_slice(clean(method).as_bytes());
    out.push(b' ');
    out.extend_from_slice(clean(target).as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    if headers.get("host").is_none() {
        out.extend_from_slice(b"Host: localhost\r\n");
    }
    headers.encode(out);
    if let Some(body) = body {
        out.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(body.unwrap_or_default());
}
