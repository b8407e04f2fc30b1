//! The verbs, one file each.

pub mod bench;
pub mod bench_floor;
pub mod branch;
pub mod completions;
pub mod console;
pub mod doctor;
pub mod eval;
pub mod exec;
pub mod fork;
pub mod image;
pub mod info;
pub mod kill;
pub mod ls;
pub mod quickstart;
pub mod snapshot;
pub mod vm;
