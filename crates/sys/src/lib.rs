//! Safe wrappers over the Linux system calls that forkd needs.
