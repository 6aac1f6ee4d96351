//! Compression of backups: pure functions on bytes. Weights are numbers of two or four bytes whose exponents are alike and whose
//! mantissas are noise; side by side they look like noise to any compressor. So a piece is first cut into *byte
//! planes* (all first bytes, all second bytes, ...), and each plane is kept as whatever is smallest: one byte if
//! they are all equal, zstd, or as it is. What a piece is made of is found by trying on a sample.
//!
//! A *frame* is a packed piece: `version, shape, 0, 0`, the length as 8 bytes, then for each plane its method and stored length (1 + 8
//! bytes), then the planes, then the bytes that do not fill a number. All numbers are little-endian. A damaged frame is an
//! error or yields wrong bytes, never a panic: whoever unpacks compares a checksum anyway.

use crate::error::{Error, Result, Status};

const VERSION: u8 = 1;
const FRONT: usize = 12;
const PLANE: usize = 9;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const CONSTANT: u8 = 2;
/// Fast, and on bytes without repeats as good as any: only their frequencies count.
const LEVEL: i32 = 1;
/// Bytes of a sample: spread over the piece in this many parts.
const SAMPLE: (usize, usize) = (32 << 10, 8);
/// A frame must be this much smaller than its piece: a sixteenth.
const LEAST: usize = 16;

/// How a piece is cut into planes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shape {
    /// One plane: text, integers of one byte, 8-bit floats.
    Bytes,
    /// Two planes: 16-bit floats with five bits of exponent, integers.
    Pairs,
    /// Two planes, with the sign moved to the end first: bfloat16, whose exponent then is one whole byte.
    Brain,
    /// Four planes: 32-bit floats.
    Quads,
}

const SHAPES: [Shape; 4] = [Shape::Bytes, Shape::Pairs, Shape::Brain, Shape::Quads];

impl Shape {
    fn width(self) -> usize {
        match self {
            Shape::Bytes => 1,
            Shape::Pairs | Shape::Brain => 2,
            Shape::Quads => 4,
        }
    }

    fn code(self) -> u8 {
        match self {
            Shape::Bytes => 0,
            Shape::Pairs => 1,
            Shape::Brain => 2,
            Shape::Quads => 3,
        }
    }

    fn of(code: u8) -> Option<Shape> {
        SHAPES.into_iter().find(|shape| shape.code() == code)
    }

    /// The planes of the numbers in `bytes`, one after the other.
    fn split(self, bytes: &[u8]) -> Vec<u8> {
        let count = bytes.len() / self.width();
        let mut planes = vec![0; count * self.width()];
        match self {
            Shape::Bytes => planes.copy_from_slice(bytes),
            Shape::Pairs | Shape::Brain => {
                let (low, high) = planes.split_at_mut(count);
                let turn = u32::from(self == Shape::Brain);
                for ((pair, low), high) in bytes.chunks_exact(2).zip(low).zip(high) {
                    [*low, *high] = u16::from_le_bytes([pair[0], pair[1]]).rotate_left(turn).to_le_bytes();
                }
            }
            Shape::Quads => {
                for (plane, at) in planes.chunks_exact_mut(count.max(1)).zip(0..4) {
                    for (to, from) in plane.iter_mut().zip(bytes[at..].iter().step_by(4)) {
                        *to = *from;
                    }
                }
            }
        }
        planes
    }

    /// What `split` made these planes from.
    fn join(self, planes: &[u8], bytes: &mut [u8]) {
        let count = planes.len() / self.width();
        match self {
            Shape::Bytes => bytes.copy_from_slice(planes),
            Shape::Pairs | Shape::Brain => {
                let (low, high) = planes.split_at(count);
                let turn = u32::from(self == Shape::Brain);
                for ((pair, low), high) in bytes.chunks_exact_mut(2).zip(low).zip(high) {
                    pair.copy_from_slice(&u16::from_le_bytes([*low, *high]).rotate_right(turn).to_le_bytes());
                }
            }
            Shape::Quads => {
                for (plane, at) in planes.chunks_exact(count.max(1)).zip(0..4) {
                    for (to, from) in bytes[at..].iter_mut().step_by(4).zip(plane) {
                        *to = *from;
                    }
                }
            }
        }
    }
}

