//! Socket device.
mod state;
pub use state::VsockState;
