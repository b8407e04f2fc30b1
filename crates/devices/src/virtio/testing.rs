//! A driver that plays the guest.
