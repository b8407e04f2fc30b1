//! Packet headers (virtio 1.2, section 5.10.6).

/// Length of a header in bytes.
pub(super) const HEADER_LEN: usize = 44;
/// Most payload bytes of a packet: VIRTIO_VSOCK_MAX_PKT_BUF_SIZE of Linux's virtio_vsock.h.
pub(super) const MAX_PAYLOAD: usize = 64 * 1024;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;

/// Operations (virtio 1.2, section 5.10.6).
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN (virtio 1.2, section 5.10.6.5).
pub(super) mod shut {
    /// The sender will not receive any more.
    pub const RCV: u32 = 1;
    /// The sender will not send any more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RCV | SEND;
}

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as it lies in an event buffer (section 5.10.6.7).
pub(super) const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The two ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A packet's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut at = 0;
        let mut take = |len: usize| {
            let mut value = [0; 8];
            value[..len].copy_from_slice(&bytes[at..at + len]);
            at += len;
            u64::from_le_bytes(value)
        };
        // Each field is as wide as what it is cast to.
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    /// The ports, for a packet that the guest sent.
    pub(super) fn ports_from_guest(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn header_survives_its_bytes(bytes in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_says() {
        let header =
            Header { src_port: 7, op: op::RW, kind: TYPE_STREAM, fwd_cnt: 9, ..Header::default() };
        let bytes = header.to_bytes();
        assert_eq!((bytes[16], bytes[28], bytes[30], bytes[40]), (7, 1, 5, 9));
    }
}
