//! What requests and responses have in common: a buffer, a head, then a body.

use super::body::BodyDecoder;
use super::{HttpError, Limits};

/// Parses a complete head into `H` and says how the body is to be taken.
pub(super) type ParseHead<H> = fn(&[u8], Limits) -> Result<(H, BodyDecoder), HttpError>;

/// A piece of a message.
#[derive(Debug)]
pub(super) enum Event<H> {
    Head(H),
    Body(Vec<u8>),
    End,
}

#[derive(Debug)]
enum State {
    Head,
    Body(BodyDecoder),
    Failed(HttpError),
}

/// Splits a stream into messages.
#[derive(Debug)]
pub(super) struct Decoder {
    limits: Limits,
    buffer: Vec<u8>,
    /// Bytes at the front of the buffer that are used up.
    used: usize,
    /// Bytes behind `used` in which no end of a head was found.
    scanned: usize,
    state: State,
}

impl Decoder {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, buffer: Vec::new(), used: 0, scanned: 0, state: State::Head }
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        if matches!(self.state, State::Failed(_)) {
            return;
        }
        if self.used > 0 {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    pub(super) fn buffered(&self) -> usize {
        self.buffer.len() - self.used
    }

    /// Whether a message has begun and not ended.
    pub(super) fn is_within_message(&self) -> bool {
        match self.state {
            State::Head => self.buffered() > 0,
            State::Body(_) => true,
            State::Failed(_) => false,
        }
    }

    pub(super) fn next<H>(&mut self, parse: ParseHead<H>) -> Result<Option<Event<H>>, HttpError> {
        let result = self.advance(parse);
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn advance<H>(&mut self, parse: ParseHead<H>) -> Result<Option<Event<H>>, HttpError> {
        let input = &self.buffer[self.used..];
        match &mut self.state {
            State::Failed(error) => Err(error.clone()),
            State::Head => {
                let Some(len) = self.find_head()? else { return Ok(None) };
                let head = &self.buffer[self.used..self.used + len];
                let (head, body) = parse(head, self.limits)?;
                self.consume(len);
                self.state = State::Body(body);
                Ok(Some(Event::Head(head)))
            }
            State::Body(body) if body.is_done() => {
                self.state = State::Head;
                Ok(Some(Event::End))
            }
            State::Body(body) => {
                let mut out = Vec::new();
                let taken = body.decode(input, &mut out)?;
                let done = body.is_done();
                self.consume(taken);
                if !out.is_empty() {
                    return Ok(Some(Event::Body(out)));
                }
                if done {
                    self.state = State::Head;
                    return Ok(Some(Event::End));
                }
                Ok(None)
            }
        }
    }

    /// The stream has ended: an error unless that is fine here. True if it ends a body.
    pub(super) fn finish(&mut self) -> Result<bool, HttpError> {
        let ends_body = match &self.state {
            State::Failed(error) => return Err(error.clone()),
            State::Head if self.buffered() == 0 => return Ok(false),
            State::Head => false,
            State::Body(body) => body.ends_with_stream(),
        };
        if ends_body {
            self.state = State::Head;
            return Ok(true);
        }
        self.fail(HttpError::Truncated);
        Err(HttpError::Truncated)
    }

    fn fail(&mut self, error: HttpError) {
        self.state = State::Failed(error);
        self.buffer = Vec::new();
        self.used = 0;
        self.scanned = 0;
    }

    fn consume(&mut self, count: usize) {
        self.used += count;
        self.scanned = 0;
        if self.used == self.buffer.len() {
            self.buffer.clear();
            self.used = 0;
        }
    }

    /// Length of the head that the buffer begins with, once it is complete. Empty lines before it
    /// are dropped (RFC 9112, section 2.2). Each byte is looked at once, however it is fed.
    fn find_head(&mut self) -> Result<Option<usize>, HttpError> {
        if self.scanned == 0 {
            let input = &self.buffer[self.used..];
            let empty = input.iter().take_while(|&&b| b == b'\r' || b == b'\n').count();
            self.consume(empty);
        }
        let input = &self.buffer[self.used..];
        // An end has up to three bytes, of which two may have been scanned before.
        let from = self.scanned.saturating_sub(2);
        let end = (from..input.len()).find_map(|at| match &input[at..] {
            [b'\n', b'\n', ..] => Some(at + 2),
            [b'\n', b'\r', b'\n', ..] => Some(at + 3),
            _ => None,
        });
        let limit = self.limits.head;
        if end.unwrap_or(input.len()) > limit {
            return Err(HttpError::HeadTooLarge { limit });
        }
        self.scanned = input.len();
        Ok(end)
    }
}
