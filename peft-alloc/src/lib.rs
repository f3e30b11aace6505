/*!
The allocator of this project's programs: mimalloc, told to keep the pages that it has.

Every training step makes and drops the same large tensors. Given back to the system, their pages come back one fault
at a time: keeping them made a step a seventh faster (`docs/benchmarks.md`). A library must not choose its user's allocator, so
this is a crate of its own, for the programs alone.
*/

/// The allocator, for `#[global_allocator]`.
pub use mimalloc::MiMalloc;

/// `mi_option_purge_delay` in `mimalloc.h` (versions 2 and 3), which the bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Gives back the pages that loading has freed, and keeps all that are freed from now on for the next allocation. Call it
/// between loading and the steps; `MIMALLOC_PURGE_DELAY`, in milliseconds, still has the last word.
pub fn keep_pages() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_some() {
        return;
    }
    #[allow(unsafe_code)]
    // SAFETY: the option exists, takes any long, and may be set at any time, and so may pages be given back.
    unsafe {
        libmimalloc_sys::mi_collect(true);
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_option_is_the_purge_delay() {
        #[allow(unsafe_code)]
        let read = || unsafe { libmimalloc_sys::mi_option_get(super::PURGE_DELAY) };
        // mimalloc's documented default; another option in its place would have another.
        if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
            assert!([10, 1000].contains(&read()), "{}", read());
            super::keep_pages();
            assert_eq!(read(), -1);
        }
    }
}
