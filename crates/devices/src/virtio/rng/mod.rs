//! Entropy source (virtio 1.2, section 5.4): fills guest buffers from the host kernel's generator.
//!
//! It has no state of its own, so the children of a fork cannot share any.

mod device;
mod metrics;
mod state;

pub use device::Rng;
pub use metrics::RngMetrics;
pub use state::RngState;
