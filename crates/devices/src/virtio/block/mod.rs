//! Block device (virtio 1.2, section 5.2) with a private copy-on-write layer.
//!
//! ```text
//!   request ──> device: header, limits, status ──> disk: which block lies where ──> layer (memory)
//!                                                                               └─> base (file, pread)
//! ```
//!
//! The base is never written and never mapped, so other VMs may use it too. What the guest writes goes,
//! in blocks of 4 KiB, into anonymous memory of this process: fork(2) captures it at the same instant as
//! RAM, and shares it copy-on-write, at no further cost. A FLUSH is therefore done as soon as it is asked.
//!
//! Known holes: the layer counts as memory of the VM process; it does not survive that process, other
//! than by a durable snapshot ([`Disk::layer_state`], [`Disk::write_layer`]).

mod bitmap;
mod device;
mod disk;
mod layer;
mod metrics;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Block, BlockConfig};
pub use disk::{Disk, DiskConfig, DiskError};
pub use layer::BLOCK_SIZE;
pub use metrics::BlockMetrics;
pub use state::{BlockState, Extent, ExtentKind, LayerState};
