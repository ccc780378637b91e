//! [`Frame`]: one encoded message, `u32 LE header_len | header | padding | payload`. In memory it is a list
//! of segments, which are sent without being joined.
//!
//! The layout of frames is defined here for all codecs; the content of the header is up to the codec.

use std::cell::Cell;

use bytes::{Bytes, BytesMut};

use crate::{
    error::{DecodeError, EncodeError},
    pool::ALIGNMENT,
};

/// The bytes of one message, as an ordered list of segments.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    segments: Vec<Bytes>,
}

impl Frame {
    /// The segments, in order. Their concatenation is the frame.
    pub fn segments(&self) -> &[Bytes] {
        &self.segments
    }

    /// The length of the frame in bytes.
    pub fn len(&self) -> usize {
        self.segments.iter().map(Bytes::len).sum()
    }

    /// Whether the frame has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The frame as one buffer. Copies it unless it has exactly one segment.
    pub fn into_bytes(mut self) -> Bytes {
        if self.segments.len() == 1 {
            return self.segments.remove(0);
        }
        let mut whole = BytesMut::with_capacity(self.len());
        for segment in &self.segments {
            whole.extend_from_slice(segment);
        }
        whole.freeze()
    }
}

impl From<Bytes> for Frame {
    fn from(whole: Bytes) -> Frame {
        Frame { segments: vec![whole] }
    }
}

impl From<Vec<Bytes>> for Frame {
    fn from(segments: Vec<Bytes>) -> Frame {
        Frame { segments }
    }
}

impl PartialEq for Frame {
    fn eq(&self, other: &Frame) -> bool {
        let bytes = |frame: &Frame| frame.segments.clone().into_iter().flatten();
        self.len() == other.len() && bytes(self).eq(bytes(other))
    }
}

/// Lays out a payload while its header is written.
#[derive(Debug)]
pub(crate) struct PayloadWriter {
    alignment: usize,
    segments: Vec<Bytes>,
    len: usize,
}

impl PayloadWriter {
    /// Creates a payload whose parts begin at multiples of `alignment`, at most [`ALIGNMENT`].
    pub(crate) fn new(alignment: usize) -> PayloadWriter {
        PayloadWriter { alignment, segments: Vec::new(), len: 0 }
    }

    /// Appends `data` by reference and returns its offset; 0 if it is empty.
    pub(crate) fn push(&mut self, data: &Bytes) -> usize {
        if data.is_empty() {
            return 0;
        }
        let offset = self.len.next_multiple_of(self.alignment);
        if offset > self.len {
            self.segments.push(zeros(offset - self.len));
        }
        self.segments.push(data.clone());
        self.len = offset + data.len();
        offset
    }

    /// Returns the frame. `encode_header` appends the header, whose length is `header_len`.
    pub(crate) fn finish(
        self,
        header_len: usize,
        encode_header: impl FnOnce(&mut BytesMut),
    ) -> Result<Frame, EncodeError> {
        let prefix = u32::try_from(header_len).map_err(|_| EncodeError::TooLong { len: header_len })?;
        let head_len = (4 + header_len).next_multiple_of(self.alignment);
        let mut head = BytesMut::with_capacity(head_len);
        head.extend_from_slice(&prefix.to_le_bytes());
        encode_header(&mut head);
        debug_assert_eq!(head.len(), 4 + header_len);
        head.resize(head_len, 0);
        let mut segments = Vec::with_capacity(1 + self.segments.len());
        segments.push(head.freeze());
        segments.extend(self.segments);
        Ok(Frame { segments })
    }
}

/// The payload of a received frame.
#[derive(Debug)]
pub(crate) struct Payload {
    segments: Vec<Bytes>,
    len: usize,
    alignment: usize,
    /// The end of the part that was taken last.
    consumed: Cell<usize>,
}