/// The piece as a frame; `None` if that would not be clearly smaller.
pub(crate) fn pack(bytes: &[u8]) -> Option<Vec<u8>> {
    let sample = sample(bytes);
    let shape = SHAPES.into_iter().min_by_key(|&shape| frame(shape, &sample).map_or(usize::MAX, |f| f.len()))?;
    let trial = frame(shape, &sample)?;
    (is_less(trial.len(), sample.len()) || sample.len() < SAMPLE.0).then_some(())?;
    frame(shape, bytes).filter(|frame| is_less(frame.len(), bytes.len()))
}

/// The piece as a frame, as it is.
pub(crate) fn keep(bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRONT + PLANE + bytes.len());
    frame.extend([VERSION, Shape::Bytes.code(), 0, 0]);
    frame.extend((bytes.len() as u64).to_le_bytes());
    if !bytes.is_empty() {
        frame.push(RAW);
        frame.extend((bytes.len() as u64).to_le_bytes());
    }
    frame.extend(bytes);
    frame
}

fn is_less(packed: usize, raw: usize) -> bool {
    packed <= raw - raw / LEAST && packed < raw
}

/// Parts of the piece, at multiples of four.
fn sample(bytes: &[u8]) -> Vec<u8> {
    let part = SAMPLE.0 / SAMPLE.1;
    if bytes.len() <= SAMPLE.0 {
        return bytes.to_vec();
    }
    let step = (bytes.len() - part) / (SAMPLE.1 - 1);
    (0..SAMPLE.1).flat_map(|i| bytes[(i * step) & !3..][..part].iter().copied()).collect()
}

/// The piece as a frame of this shape, however large.
fn frame(shape: Shape, bytes: &[u8]) -> Option<Vec<u8>> {
    let (numbers, rest) = bytes.split_at(bytes.len() - bytes.len() % shape.width());
    let split = shape.split(numbers);
    let count = numbers.len() / shape.width();
    let mut frame = vec![VERSION, shape.code(), 0, 0];
    frame.extend((bytes.len() as u64).to_le_bytes());
    let mut stored = Vec::with_capacity(bytes.len());
    for plane in split.chunks_exact(count.max(1)) {
        let before = stored.len();
        let method = store(plane, &mut stored)?;
        frame.push(method);
        frame.extend(((stored.len() - before) as u64).to_le_bytes());
    }
    frame.extend(stored);
    frame.extend(rest);
    Some(frame)
}

/// Adds a plane in its smallest form; says which.
fn store(plane: &[u8], to: &mut Vec<u8>) -> Option<u8> {
    if let [first, rest @ ..] = plane
        && rest.iter().all(|byte| byte == first)
    {
        to.push(*first);
        return Some(CONSTANT);
    }
    let packed = zstd::bulk::compress(plane, LEVEL).ok()?;
    if is_less(packed.len(), plane.len()) {
        to.extend(packed);
        return Some(ZSTD);
    }
    to.extend(plane);
    Some(RAW)
}

/// Fills `into` with the piece that the frame was made from. They must be as long as each other.
///
/// # Errors
/// `BackupIo` for anything that [`pack`] did not make, and for a piece of another length.
pub(crate) fn unpack(frame: &[u8], into: &mut [u8]) -> Result<()> {
    try_unpack(frame, into).ok_or_else(|| {
        let message = format!("a compressed backup of {} bytes is damaged; the device was not touched", into.len());
        Error::new(Status::BackupIo, message)
    })
}

