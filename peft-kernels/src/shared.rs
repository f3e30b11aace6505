//! Disjoint writes of several threads into one buffer.

use std::marker::PhantomData;

/// A buffer whose disjoint parts are written by different threads.
#[derive(Debug)]
pub(crate) struct Shared<'a> {
    at: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

#[allow(unsafe_code)]
// SAFETY: it is a mutable borrow of f32; writes go through `slice`, whose callers keep their parts disjoint.
unsafe impl Sync for Shared<'_> {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(data: &'a mut [f32]) -> Self {
        Self { at: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// # Safety
    /// No other part in use at the same time overlaps this one.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start <= self.len && len <= self.len - start, "a write past the result");
        // SAFETY: inside the buffer, and exclusive as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(start), len) }
    }
}
