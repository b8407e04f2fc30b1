//! The saved form of an entropy source.

use serde::{Deserialize, Serialize};

/// Nothing: there is no state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}
