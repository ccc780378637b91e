//! Shared memory for observations: other processes of this host map it, so that only a reference travels. It
//! is Zenoh's, with its safe garbage collector only: the other one reclaims memory that a stopped reader
//! still reads.

use std::{
    collections::HashMap,
    error::Error,
    fmt,
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use chiral_proto::{
    Frame, lock,
    pool::{ALIGNMENT, BufferProvider, ProvidedBuffer},
};
use zenoh::{
    Wait,
    bytes::ZBytes,
    internal::buffers::ZBuf,
    shm::{AllocAlignment, PosixShmProviderBackend, ShmProvider, ShmProviderBuilder, ZShm, ZShmMut},
};

use super::error::cause;
use crate::SharedMemoryCounts;

/// Segments up to this size are copied, wherever they lie.
const MAX_COPIED: usize = 4 * 1024;
/// An exhausted region is replaced, but not more often than this: readers may just hold that much.
const EXHAUSTED_PERIOD: Duration = Duration::from_secs(10);
/// The payload of a probe.
const PROBE: [u8; ALIGNMENT] = [0xC5; ALIGNMENT];

/// Shared memory to write observations into: one region, allocated once. While a fresh region takes its place
/// there are two, never more.
#[derive(Clone)]
pub struct SharedMemory {
    inner: Arc<Inner>,
}

struct Inner {
    /// Bytes per region.
    len: usize,
    regions: Arc<Mutex<Regions>>,
    frozen: Arc<Mutex<Frozen>>,
    counts: Counts,
}

struct Regions {
    current: Arc<Region>,
    /// The one before, as long as this process still uses it.
    previous: Weak<Region>,
    /// Part of the current region is lost: a reader was killed, and never returns what it held.
    has_lost_memory: bool,
    is_replacing: bool,
    /// There is no memory for a second region. It is not tried again, since each failure leaks memory.
    is_out_of_memory: bool,
    /// When the current region was created.
    created_at: Instant,
    /// The number of the next region.
    next_number: u64,
}

struct Region {
    number: u64,
    provider: ShmProvider<PosixShmProviderBackend>,
}

/// Buffers that were written and are shared now, each with its region's number, by start address.
type Frozen = HashMap<usize, (ZShm, u64)>;

#[derive(Default)]
struct Counts {
    by_reference: AtomicU64,
    by_network: AtomicU64,
    exhausted: AtomicU64,
}

impl SharedMemory {
    /// Allocates `len` bytes of shared memory.
    ///
    /// # Errors
    /// The system's error if it cannot be allocated: `/dev/shm` is too small, or the process may not lock as
    /// much (`ulimit -l`).
    pub fn new(len: usize) -> Result<SharedMemory, Box<dyn Error + Send + Sync>> {
        let len = len.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        let current = Arc::new(Region::new(0, len)?);
        let regions = Regions {
            current,
            previous: Weak::new(),
            has_lost_memory: false,
            is_replacing: false,
            is_out_of_memory: false,
            created_at: Instant::now(),
            next_number: 1,
        };
        let inner = Inner {
            len,
            regions: Arc::new(Mutex::new(regions)),
            frozen: Arc::default(),
            counts: Counts::default(),
        };
        Ok(SharedMemory { inner: Arc::new(inner) })
    }

    /// Returns the provider for a pool, which lends buffers from it as long as this exists.
    pub fn provider(&self) -> Arc<dyn BufferProvider> {
        Arc::clone(&self.inner) as Arc<dyn BufferProvider>
    }

    /// Returns how frames used it so far.
    pub fn counts(&self) -> SharedMemoryCounts {
        let Counts { by_reference, by_network, exhausted } = &self.inner.counts;
        let [by_reference, by_network, exhausted] =
            [by_reference, by_network, exhausted].map(|count| count.load(Ordering::Relaxed));
        SharedMemoryCounts { by_reference, by_network, exhausted }
    }

    /// Reports that a reader was lost, and with it the memory it held: a fresh region replaces the current
    /// one, as soon as the previous one is out of use.
    pub fn report_lost_reader(&self) {
        lock(&self.inner.regions).has_lost_memory = true;
        self.inner.replace_if_needed();
    }

    /// Returns the regions that all of a frame's pixels lie in; none if some lie elsewhere.
    pub(super) fn regions(&self, frame: &Frame) -> Vec<u64> {
        let frozen = lock(&self.inner.frozen);
        let mut regions = Vec::new();
        for segment in frame.segments() {
            match find_frozen(&frozen, segment) {
                Some((_, region)) if !regions.contains(region) => regions.push(*region),
                None if segment.len() > MAX_COPIED => return Vec::new(),
                _ => {}
            }
        }
        regions
    }

    /// Returns a frame's segments as a payload, those in shared memory by reference.
    pub(super) fn payload_by_reference(&self, segments: Vec<Bytes>) -> ZBytes {
        let mut payload = ZBytes::writer();
        let frozen = lock(&self.inner.frozen);
        // Borrow the segments: dropping the last reference to one takes the same lock.
        for segment in &segments {
            payload.append(match find_frozen(&frozen, segment) {
                Some((shared, _)) => ZBytes::from(shared.clone()),
                None => ZBytes::from(segment.clone()),
            });
        }
        drop(frozen);
        payload.finish()
    }

    /// Returns the payload of a probe, which lies in this region.
    pub(super) fn probe(&self, region: u64) -> Option<ZBytes> {
        let found = {
            let regions = lock(&self.inner.regions);
            let mut known =
                [Some(Arc::clone(&regions.current)), regions.previous.upgrade()].into_iter().flatten();
            known.find(|known| known.number == region)?
        };
        let mut buffer = found.alloc(PROBE.len())?;
        buffer.as_mut().copy_from_slice(&PROBE);
        Some(ZBytes::from(ZShm::from(buffer)))
    }

    /// Counts a frame with pixels.
    pub(super) fn count(&self, is_by_reference: bool) {
        let Counts { by_reference, by_network, .. } = &self.inner.counts;
        let count = if is_by_reference { by_reference } else { by_network };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether Zenoh sessions can allocate shared memory. Tried once per process, since each failure leaks
/// memory: Zenoh leaves mapped what could not be locked.
pub(super) fn is_available() -> bool {
    static TRIED: LazyLock<bool> = LazyLock::new(|| {
        Region::new(0, 2 << 20)
            .inspect_err(|error| {
                tracing::info!("no shared memory, so observations travel by the network: {error}")
            })
            .is_ok()
    });
    *TRIED
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("len", &self.inner.len)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl Region {
    fn new(number: u64, len: usize) -> Result<Region, Box<dyn Error + Send + Sync>> {
        // As a power of two.
        let alignment = AllocAlignment::new(ALIGNMENT.ilog2() as u8).map_err(|error| format!("{error:?}"))?;
        let provider =
            ShmProviderBuilder::default_backend((len, alignment)).wait().map_err(|error| cause(&error))?;
        Ok(Region { number, provider })
    }

    fn alloc(&self, len: usize) -> Option<ZShmMut> {
        let alloc = || self.provider.alloc(len).wait().ok();
        // Zenoh's own collecting policy tries again only if a single freed buffer is large enough.
        alloc().or_else(|| {
            self.provider.garbage_collect();
            alloc()
        })
    }
}

impl Inner {
    /// Replaces a region that has lost memory, unless there are two already. Runs on a thread, since the
    /// whole region is locked into memory.
    fn replace_if_needed(&self) {
        let mut regions = lock(&self.regions);
        let cannot_replace =
            regions.is_replacing || regions.is_out_of_memory || regions.previous.strong_count() > 0;
        if !regions.has_lost_memory || cannot_replace {
            return;
        }
        let (shared_regions, number, len) = (Arc::clone(&self.regions), regions.next_number, self.len);
        let replace = move || {
            let fresh = Region::new(number, len);
            let mut regions = lock(&shared_regions);
            regions.is_replacing = false;
            let fresh = match fresh {
                Ok(fresh) => Arc::new(fresh),
                Err(error) => {
                    regions.is_out_of_memory = true;
                    return tracing::warn!(
                        "no second region of shared memory, so what lost peers held in it stays lost: {error}"
                    );
                }
            };
            let old = std::mem::replace(&mut regions.current, fresh);
            regions.previous = Arc::downgrade(&old);
            (regions.has_lost_memory, regions.created_at) = (false, Instant::now());
            drop(regions);
            tracing::debug!("replaced the region of shared memory after a peer was lost");
        };
        regions.is_replacing = thread::Builder::new().name("chiral-memory".to_owned()).spawn(replace).is_ok();
        regions.next_number += 1;
    }
}

impl BufferProvider for Inner {
    fn take(&self, len: usize) -> Option<Box<dyn ProvidedBuffer>> {
        self.replace_if_needed();
        let region = Arc::clone(&lock(&self.regions).current);
        let Some(memory) = region.alloc(len) else {
            self.counts.exhausted.fetch_add(1, Ordering::Relaxed);
            // A reader that held memory when its process ended in good order does not return it either.
            let mut regions = lock(&self.regions);
            regions.has_lost_memory |= regions.created_at.elapsed() > EXHAUSTED_PERIOD;
            return None;
        };
        Some(Box::new(WritableBuffer { memory, region, frozen: Arc::clone(&self.frozen) }))
    }
}

/// A buffer that is being written.
struct WritableBuffer {
    memory: ZShmMut,
    region: Arc<Region>,
    frozen: Arc<Mutex<Frozen>>,
}

impl AsRef<[u8]> for WritableBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref()
    }
}

impl AsMut<[u8]> for WritableBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut()
    }
}

