//! Counts that exist whatever transports are compiled in.

/// How frames used shared memory so far; all 0 without Zenoh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedMemoryCounts {
    /// Frames with pixels that travelled by reference.
    pub by_reference: u64,
    /// Frames with pixels that travelled by the network although there is shared memory: the peer cannot map
    /// it, or the pixels lay elsewhere.
    pub by_network: u64,
    /// How often there was no room, and the heap was used instead.
    pub exhausted: u64,
}
