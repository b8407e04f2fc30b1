//! `POST /init`: taking an identity, and being told of a fork.
//!
//! Everything that makes this VM differ from its siblings happens here, before the answer: see
//! `forkd_agent::protocol::init`. The order matters: the kernel's generator first, since the
//! interpreters draw their seeds from it.

use std::time::Duration;

use forkd_agent::protocol::init::{InitFault, InitRequest, Reason};
use forkd_api::http::Response;

use crate::agent::{Agent, Timer};
use crate::conn::{Gone, Task};
use crate::slab::Key;
use crate::system::SystemError;
use crate::timers::TimerId;

/// How long idle interpreters may take to reseed. It takes milliseconds, but a hundred guests that were forked at
/// once share the host's CPUs. Less than the VMM waits for the answer (`ACK_TIMEOUT` there), so that it hears why.
const RESEED_LIMIT: Duration = Duration::from_secs(45);

/// A notice that waits for interpreters.
pub struct PendingInit {
    conn: Key,
    waiting: Vec<Key>,
    timer: Option<TimerId>,
}

fn fault(code: u16, message: impl Into<String>) -> Response {
    Response::json(code, &InitFault { code, message: message.into() }).closing()
}

impl Agent {
    /// Does what the notice says; the answer is sent here, or once interpreters have reseeded.
    pub fn init_request(&mut self, key: Key, body: &[u8]) {
        let parsed = if body.is_empty() { Ok(InitRequest::default()) } else { parse(body) };
        let request = match parsed {
            Ok(request) => request,
            Err(response) => {
                self.respond(key, response);
                return;
            }
        };
        if request.reason == Reason::Fork {
            self.forget_the_past(key);
        }
        if let Some(pending) = &self.pending_init
            && self.conns.get(pending.conn).is_some()
        {
            self.respond(key, fault(409, "another /init is not done yet"));
            return;
        }
        if let Err(error) = self.take_identity(&request) {
            self.respond(key, fault(500, error.to_string()));
            return;
        }
        if !request.env.is_empty() && self.env != request.env {
            self.env = request.env;
            self.env_version += 1;
        }
        let waiting = if request.identity.is_some() { self.reseed_contexts() } else { Vec::new() };
        if waiting.is_empty() {
            // Whoever sends it has no more to say: watching the connection would be work for nothing.
            self.respond(key, Response::empty(204).closing());
            return;
        }
        let timer = self.timers.after(RESEED_LIMIT, Timer::InitDeadline(key));
        self.pending_init = Some(PendingInit { conn: key, waiting, timer });
        if let Some(conn) = self.conns.get_mut(key) {
            conn.task = Task::Init;
        }
    }

    /// Gives up every other connection: at their other ends are our parent's clients.
    fn forget_the_past(&mut self, key: Key) {
        for other in self.conns.keys() {
            if other != key {
                self.close_conn(other, Gone::Broken);
            }
        }
        if let Some(pending) = self.pending_init.take() {
            self.timers.cancel(pending.timer);
        }
    }

    fn take_identity(&mut self, request: &InitRequest) -> Result<(), SystemError> {
        if !request.entropy.is_empty() {
            self.system.mix_entropy(&request.entropy)?;
        }
        if let Some(ns) = request.realtime_unix_ns {
            self.system.set_clock(ns)?;
        }
        if let Some(identity) = &request.identity {
            self.system.set_hostname(&identity.hostname)?;
            self.system.set_machine_id(&identity.machine_id)?;
        }
        Ok(())
    }

    /// An interpreter has reseeded, or is no more.
    pub fn init_context_done(&mut self, context: Key) {
        let Some(pending) = &mut self.pending_init else { return };
        pending.waiting.retain(|waiting| *waiting != context);
        if !pending.waiting.is_empty() {
            return;
        }
        let (conn, timer) = (pending.conn, pending.timer);
        self.pending_init = None;
        self.timers.cancel(timer);
        self.respond(conn, Response::empty(204).closing());
    }

    /// Interpreters have not reseeded in time: nothing may be served, so the notice fails.
    pub fn init_deadline(&mut self, key: Key) {
        let Some(pending) = self.pending_init.take_if(|pending| pending.conn == key) else {
            return;
        };
        let text = format!(
            "{} idle interpreters have not reseeded within {} s",
            pending.waiting.len(),
            RESEED_LIMIT.as_secs()
        );
        self.respond(key, fault(500, text));
    }
}

fn parse(body: &[u8]) -> Result<InitRequest, Response> {
    let request: InitRequest =
        serde_json::from_slice(body).map_err(|e| fault(400, e.to_string()))?;
    request.validate().map_err(|e| fault(400, e.to_string()))?;
    Ok(request)
}
