//! Device models: buses, serial, vmgenid, virtio.
