//! Persistent memory (virtio 1.2, section 5.19): the root image, read-only, mapped into the guest.
//!
//! The VMM maps the image and makes it a memory slot; all VMs of a host share its pages in the host's page
//! cache. The device only tells the guest where it is, and answers flush requests: there is nothing to
//! flush in a read-only mapping, so they succeed at once.

mod device;
mod metrics;
mod state;

pub use device::{Pmem, PmemConfig};
pub use metrics::PmemMetrics;
pub use state::PmemState;
