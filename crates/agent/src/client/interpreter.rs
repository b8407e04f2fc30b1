//! Client of the code interpreter.

use std::time::Duration;

use super::{Agent, CALL_TIMEOUT, CONNECT_TIMEOUT, Call, ClientError, Exchange};
use crate::protocol::INTERPRETER_PORT;
use crate::protocol::interpreter::{
    ContextInfo, CreateContextRequest, Event, ExecuteRequest, ExecutionError, ResultData,
    TIMEOUT_ERROR, WarmRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest line of an answer, in bytes.
const MAX_LINE: usize = 32 << 20;
/// How much longer than its time limit an execution's answer is waited for: the interpreter is
/// interrupted, and killed if that does not help.
const SLACK: Duration = Duration::from_secs(60);

/// What became of an execution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Execution {
    /// Which execution of the context it was, from 1.
    pub count: u64,
    /// Values: those displayed, and that of the last expression.
    pub results: Vec<ResultData>,
    /// All that was written to standard output.
    pub stdout: String,
    /// All that was written to standard error.
    pub stderr: String,
    /// What the code raised.
    pub error: Option<ExecutionError>,
    /// The interpreter is gone, with all its state.
    pub lost: bool,
}

impl Execution {
    /// `repr()` of the last expression's value.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.results.iter().find(|result| result.is_main_result)?.text.as_deref()
    }

    /// The time limit ended it.
    #[must_use]
    pub fn timed_out(&self) -> bool {
        self.error.as_ref().is_some_and(|error| error.name == TIMEOUT_ERROR)
    }
}

/// Runs code in a guest's interpreters.
#[derive(Debug, Clone)]
pub struct Interpreter {
    agent: Agent,
}

impl Interpreter {
    /// Of this guest.
    pub const fn new(agent: Agent) -> Self {
        Self { agent }
    }

    /// Runs code; `on_event` sees everything as it comes. That the code raised is no error here.
    ///
    /// # Errors
    ///
    /// The agent cannot be reached or refuses, or the connection breaks: then the code may still run.
    pub fn execute(
        &self,
        request: &ExecuteRequest,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<Execution, ClientError> {
        let limit = request
            .timeout
            .filter(|t| *t > 0.0)
            .and_then(|t| Duration::try_from_secs_f64(t).ok()?.checked_add(SLACK));
        self.run("/execute", request, limit, on_event)
    }

    /// Runs code in the default context, and prepares it for being forked.
    ///
    /// # Errors
    ///
    /// As [`Interpreter::execute`].
    pub fn warm(
        &self,
        request: &WarmRequest,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<Execution, ClientError> {
        self.run("/warm", request, None, on_event)
    }

    /// Makes a context; returns once it takes code.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn create_context(
        &self,
        request: &CreateContextRequest,
    ) -> Result<ContextInfo, ClientError> {
        self.call("POST", "/contexts", Some(request))
    }

    /// All contexts.
    ///
    /// # Errors
    ///
    /// The agent cannot be reached.
    pub fn contexts(&self) -> Result<Vec<ContextInfo>, ClientError> {
        self.call::<(), _>("GET", "/contexts", None)
    }

    /// Ends a context.
    ///
    /// # Errors
    ///
    /// There is none of this id.
    pub fn remove_context(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/contexts/{id}");
        self.agent.call(INTERPRETER_PORT, &Call::new("DELETE", &path), None).map(|_| ())
    }

    /// Gives a context a new interpreter; returns once it takes code.
    ///
    /// # Errors
    ///
    /// There is none of this id, or it cannot be started.
    pub fn restart_context(&self, id: &str) -> Result<ContextInfo, ClientError> {
        self.call::<(), _>("POST", &format!("/contexts/{id}/restart"), None)
    }

    fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        request: Option<&Q>,
    ) -> Result<A, ClientError> {
        let body = encode(request)?;
        let call = Call::new(method, path).header("Content-Type", "application/json");
        let answer = self.agent.call(INTERPRETER_PORT, &call, body.as_deref())?;
        serde_json::from_slice(&answer).map_err(|e| ClientError::Protocol(e.to_string()))
    }

    fn run<Q: Serialize>(
        &self,
        path: &str,
        request: &Q,
        limit: Option<Duration>,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<Execution, ClientError> {
        let body = encode(Some(request))?;
        let stream = self.agent.open(INTERPRETER_PORT, CONNECT_TIMEOUT)?;
        let mut exchange = Exchange::new(stream, Some(limit.unwrap_or(CALL_TIMEOUT)));
        let call = Call::new("POST", path).header("Content-Type", "application/json");
        exchange.send(&call, body.as_deref())?;
        if limit.is_none() {
            exchange.clock.limit = None;
        }
        exchange.head()?;
        let (mut execution, mut line) = (Execution::default(), Vec::new());
        let mut ended = false;
        while let Some(piece) = exchange.piece()? {
            line.extend_from_slice(&piece);
            let Some(last) = line.iter().rposition(|b| *b == b'\n') else {
                if line.len() > MAX_LINE {
                    let text = format!("a line has more than {MAX_LINE} bytes");
                    return Err(ClientError::Protocol(text));
                }
                continue;
            };
            let rest = line.split_off(last + 1);
            for text in line.split(|b| *b == b'\n').filter(|text| !text.is_empty()) {
                let event: Event = serde_json::from_slice(text)
                    .map_err(|e| ClientError::Protocol(e.to_string()))?;
                on_event(&event);
                ended |= execution.take(event);
            }
            line = rest;
        }
        if ended { Ok(execution) } else { Err(ClientError::Ended) }
    }
}

fn encode<Q: Serialize>(request: Option<&Q>) -> Result<Option<Vec<u8>>, ClientError> {
    let encode = |request| serde_json::to_vec(request);
    request.map(encode).transpose().map_err(|e| ClientError::Protocol(e.to_string()))
}

impl Execution {
    /// Adds what was told; true if it was the last.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::NumberOfExecutions { execution_count } => self.count = execution_count,
            Event::Stdout(text) => self.stdout += &text.text,
            Event::Stderr(text) => self.stderr += &text.text,
            Event::Result(result) => self.results.push(*result),
            Event::Error(error) => self.error = Some(error),
            Event::EndOfExecution => return true,
            Event::UnexpectedEndOfExecution => {
                self.lost = true;
                return true;
            }
            Event::Other => {}
        }
        false
    }
}
