//! Memory that kernels work on, with a margin on both sides that must stay as it is.

use peft_cuda::{Element, Operand};

/// Bytes of a margin, a multiple of the alignment.
const MARGIN: usize = 256;
/// In every float type a NaN.
const POISON: u8 = 0xff;

/// 16-byte aligned memory of `len` bytes, all of them NaN at first.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u128>,
    len: usize,
}

impl Buffer {
    /// Room for `bytes` bytes that nothing has written yet.
    #[must_use]
    pub fn poisoned(bytes: usize) -> Self {
        let words = (bytes + 2 * MARGIN).div_ceil(16);
        Self { memory: vec![u128::from_ne_bytes([POISON; 16]); words], len: bytes }
    }

    /// A copy of some bytes.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let mut buffer = Self::poisoned(bytes.len());
        buffer.all_mut()[MARGIN..MARGIN + bytes.len()].copy_from_slice(bytes);
        buffer
    }

    /// A copy of numbers.
    #[must_use]
    pub fn of_ints(values: &[u32]) -> Self {
        Self::of_bytes(&values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>())
    }

    /// A copy of numbers.
    #[must_use]
    pub fn of_floats(values: &[f32]) -> Self {
        Self::of_bytes(&values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>())
    }

    #[allow(unsafe_code)]
    fn all(&self) -> &[u8] {
        // SAFETY: any initialised memory is bytes.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() * 16) }
    }

    #[allow(unsafe_code)]
    fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and any bytes are numbers.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.memory.len() * 16) }
    }

    /// The address of the first element, a multiple of 16.
    pub fn address(&mut self) -> u64 {
        self.memory.as_mut_ptr().wrapping_byte_add(MARGIN) as u64
    }

    /// As an argument.
    pub fn operand(&mut self, element: Element) -> Operand {
        Operand { address: self.address(), element }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.all()[MARGIN..MARGIN + self.len]
    }

    /// The elements as 32-bit numbers.
    #[must_use]
    pub fn ints(&self) -> Vec<u32> {
        self.bytes().as_chunks().0.iter().map(|b| u32::from_ne_bytes(*b)).collect()
    }

    /// The elements as floats.
    #[must_use]
    pub fn floats(&self) -> Vec<f32> {
        self.ints().into_iter().map(f32::from_bits).collect()
    }

    /// Whether nothing was written before the first element or behind the last.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        let all = self.all();
        all[..MARGIN].iter().chain(&all[MARGIN + self.len..]).all(|b| *b == POISON)
    }
}
