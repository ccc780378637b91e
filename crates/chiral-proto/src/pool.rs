//! [`Pool`]: reuses the memory of large buffers. Allocating 17 MB for every frame would cost more in page
//! faults than the network does.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, Weak},
};

use bytes::Bytes;
use memmap2::MmapMut;

use crate::{lock::lock, tensor::Element};

/// Every buffer begins at a multiple of this, so that tensors in it can be read in place.
pub const ALIGNMENT: usize = 64;

/// The size in bytes from which a block is a memory mapping of its own.
const MAPPED_MIN_LEN: usize = 1 << 20;

/// Hands out buffers, and reuses their memory once the last reader has dropped it. A clone is the same pool.
#[derive(Clone, Debug)]
pub struct Pool {
    state: Arc<PoolState>,
}

/// A source of buffers that a [`Pool`] uses instead of its own memory, such as memory shared between
/// processes.
pub trait BufferProvider: fmt::Debug + Send + Sync {
    /// Returns `len` bytes of arbitrary content that begin at a multiple of [`ALIGNMENT`], or `None` if none
    /// are available. Does not block.
    fn take(&self, len: usize) -> Option<Box<dyn ProvidedBuffer>>;
}

/// A writable buffer of a [`BufferProvider`]. [`Buffer`] wraps it for the pool's users.
pub trait ProvidedBuffer: AsRef<[u8]> + AsMut<[u8]> + Send + Sync {
    /// Makes the content read-only and shareable, without a copy.
    fn freeze(self: Box<Self>) -> Bytes;
}

#[derive(Debug)]
struct PoolState {
    /// In the order in which they were returned.
    idle: Mutex<Vec<IdleBlock>>,
    max_idle: usize,
    provider: Mutex<Option<Weak<dyn BufferProvider>>>,
}

/// A block that no buffer uses.
#[derive(Debug)]
struct IdleBlock {
    block: Block,
    /// Whether it was already idle at the last [`Pool::trim`].
    is_surplus: bool,
}

/// The pool's own memory for one buffer.
#[derive(Debug)]
enum Block {
    Heap(Vec<u8>),
    /// An anonymous mapping, which returns to the system as soon as it is freed. Heap memory would not: glibc
    /// keeps a large block that it has freed, small allocations fragment it, and from time to time the
    /// process grows by the size of an observation although it does not hold more of them.
    Mapped(MmapMut),
}

impl Block {
    fn zeroed(len: usize) -> Block {
        let mapped = (len >= MAPPED_MIN_LEN).then(|| MmapMut::map_anon(len).ok()).flatten();
        mapped.map_or_else(|| Block::Heap(vec![0; len]), Block::Mapped)
    }
}

impl Default for Block {
    fn default() -> Block {
        Block::Heap(Vec::new())
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Block::Heap(memory) => memory,
            Block::Mapped(memory) => memory,
        }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Block::Heap(memory) => memory,
            Block::Mapped(memory) => memory,
        }
    }
}

impl Pool {
    /// Creates a pool that keeps the memory of at most `max_idle` unused buffers.
    pub fn new(max_idle: usize) -> Pool {
        Pool { state: Arc::new(PoolState { idle: Mutex::default(), max_idle, provider: Mutex::default() }) }
    }

    /// Takes buffers from `provider` from now on. The pool falls back to its own memory while the provider
    /// has none available, and once it is dropped.
    pub fn set_provider(&self, provider: &Arc<dyn BufferProvider>) {
        *lock(&self.state.provider) = Some(Arc::downgrade(provider));
    }

    /// Returns a buffer of `len` bytes of arbitrary content. Does not block.
    pub fn take(&self, len: usize) -> Buffer {
        let provider = lock(&self.state.provider).clone();
        if let Some(provided) = provider.and_then(|provider| provider.upgrade()?.take(len)) {
            return Buffer { memory: Memory::Provided(provided) };
        }
        let needed = len + ALIGNMENT - 1;
        let mut idle = lock(&self.state.idle);
        // The smallest block that is large enough, but at most twice as large as needed: a small message must
        // not pin the memory of a whole observation. Among blocks of equal size the one that was used last,
        // so that surplus blocks stay unused and `trim` frees them.
        let len_of = |&i: &usize| idle[i].block.len();
        let best =
            (0..idle.len()).rev().filter(|i| (needed..=needed * 2).contains(&len_of(i))).min_by_key(len_of);
        let block = best.map(|i| idle.remove(i).block);
        drop(idle);
        let block = block.unwrap_or_else(|| Block::zeroed(needed));
        let start = block.as_ptr().align_offset(ALIGNMENT);
        Buffer {
            memory: Memory::Pooled(PooledBlock { block, start, len, state: Arc::downgrade(&self.state) }),
        }
    }

    /// Frees the memory that has not been used since the last call. Call it every few seconds, also while
    /// nothing arrives.
    pub fn trim(&self) {
        let mut idle = lock(&self.state.idle);
        let (surplus, kept): (Vec<_>, Vec<_>) = idle.drain(..).partition(|block| block.is_surplus);
        idle.extend(kept.into_iter().map(|block| IdleBlock { is_surplus: true, ..block }));
        drop(idle);
        // After the lock is released: unmapping an observation takes a while, and a sensor may be waiting.
        drop(surplus);
    }
}

