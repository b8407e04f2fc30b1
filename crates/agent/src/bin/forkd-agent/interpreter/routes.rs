//! The HTTP resources of the interpreter's port.

use std::time::Duration;

use forkd_agent::protocol::init::valid_env;
use forkd_agent::protocol::interpreter::{
    ContextInfo, CreateContextRequest, DEFAULT_CONTEXT, ExecuteRequest, Fault, PYTHON, WarmRequest,
};
use forkd_api::http::{RequestHead, Response};
use serde::de::DeserializeOwned;

use super::execution::Request;
use super::{ContextError, wire};
use crate::agent::Agent;
use crate::conn::Task;
use crate::slab::Key;

/// Longest time limit, in seconds: a week.
const MAX_LIMIT: f64 = 604_800.0;

/// An error answer.
pub fn fault(status: u16, message: impl Into<String>) -> Response {
    Response::json(status, &Fault { code: status, message: message.into() })
}

fn failure(error: &ContextError) -> Response {
    let status = match error {
        ContextError::Unknown(_) => 404,
        ContextError::Limit(_) => 429,
        ContextError::Start(_) => 500,
    };
    fault(status, error.to_string())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Response> {
    serde_json::from_slice(body).map_err(|e| fault(400, e.to_string()))
}

fn check_language(language: Option<&str>) -> Result<(), Response> {
    match language {
        None | Some("" | "python" | "python3") => Ok(()),
        Some(other) => {
            Err(fault(400, format!("language {other:?} is not spoken: only {PYTHON:?}")))
        }
    }
}

fn limit(seconds: Option<f64>) -> Result<Option<Duration>, Response> {
    match seconds {
        None => Ok(None),
        Some(0.0) => Ok(None),
        Some(s) if s > 0.0 && s <= MAX_LIMIT => Ok(Some(Duration::from_secs_f64(s))),
        Some(s) => Err(fault(400, format!("timeout {s} is not within 0 to {MAX_LIMIT} seconds"))),
    }
}

impl Agent {
    /// A request on the interpreter's port.
    pub fn interpreter_request(&mut self, key: Key, head: &RequestHead, body: &[u8]) {
        let path: Vec<&str> = head.path().split('/').filter(|part| !part.is_empty()).collect();
        let result = match (head.method.as_str(), path.as_slice()) {
            ("POST", ["execute"]) => self.route_execute(key, body),
            ("POST", ["warm"]) => self.route_warm(key, body),
            ("GET", ["health"]) => Err(Response::json(200, "OK")),
            ("GET", ["contexts"]) => Err(Response::json(200, &self.contexts.list())),
            ("POST", ["contexts"]) => self.route_create(key, body),
            ("DELETE", ["contexts", id]) => self.route_remove(id),
            ("POST", ["contexts", id, "restart"]) => self.route_restart(key, id),
            (method, _) => Err(fault(404, format!("no resource {method} {}", head.path()))),
        };
        if let Err(response) = result {
            self.respond(key, response);
        }
    }

    fn route_execute(&mut self, key: Key, body: &[u8]) -> Result<(), Response> {
        let request: ExecuteRequest = parse(body)?;
        check_language(request.language.as_deref())?;
        let limit = limit(request.timeout)?;
        let env = request.env_vars.unwrap_or_default();
        if let Some((name, _)) = env.iter().find(|(name, value)| !valid_env(name, value)) {
            return Err(fault(400, format!("env_vars: {name:?} cannot be a variable")));
        }
        let context = match request.context_id.as_deref() {
            None | Some("" | DEFAULT_CONTEXT) => self.default_context(),
            Some(id) => self.contexts.find(id).ok_or_else(|| ContextError::Unknown(id.to_owned())),
        };
        let context = context.map_err(|e| failure(&e))?;
        let request = Request::new(key, false, String::new(), request.code)
            .with_env(wire::env_field(&env))
            .with_limit(limit);
        self.execute(context, request).map_err(|e| failure(&e))
    }

    fn route_warm(&mut self, key: Key, body: &[u8]) -> Result<(), Response> {
        let request: WarmRequest = parse(body)?;
        let context = self.default_context().map_err(|e| failure(&e))?;
        let name = request.name.unwrap_or_default();
        self.execute(context, Request::new(key, true, name, request.code)).map_err(|e| failure(&e))
    }

    fn route_create(&mut self, key: Key, body: &[u8]) -> Result<(), Response> {
        let request: CreateContextRequest =
            if body.is_empty() { CreateContextRequest::default() } else { parse(body)? };
        check_language(request.language.as_deref())?;
        let cwd = request.cwd.filter(|cwd| !cwd.is_empty()).unwrap_or_else(|| self.system.home());
        let context = self.create_context(None, cwd).map_err(|e| failure(&e))?;
        self.wait_for_context(key, context);
        Ok(())
    }

    fn route_remove(&mut self, id: &str) -> Result<(), Response> {
        let context = self.contexts.find(id);
        let unknown = || failure(&ContextError::Unknown(id.to_owned()));
        self.remove_context(context.ok_or_else(unknown)?);
        Err(Response::empty(204))
    }

    fn route_restart(&mut self, key: Key, id: &str) -> Result<(), Response> {
        let unknown = || failure(&ContextError::Unknown(id.to_owned()));
        let context = self.contexts.find(id).ok_or_else(unknown)?;
        self.kill_python(context, "the context was restarted");
        self.revive_context(context).map_err(|e| failure(&e))?;
        self.wait_for_context(key, context);
        Ok(())
    }

    fn wait_for_context(&mut self, key: Key, context: Key) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.task = Task::StartContext(context);
        }
        if let Some(context) = self.contexts.all.get_mut(context) {
            context.waiters.push(key);
        }
    }

    /// A context that a client waits for is ready.
    pub fn context_ready(&mut self, key: Key, info: &ContextInfo) {
        self.respond(key, Response::json(200, info));
    }

    /// A context that a client waits for cannot be had.
    pub fn context_failed(&mut self, key: Key, why: &str) {
        self.respond(key, fault(500, format!("cannot start python3: {why}")));
    }

    /// The client of a request for a context has gone.
    pub fn context_waiter_gone(&mut self, key: Key, context: Key) {
        if let Some(context) = self.contexts.all.get_mut(context) {
            context.waiters.retain(|waiter| *waiter != key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive_and_finite() {
        assert_eq!(limit(Some(0.0)).unwrap(), None);
        assert_eq!(limit(Some(0.5)).unwrap(), Some(Duration::from_millis(500)));
        for bad in [-1.0, f64::NAN, f64::INFINITY, 1e9] {
            assert_eq!(limit(Some(bad)).unwrap_err().status, 400, "{bad}");
        }
        assert_eq!(check_language(Some("r")).unwrap_err().status, 400);
    }
}
