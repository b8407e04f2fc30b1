//! HTTP over Unix sockets: the codec, a server, a client, and the types of the per-VM API.
//!
//! [`http`] is the codec: it does no I/O. [`server`] drives it from an event loop that must not
//! block, [`client`] from a thread that may. [`types`] are the bodies of the per-VM API.
#![forbid(unsafe_code)]

pub mod client;
pub mod http;
mod pages;
pub mod server;
pub mod types;
