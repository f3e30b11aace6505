//! Disjoint writes of several threads into one buffer.

use std::marker::PhantomData;

/// A buffer whose disjoint parts are written by different threads.
#[derive(Debug)]
pub(crate) struct Shared<'a, T = f32> {
    at: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

#[allow(unsafe_code)]
// SAFETY: it is a mutable borrow; writes go through `slice`, whose callers keep their parts disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { at: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// # Safety
    /// No other part in use at the same time overlaps this one.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a write past the result");
        // SAFETY: inside the buffer, and exclusive as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(start), len) }
    }
}