impl Payload {
    /// The length of the payload in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the part at `offset`: a slice of the received memory, copied only if it crosses segments.
    /// Parts must be taken in order, so that no peer can make us copy the same bytes more than once.
    pub(crate) fn take(&self, offset: usize, len: usize) -> Result<Bytes, DecodeError> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let earliest = self.consumed.get().next_multiple_of(self.alignment);
        if offset < earliest || !offset.is_multiple_of(self.alignment) {
            let expected =
                format_args!("a multiple of {} that is at least {earliest}", self.alignment).to_string();
            return Err(DecodeError::new("offset", expected, offset));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {
                self.consumed.set(end);
                Ok(slice(&self.segments, offset, len))
            }
            _ => {
                let expected = format_args!("a range within the {} bytes of payload", self.len).to_string();
                Err(DecodeError::new("offset", expected, format_args!("{len} bytes at {offset}")))
            }
        }
    }
}

/// Splits a received frame into the header's bytes and the payload, whose parts begin at multiples of
/// `alignment`.
pub(crate) fn split(frame: Frame, alignment: usize) -> Result<(Bytes, Payload), DecodeError> {
    let len = frame.len();
    if len < 4 {
        return Err(DecodeError::new("frame", "at least 4 bytes", format_args!("{len}")));
    }
    let mut prefix = [0; 4];
    prefix.copy_from_slice(&slice(&frame.segments, 0, 4));
    let header_len = u32::from_le_bytes(prefix) as usize;
    if header_len > len - 4 {
        return Err(DecodeError::new(
            "header_len",
            format_args!("at most the {} bytes that follow it", len - 4),
            header_len,
        ));
    }
    let header = slice(&frame.segments, 4, header_len);
    let mut skip = (4 + header_len).next_multiple_of(alignment).min(len);
    let payload_len = len - skip;
    let mut segments = frame.segments;
    segments.retain_mut(|segment| {
        let skipped = skip.min(segment.len());
        skip -= skipped;
        *segment = segment.slice(skipped..);
        !segment.is_empty()
    });
    Ok((header, Payload { segments, len: payload_len, alignment, consumed: Cell::new(0) }))
}

fn slice(segments: &[Bytes], mut offset: usize, len: usize) -> Bytes {
    let mut joined = BytesMut::new();
    for segment in segments {
        if offset >= segment.len() {
            offset -= segment.len();
            continue;
        }
        let wanted = len - joined.len();
        if joined.is_empty() && offset + wanted <= segment.len() {
            return segment.slice(offset..offset + wanted);
        }
        joined.reserve(wanted);
        joined.extend_from_slice(&segment[offset..segment.len().min(offset + wanted)]);
        offset = 0;
        if joined.len() == len {
            break;
        }
    }
    joined.freeze()
}

fn zeros(len: usize) -> Bytes {
    static ZEROS: [u8; ALIGNMENT] = [0; ALIGNMENT];
    Bytes::from_static(&ZEROS[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_are_found_wherever_the_frame_is_cut() {
        let parts = [Bytes::from_static(b"first"), Bytes::new(), Bytes::from(vec![7; 100])];
        let mut writer = PayloadWriter::new(64);
        let offsets = parts.each_ref().map(|part| writer.push(part));
        assert_eq!(offsets, [0, 0, 64]);
        let frame = writer.finish(6, |head| head.extend_from_slice(b"header")).unwrap();
        assert_eq!(frame.len(), 64 + 164);

        let whole = frame.into_bytes();
        for cut in 0..whole.len() {
            let (header, payload) =
                split(Frame::from(vec![whole.slice(..cut), whole.slice(cut..)]), 64).unwrap();
            assert_eq!((&header[..], payload.len), (&b"header"[..], 164));
            for (part, offset) in parts.iter().zip(offsets) {
                assert_eq!(payload.take(offset, part.len()).unwrap(), part);
            }
            assert!(payload.take(0, 5).is_err(), "already taken");
        }
    }

    #[test]
    fn a_part_within_one_segment_is_not_copied() {
        let whole = Bytes::from(vec![0; 256]);
        let (_, payload) = split(Frame::from(vec![whole.slice(..100), whole.slice(100..)]), 64).unwrap();
        assert_eq!(payload.take(64, 64).unwrap().as_ptr(), whole[128..].as_ptr());
    }

    #[test]
    fn a_header_longer_than_the_frame_is_refused() {
        for bytes in [&[][..], &[1, 0, 0], &[9, 0, 0, 0, 1], &[255; 8]] {
            assert!(split(Frame::from(Bytes::copy_from_slice(bytes)), 64).is_err());
        }
    }
}
