//! Memory that is lent, filled, shared and lent again: a fresh 17 MB a frame costs more in page faults than
//! the network does.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use memmap2::MmapMut;

use crate::tensor::Element;

/// Where every buffer begins, so that tensors at multiples of it can be read in place.
pub const ALIGNMENT: usize = 64;

/// Blocks from this size on are mapped by themselves, in bytes.
const MAPPED_MIN_LEN: usize = 1 << 20;

/// Lends buffers and takes them back when the last reader is done. A clone is the same pool.
#[derive(Clone, Debug)]
pub struct Pool {
    state: Arc<PoolState>,
}

/// Memory of another kind than the heap for a pool to lend, such as what two processes share.
pub trait BufferProvider: fmt::Debug + Send + Sync {
    /// `len` bytes that begin at a multiple of [`ALIGNMENT`], whatever they were last; `None` if there are
    /// none to be had now. Never waits.
    fn take(&self, len: usize) -> Option<Box<dyn ProvidedBuffer>>;
}

/// A piece of such [`BufferProvider`], to be written and then shared.
pub trait ProvidedBuffer: AsRef<[u8]> + AsMut<[u8]> + Send + Sync {
    /// What was written; nothing is copied.
    fn freeze(self: Box<Self>) -> Bytes;
}

#[derive(Debug)]
struct PoolState {
    /// In the order in which they came back.
    idle: Mutex<Vec<IdleBlock>>,
    max_idle: usize,
    provider: Mutex<Option<Weak<dyn BufferProvider>>>,
}

#[derive(Debug)]
struct IdleBlock {
    block: Block,
    /// Whether it lay here at the last [`Pool::trim`].
    is_surplus: bool,
}

/// The memory of one buffer.
#[derive(Debug)]
enum Block {
    Heap(Vec<u8>),
    /// What is freed is the system's again at once. Of the heap it would not be: once glibc has freed a large
    /// block it cuts others from what it keeps, small allocations break that up, and memory grows by a whole
    /// observation now and then though no more of them are held.
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
    /// A pool that keeps at most `max_idle` buffers that nobody uses.
    pub fn new(max_idle: usize) -> Pool {
        Pool { state: Arc::new(PoolState { idle: Mutex::default(), max_idle, provider: Mutex::default() }) }
    }

    /// From now on, buffers are of this memory, as long as it is there and has any to lend; else its own as
    /// before.
    pub fn set_provider(&self, provider: &Arc<dyn BufferProvider>) {
        *self.state.provider.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(provider));
    }

    /// A buffer of `len` bytes, whatever they were last; never waits.
    pub fn take(&self, len: usize) -> Buffer {
        let provider = self.state.provider.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(provided) = provider.and_then(|provider| provider.upgrade()?.take(len)) {
            return Buffer { memory: Memory::Provided(provided) };
        }
        let needed = len + ALIGNMENT - 1;
        let mut idle = self.state.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, and not so large that a small message would pin a whole
        // observation's memory; among equals the one that was used last, so that what is not needed stays
        // untouched.
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

    /// Frees the buffers that nobody has used since this was called last. To be called every few seconds,
    /// also while nothing arrives.
    pub fn trim(&self) {
        let mut idle = self.state.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let (surplus, kept): (Vec<_>, Vec<_>) = idle.drain(..).partition(|block| block.is_surplus);
        idle.extend(kept.into_iter().map(|block| IdleBlock { is_surplus: true, ..block }));
        drop(idle);
        // Unmapping a whole observation takes a while, and a sensor may be waiting.
        drop(surplus);
    }
}

/// Writable memory that begins at a multiple of [`ALIGNMENT`]. Dropped or frozen and dropped, it goes back to
/// its pool.
pub struct Buffer {
    memory: Memory,
}

enum Memory {
    Pooled(PooledBlock),
    Provided(Box<dyn ProvidedBuffer>),
}

struct PooledBlock {
    block: Block,
    start: usize,
    len: usize,
    state: Weak<PoolState>,
}

impl Buffer {
    /// The memory as values, such as the `f32` of a depth image; as many as fit.
    pub fn values_mut<T: Element>(&mut self) -> &mut [T] {
        let whole = self.len() - self.len() % size_of::<T>();
        bytemuck::cast_slice_mut(&mut self[..whole])
    }

    /// What was written, to be shared; nothing is copied.
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
            let mut idle = state.idle.lock().unwrap_or_else(PoisonError::into_inner);
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
    fn memory_is_aligned_and_comes_back() {
        let pool = Pool::new(2);
        let first = pool.take(1000);
        let address = first.as_ptr();
        assert_eq!(address.align_offset(ALIGNMENT), 0);
        let shared = first.freeze();
        assert_ne!(pool.take(1000).as_ptr(), address, "it is still being read");
        drop(shared);
        let (a, b) = (pool.take(1000), pool.take(1000));
        assert!([a.as_ptr(), b.as_ptr()].contains(&address));
    }

    /// Lends one piece.
    #[derive(Debug)]
    struct One(Mutex<Option<Vec<u8>>>);

    impl BufferProvider for One {
        fn take(&self, len: usize) -> Option<Box<dyn ProvidedBuffer>> {
            let piece = self.0.lock().unwrap().take()?;
            Some(Box::new(Piece(piece[..len].to_vec())))
        }
    }

    struct Piece(Vec<u8>);

    impl AsRef<[u8]> for Piece {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl AsMut<[u8]> for Piece {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }

    impl ProvidedBuffer for Piece {
        fn freeze(self: Box<Self>) -> Bytes {
            self.0.into()
        }
    }

    #[test]
    fn supplied_memory_is_lent_while_it_is_there_and_has_any() {
        let pool = Pool::new(1);
        let memory: Arc<dyn BufferProvider> = Arc::new(One(Mutex::new(Some(vec![7; 100]))));
        pool.set_provider(&memory);
        let mut supplied = pool.take(10);
        supplied[0] = 1;
        assert_eq!(supplied.freeze(), [1, 7, 7, 7, 7, 7, 7, 7, 7, 7][..]);
        assert_eq!(pool.take(10)[..], [0; 10], "there was one piece");
        drop(memory);
        assert_eq!(pool.take(10).len(), 10);
    }

    /// Of this process, in bytes.
    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_freed_is_the_systems_again() {
        const LEN: usize = 16 << 20;
        let pool = Pool::new(3);
        let before = resident();
        let mut pins = Vec::new();
        for _ in 0..16 {
            let buffers: Vec<Buffer> = (0..3).map(|_| pool.take(LEN)).collect();
            for mut buffer in buffers {
                buffer.fill(1);
            }
            // Of the size that would be cut from what the heap keeps.
            pins.push(vec![1_u8; 100_000]);
            pool.trim();
            pool.trim();
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < LEN, "{grown} bytes of what was freed are still resident");
    }

    #[test]
    fn idle_memory_is_bounded() {
        let pool = Pool::new(1);
        drop((pool.take(64), pool.take(64), pool.take(64)));
        assert_eq!(pool.state.idle.lock().unwrap().len(), 1);
    }

    #[test]
    fn what_was_not_used_between_two_trims_is_freed() {
        let pool = Pool::new(8);
        let idle = || pool.state.idle.lock().unwrap().len();
        drop((pool.take(1000), pool.take(1000), pool.take(1000)));
        pool.trim();
        assert_eq!(idle(), 3, "they may be needed yet");
        let used = pool.take(1000).as_ptr();
        assert_eq!(pool.take(1000).as_ptr(), used, "the same one every time");
        pool.trim();
        assert_eq!(idle(), 1);
        pool.trim();
        assert_eq!(idle(), 0);
    }
}
