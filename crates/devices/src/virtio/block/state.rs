//! The saved form of a block device and its layer.

use serde::{Deserialize, Serialize};

/// What a restored device must agree with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// The device refuses writes.
    pub read_only: bool,
    /// Answer to GET_ID.
    pub id: Vec<u8>,
}

/// What a run of blocks in the layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExtentKind {
    /// Content follows in the layer's data.
    Data,
    /// Zeroes, without data.
    Zero,
}

/// A run of changed blocks of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First block.
    pub first: u64,
    /// Number of blocks, at least 1.
    pub count: u64,
    /// What they are.
    pub kind: ExtentKind,
}

/// The shape of a layer: runs in ascending order, disjoint. Their data is written apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerState {
    /// All changed blocks.
    pub extents: Vec<Extent>,
}

impl LayerState {
    /// Bytes of data that belong to this shape.
    pub fn data_len(&self) -> u64 {
        let data = self.extents.iter().filter(|e| e.kind == ExtentKind::Data);
        data.fold(0u64, |sum, e| {
            sum.saturating_add(e.count.saturating_mul(super::BLOCK_SIZE as u64))
        })
    }
}
