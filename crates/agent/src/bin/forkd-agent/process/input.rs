//! `StreamInput`: input to a process, message by message, on one connection.

use forkd_agent::protocol::connect::{self, Code, Frame, RpcError, STREAM_TYPE};
use forkd_agent::protocol::process::StreamInputRequest;
use forkd_agent::protocol::raw::{self, Channel};

use super::rpc::{parse, piece};
use super::stdin::Sent;
use crate::agent::Agent;
use crate::conn::Task;
use crate::slab::Key;

/// A connection sends input to a process.
pub struct Input {
    process: Option<Key>,
    buffer: Vec<u8>,
    /// An error has been answered; the rest of the body is dropped.
    failed: bool,
}

impl Agent {
    /// `StreamInput` begins.
    pub fn input_begins(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.task = Task::Input(Input { process: None, buffer: Vec::new(), failed: false });
        }
    }

    /// A piece of the body of `StreamInput`.
    pub fn input_data(&mut self, key: Key, data: &[u8]) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Task::Input(input) = &mut conn.task else { return };
        if input.failed {
            return;
        }
        input.buffer.extend_from_slice(data);
        let mut buffer = std::mem::take(&mut input.buffer);
        let mut taken = 0;
        let result = loop {
            match connect::decode(&buffer[taken..]) {
                Ok(None) => break Ok(()),
                Ok(Some(frame)) => {
                    taken += frame.encoded_len();
                    if let Err(error) = self.input_frame(key, &frame) {
                        break Err(error);
                    }
                }
                Err(error) => {
                    break Err(RpcError::new(Code::InvalidArgument, error.to_string()));
                }
            }
        };
        buffer.drain(..taken);
        if let Some(Task::Input(input)) = self.conns.get_mut(key).map(|conn| &mut conn.task) {
            input.buffer = buffer;
        }
        if let Err(error) = result {
            self.answer_input(key, Some(&error), false);
        }
    }

    fn input_frame(&mut self, key: Key, frame: &Frame<'_>) -> Result<(), RpcError> {
        match raw::split(frame) {
            None => parse(frame.payload).and_then(|message| self.input_message(key, message)),
            Some(Ok((channel, data))) => self.input_bytes(key, channel, data),
            Some(Err(error)) => Err(RpcError::new(Code::InvalidArgument, error.to_string())),
        }
    }

    fn input_message(&mut self, key: Key, message: StreamInputRequest) -> Result<(), RpcError> {
        if let Some(start) = message.start {
            let found = self.processes.find(&start.process)?;
            if let Some(Task::Input(input)) = self.conns.get_mut(key).map(|conn| &mut conn.task) {
                input.process = Some(found);
            }
            return Ok(());
        }
        match message.data.as_ref().and_then(|data| piece(&data.input)) {
            Some((channel, data)) => self.input_bytes(key, channel, data),
            None => Ok(()),
        }
    }

    fn input_bytes(&mut self, key: Key, channel: Channel, data: &[u8]) -> Result<(), RpcError> {
        let process = match self.conns.get(key).map(|conn| &conn.task) {
            Some(Task::Input(input)) => input.process,
            _ => return Ok(()),
        };
        let process = process.ok_or_else(|| {
            RpcError::new(Code::InvalidArgument, "input comes before a process is selected")
        })?;
        if self.queue_input(process, channel, data)? == Sent::Queued
            && self.conns.get(key).is_some_and(|conn| !conn.paused)
        {
            self.wait_for_input(key, process);
            if let Some(conn) = self.conns.get_mut(key) {
                conn.paused = true;
            }
        }
        Ok(())
    }

    /// The body of `StreamInput` has ended.
    pub fn input_ends(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Task::Input(input) = &mut conn.task else { return };
        if input.failed {
            self.end_stream(key);
        } else if !input.buffer.is_empty() {
            let error = RpcError::new(Code::InvalidArgument, "the last frame is not complete");
            self.answer_input(key, Some(&error), true);
        } else {
            self.answer_input(key, None, true);
        }
    }

    /// Answers `StreamInput`. If its body has not ended, the rest is read and dropped first.
    pub(super) fn answer_input(&mut self, key: Key, error: Option<&RpcError>, body_ended: bool) {
        self.begin_stream(key, STREAM_TYPE);
        let Some(conn) = self.conns.get_mut(key) else { return };
        if error.is_none() {
            conn.out.piece(|out| connect::encode(out, 0, b"{}"));
        }
        conn.out.piece(|out| connect::encode_end(out, error));
        conn.paused = false;
        if body_ended {
            self.end_stream(key);
        } else if let Task::Input(input) = &mut conn.task {
            input.failed = true;
            input.buffer = Vec::new();
            self.mark_dirty(key);
            self.again.push(key);
        }
    }
}
