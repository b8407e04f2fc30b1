//! HTTP over Unix sockets: the codec, a server, a client, and the types of the per-VM API.
#![forbid(unsafe_code)]