fn try_unpack(frame: &[u8], into: &mut [u8]) -> Option<()> {
    let (front, mut rest) = frame.split_at_checked(FRONT)?;
    let shape = Shape::of(front[1])?;
    let len = u64::from_le_bytes(front[4..].try_into().ok()?);
    if front[0] != VERSION || len != into.len() as u64 {
        return None;
    }
    let (numbers, tail) = into.split_at_mut(into.len() - into.len() % shape.width());
    let count = numbers.len() / shape.width();
    let planes = if count == 0 { 0 } else { shape.width() };
    let heads;
    (heads, rest) = rest.split_at_checked(planes * PLANE)?;
    let mut split = vec![0; numbers.len()];
    for (head, plane) in heads.chunks_exact(PLANE).zip(split.chunks_exact_mut(count.max(1))) {
        let stored = usize::try_from(u64::from_le_bytes(head[1..].try_into().ok()?)).ok()?;
        let bytes;
        (bytes, rest) = rest.split_at_checked(stored)?;
        restore(head[0], bytes, plane)?;
    }
    shape.join(&split, numbers);
    (rest.len() == tail.len()).then(|| tail.copy_from_slice(rest))
}

fn restore(method: u8, stored: &[u8], plane: &mut [u8]) -> Option<()> {
    match (method, stored) {
        (RAW, _) if stored.len() == plane.len() => plane.copy_from_slice(stored),
        (CONSTANT, [byte]) => plane.fill(*byte),
        (ZSTD, _) => {
            let len = zstd::bulk::decompress_to_buffer(stored, plane).ok()?;
            (len == plane.len()).then_some(())?;
        }
        _ => return None,
    }
    Some(())
}

/// What was measured: bytes per second from the tier, and bytes of pieces per second that one thread unpacks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Rates {
    pub(crate) read: f64,
    pub(crate) unpack: f64,
    pub(crate) threads: f64,
}