/// Writable memory from a [`Pool`], beginning at a multiple of [`ALIGNMENT`]. Its memory returns to the pool
/// when the buffer, or the last clone of the [`Bytes`] that it was frozen into, is dropped.
pub struct Buffer {
    memory: Memory,
}

/// Where a buffer's memory comes from.
enum Memory {
    Pooled(PooledBlock),
    Provided(Box<dyn ProvidedBuffer>),
}

/// The part of a block that a buffer uses. Returns the block to the pool when dropped.
struct PooledBlock {
    block: Block,
    start: usize,
    len: usize,
    state: Weak<PoolState>,
}

impl Buffer {
    /// The memory as a slice of `T`, such as `f32` for a depth image; as many values as fit.
    pub fn values_mut<T: Element>(&mut self) -> &mut [T] {
        let whole = self.len() - self.len() % size_of::<T>();
        bytemuck::cast_slice_mut(&mut self[..whole])
    }

    /// Makes the content read-only and shareable, without a copy.
    pub fn freeze(self) -> Bytes {
        match self.memory {
            Memory::Pooled(block) => Bytes::from_owner(block),
            Memory::Provided(provided) => provided.freeze(),
        }
    }
}

impl From<Buffer> for Bytes {
    fn from(buffer: Buffer) -> Bytes {
        buffer.freeze()
    }
}

impl AsRef<[u8]> for PooledBlock {
    fn as_ref(&self) -> &[u8] {
        &self.block[self.start..self.start + self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        match &self.memory {
            Memory::Pooled(block) => block.as_ref(),
            Memory::Provided(provided) => (**provided).as_ref(),
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_ref()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Pooled(PooledBlock { block, start, len, .. }) => &mut block[*start..*start + *len],
            Memory::Provided(provided) => (**provided).as_mut(),
        }
    }
}

impl Drop for PooledBlock {
    fn drop(&mut self) {
        if let Some(state) = self.state.upgrade() {
            let mut idle = lock(&state.idle);
            if idle.len() < state.max_idle {
                idle.push(IdleBlock { block: std::mem::take(&mut self.block), is_surplus: false });
            }
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_their_memory_is_reused() {
        let pool = Pool::new(2);
        let first = pool.take(1000);
        let address = first.as_ptr();
        assert_eq!(address.align_offset(ALIGNMENT), 0);
        let shared = first.freeze();
        assert_ne!(pool.take(1000).as_ptr(), address, "the first buffer is still being read");
        drop(shared);
        let (a, b) = (pool.take(1000), pool.take(1000));
        assert!([a.as_ptr(), b.as_ptr()].contains(&address));
    }

    /// Provides one buffer.
    #[derive(Debug)]
    struct OneBuffer(Mutex<Option<Vec<u8>>>);

    impl BufferProvider for OneBuffer {
        fn take(&self, len: usize) -> Option<Box<dyn ProvidedBuffer>> {
            let memory = self.0.lock().unwrap().take()?;
            Some(Box::new(TestBuffer(memory[..len].to_vec())))
        }
    }

    struct TestBuffer(Vec<u8>);

    impl AsRef<[u8]> for TestBuffer {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl AsMut<[u8]> for TestBuffer {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }

    impl ProvidedBuffer for TestBuffer {
        fn freeze(self: Box<Self>) -> Bytes {
            self.0.into()
        }
    }

    #[test]
    fn buffers_come_from_the_provider_while_it_exists_and_has_any() {
        let pool = Pool::new(1);
        let provider: Arc<dyn BufferProvider> = Arc::new(OneBuffer(Mutex::new(Some(vec![7; 100]))));
        pool.set_provider(&provider);
        let mut provided = pool.take(10);
        provided[0] = 1;
        assert_eq!(provided.freeze(), [1, 7, 7, 7, 7, 7, 7, 7, 7, 7][..]);
        assert_eq!(pool.take(10)[..], [0; 10], "the provider has no second buffer");
        drop(provider);
        assert_eq!(pool.take(10).len(), 10);
    }

    /// The resident memory of this process, in bytes.
    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn freed_memory_returns_to_the_system() {
        const LEN: usize = 16 << 20;
        let pool = Pool::new(3);
        let before = resident();
        let mut pins = Vec::new();
        for _ in 0..16 {
            let buffers: Vec<Buffer> = (0..3).map(|_| pool.take(LEN)).collect();
            for mut buffer in buffers {
                buffer.fill(1);
            }
            // Of a size for which the heap would reuse the freed blocks.
            pins.push(vec![1_u8; 100_000]);
            pool.trim();
            pool.trim();
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < LEN, "{grown} freed bytes are still resident");
    }

    #[test]
    fn the_number_of_idle_blocks_is_bounded() {
        let pool = Pool::new(1);
        drop((pool.take(64), pool.take(64), pool.take(64)));
        assert_eq!(pool.state.idle.lock().unwrap().len(), 1);
    }

    #[test]
    fn memory_that_is_not_used_between_two_trims_is_freed() {
        let pool = Pool::new(8);
        let idle = || pool.state.idle.lock().unwrap().len();
        drop((pool.take(1000), pool.take(1000), pool.take(1000)));
        pool.trim();
        assert_eq!(idle(), 3, "a first trim frees nothing");
        let used = pool.take(1000).as_ptr();
        assert_eq!(pool.take(1000).as_ptr(), used, "the same block every time");
        pool.trim();
        assert_eq!(idle(), 1);
        pool.trim();
        assert_eq!(idle(), 0);
    }
}
