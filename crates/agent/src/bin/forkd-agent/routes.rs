//! From a request to what serves it.

use std::fs;

use forkd_agent::protocol::connect::{Code, RpcError, STREAM_TYPE, encode_end};
use forkd_agent::protocol::{init, process};
use forkd_api::http::{RequestHead, Response};
use serde::Serialize;

use crate::agent::Agent;
use crate::conn::Service;
use crate::interpreter::routes::fault;
use crate::process::rpc::rpc_failure;
use crate::slab::Key;

/// `GET /metrics`, in envd's form.
#[derive(Debug, Serialize)]
struct Metrics {
    /// Seconds since 1970.
    ts: u64,
    cpu_count: usize,
    /// Since the boot, in percent of all CPUs.
    cpu_used_pct: f32,
    mem_total: u64,
    mem_used: u64,
    disk_used: u64,
    disk_total: u64,
}

impl Agent {
    /// A request's head is there; its body may follow.
    pub fn request_begins(&mut self, key: Key, head: RequestHead) {
        let envd = self.conns.get(key).is_some_and(|conn| conn.service == Service::Envd);
        let method = head.path().strip_prefix(process::SERVICE);
        if envd && head.method == "POST" && method == Some("StreamInput") {
            self.input_begins(key);
        } else {
            self.keep_head(key, head);
        }
    }

    /// A request is there as a whole.
    pub fn request(&mut self, key: Key, head: &RequestHead, body: &[u8]) {
        match self.conns.get(key).map(|conn| conn.service) {
            Some(Service::Envd) => self.envd_request(key, head, body),
            Some(Service::Interpreter) => self.interpreter_request(key, head, body),
            None => {}
        }
    }

    fn envd_request(&mut self, key: Key, head: &RequestHead, body: &[u8]) {
        let response = match (head.method.as_str(), head.path()) {
            ("POST", path) if path.starts_with(process::SERVICE) => {
                let method = path.trim_start_matches(process::SERVICE);
                return self.process_rpc(key, method, head, body);
            }
            ("POST", init::PATH) => return self.init_request(key, body),
            ("GET", "/health") => Response::empty(204),
            ("GET", "/envs") => Response::json(200, &self.env),
            ("GET", "/metrics") => Response::json(200, &metrics()),
            ("POST", path) if path.starts_with("/filesystem.Filesystem/") => {
                return self.unimplemented(key, head, "filesystem.Filesystem is not served yet");
            }
            (_, "/files") => fault(501, "/files is not served yet"),
            (method, path) => fault(404, format!("no resource {method} {path}")),
        };
        self.respond(key, response);
    }

    /// Refuses an RPC in the form that its client expects.
    fn unimplemented(&mut self, key: Key, head: &RequestHead, text: &str) {
        let error = RpcError::new(Code::Unimplemented, text);
        let content_type = head.headers.get("content-type").unwrap_or("");
        if !content_type.starts_with(STREAM_TYPE) {
            self.respond(key, rpc_failure(&error));
            return;
        }
        self.begin_stream(key, STREAM_TYPE);
        if let Some(conn) = self.conns.get_mut(key) {
            conn.out.piece(|out| encode_end(out, Some(&error)));
        }
        self.end_stream(key);
    }
}

fn metrics() -> Metrics {
    let cpu_count = std::thread::available_parallelism().map_or(1, usize::from);
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    let total = info.totalram * unit;
    let available = available_memory().unwrap_or(info.freeram * unit);
    let disk = rustix::fs::statvfs("/").ok();
    let blocks = |f: fn(&rustix::fs::StatVfs) -> u64| {
        disk.as_ref().map_or(0, |disk| f(disk).saturating_mul(disk.f_frsize))
    };
    Metrics {
        ts: forkd_sys::clock::realtime_ns() / 1_000_000_000,
        cpu_count,
        cpu_used_pct: cpu_used().unwrap_or(0.0),
        mem_total: total,
        mem_used: total.saturating_sub(available),
        disk_used: blocks(|d| d.f_blocks.saturating_sub(d.f_bfree)),
        disk_total: blocks(|d| d.f_blocks),
    }
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Share of time that was not idle since the boot, from the first line of /proc/stat, in percent.
fn cpu_used() -> Option<f32> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let times: Vec<u64> = text
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|field| field.parse().ok())
        .collect();
    let total: u64 = times.iter().sum();
    let idle = times.get(3)? + times.get(4)?;
    Some(((total - idle) as f64 / total.max(1) as f64 * 100.0) as f32)
}