impl ProvidedBuffer for WritableBuffer {
    fn freeze(self: Box<Self>) -> Bytes {
        let WritableBuffer { memory, region, frozen } = *self;
        let memory = ZShm::from(memory);
        lock(&frozen).insert(start_address(&memory), (memory.clone(), region.number));
        Bytes::from_owner(SharedBuffer { memory, _region: region, frozen })
    }
}

/// A buffer that was written and is shared. It keeps its region alive.
struct SharedBuffer {
    memory: ZShm,
    _region: Arc<Region>,
    frozen: Arc<Mutex<Frozen>>,
}

impl AsRef<[u8]> for SharedBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref()
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        lock(&self.frozen).remove(&start_address(&self.memory));
    }
}

/// Finds the frozen buffer that is exactly these bytes.
fn find_frozen<'a>(frozen: &'a Frozen, bytes: &Bytes) -> Option<&'a (ZShm, u64)> {
    frozen.get(&bytes.as_ptr().addr()).filter(|(memory, _)| memory.len() == bytes.len())
}

fn start_address(memory: &[u8]) -> usize {
    memory.as_ptr().addr()
}

/// Returns a received payload's segments: those in shared memory as they are, the rest copied.
pub(super) fn received_segments(payload: &ZBytes) -> Vec<Bytes> {
    let slices = ZBuf::from(payload.clone()).into_zslices();
    let segment = |slice: ZBytes| match slice.as_shm() {
        Some(shared) => Bytes::from_owner(shared.to_owned()),
        None => Bytes::copy_from_slice(&slice.to_bytes()),
    };
    slices.map(|slice| segment(ZBytes::from(ZBuf::from(slice)))).collect()
}

/// Whether a probe's payload was mapped from shared memory.
pub(super) fn is_shared_probe(probe: &ZBytes) -> bool {
    probe.as_shm().is_some_and(|shared| shared.as_ref() == &PROBE[..])
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("len", &self.len).finish_non_exhaustive()
    }
}