/// Whether keeping `packed` instead of `raw` bytes pays: a read becomes no slower. Reading and unpacking overlap.
pub(crate) fn pays(raw: u64, packed: u64, rates: Rates) -> bool {
    let read_raw = raw as f64 / rates.read;
    let read_packed = (packed as f64 / rates.read).max(raw as f64 / (rates.unpack * rates.threads));
    packed < raw && read_packed <= read_raw
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Normally distributed numbers, as in a layer's weights.
    fn weights(count: usize) -> impl Iterator<Item = f32> {
        let mut state = 0x1234_5678_9ABC_DEF1_u64;
        let mut uniform = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..count).map(move |_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.02)
    }

    fn brain(count: usize) -> Vec<u8> {
        weights(count).flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes()).collect()
    }

    /// As IEEE's 16 bits: five of exponent, ten behind the point.
    fn half(weight: f32) -> [u8; 2] {
        narrowed(weight, 15, 10).to_le_bytes()
    }

    /// As 8 bits: four of exponent, three behind the point. Such weights are scaled to the range first.
    fn quarter(weight: f32) -> [u8; 1] {
        [narrowed(weight * 1024.0, 7, 3) as u8]
    }

    /// A number with another bias of its exponent and fewer bits behind the point; what is too small for it is zero.
    fn narrowed(weight: f32, bias: u32, bits: u32) -> u16 {
        let (sign, exponent, fraction) =
            (weight.to_bits() >> 31, weight.to_bits() >> 23 & 0xFF, weight.to_bits() & 0x7F_FFFF);
        let number = (exponent + bias).checked_sub(127).filter(|exponent| *exponent > 0);
        let width = if bits == 10 { 15 } else { 7 };
        (sign << width | number.map_or(0, |exponent| exponent << bits | fraction >> (23 - bits))) as u16
    }

    fn round_trip(bytes: &[u8]) -> Option<usize> {
        let frame = pack(bytes)?;
        let mut back = vec![0xEE; bytes.len()];
        assert_eq!(unpack(&frame, &mut back), Ok(()));
        assert!(back == bytes, "other bytes came back");
        Some(frame.len())
    }

    #[test]
    fn weights_become_smaller_and_noise_stays() {
        let bf16 = brain(1 << 20);
        let share = round_trip(&bf16).map_or(1.0, |len| len as f64 / bf16.len() as f64);
        assert!(share < 0.70, "bfloat16: {share}");
        let fp32: Vec<u8> = weights(1 << 19).flat_map(f32::to_le_bytes).collect();
        let share = round_trip(&fp32).map_or(1.0, |len| len as f64 / fp32.len() as f64);
        assert!(share < 0.86, "32 bits: {share}");
        let fp16: Vec<u8> = weights(1 << 20).flat_map(half).collect();
        let share = round_trip(&fp16).map_or(1.0, |len| len as f64 / fp16.len() as f64);
        assert!(share < 0.86, "16 bits: {share}");
        let fp8: Vec<u8> = weights(1 << 21).flat_map(quarter).collect();
        let share = round_trip(&fp8).map_or(1.0, |len| len as f64 / fp8.len() as f64);
        assert!(share < 0.83, "8 bits: {share}");
        let noise: Vec<u8> =
            (0..1_u64 << 16).flat_map(|i| twox_hash::XxHash3_128::oneshot(&i.to_le_bytes()).to_le_bytes()).collect();
        assert_eq!(round_trip(&noise), None);
        assert_eq!(round_trip(&[]), None);
        assert!(round_trip(&vec![7; 4 << 20]).is_some_and(|len| len < 64));
    }

    #[test]
    fn a_frame_of_another_version_or_length_is_refused() {
        let bytes = brain(1000);
        let mut frame = pack(&bytes).unwrap_or_default();
        assert!(unpack(&frame, &mut vec![0; bytes.len() - 2]).is_err());
        frame[0] = 2;
        assert!(unpack(&frame, &mut vec![0; bytes.len()]).is_err_and(|e| e.status == Status::BackupIo));
    }

    #[test]
    fn it_pays_where_reading_is_what_takes_time() {
        let rates = Rates { read: 1e9, unpack: 1e9, threads: 2.0 };
        assert!(pays(100, 70, rates) && !pays(100, 100, rates));
        assert!(!pays(100, 70, Rates { read: 5e9, ..rates }));
        assert!(pays(100, 70, Rates { read: 5e9, threads: 8.0, ..rates }));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_shape_gives_back_what_it_was_given(
            bytes in prop::collection::vec(any::<u8>(), 0..300), few in 1..9_u8, code in 0..4_u8,
        ) {
            let bytes: Vec<u8> = bytes.into_iter().map(|byte| byte % few).collect();
            let shape = Shape::of(code).unwrap_or(Shape::Bytes);
            let frame = frame(shape, &bytes).unwrap_or_default();
            let mut back = vec![0xEE; bytes.len()];
            prop_assert_eq!(unpack(&frame, &mut back), Ok(()));
            prop_assert_eq!(&back, &bytes);
            round_trip(&bytes);
            let mut kept = vec![0xEE; bytes.len()];
            prop_assert_eq!(unpack(&keep(&bytes), &mut kept), Ok(()));
            prop_assert_eq!(&kept, &bytes);
            // The naive twin of `split`.
            let width = shape.width();
            let whole = &bytes[..bytes.len() - bytes.len() % width];
            let turned: Vec<u8> = match shape {
                Shape::Brain => whole.chunks(2).flat_map(|p| u16::from_le_bytes([p[0], p[1]]).rotate_left(1).to_le_bytes()).collect(),
                _ => whole.to_vec(),
            };
            let count = whole.len() / width;
            for (at, byte) in shape.split(whole).into_iter().enumerate() {
                prop_assert_eq!(byte, turned[at % count * width + at / count]);
            }
        }

        #[test]
        fn a_damaged_frame_is_no_panic(at in 0..5000_usize, byte in any::<u8>(), cut in 0..5000_usize) {
            let bytes = brain(2000);
            let mut frame = pack(&bytes).unwrap_or_default();
            let len = frame.len();
            frame[at % len] = byte;
            let mut back = vec![0; bytes.len()];
            let _ = unpack(&frame, &mut back);
            prop_assert!(unpack(&frame[..cut % len], &mut back).is_err());
        }
    }
}
