//! Files mapped into memory.

use std::fs::File;
use std::ops::Range;

use memmap2::Mmap;

/// Maps a file to read. It must not be changed in place while it is mapped; this workspace replaces files by renames only.
/// Another process that truncates it can end this one with SIGBUS, as for every memory-mapped model file.
///
/// # Errors
/// What the operating system said.
pub fn map(file: &File) -> std::io::Result<Mmap> {
    #[allow(unsafe_code)]
    // SAFETY: the mapping is read-only; that nobody changes the file in place is the contract above. Contents are data,
    // never trusted for memory safety: offsets are checked against the mapping's length.
    unsafe {
        Mmap::map(file)
    }
}

/// Drops a range's pages from this process's memory; the next access reads them again. Ranges outside are left alone.
pub fn forget(map: &Mmap, range: Range<usize>) {
    if range.is_empty() || range.end > map.len() {
        return;
    }
    #[cfg(unix)]
    #[allow(unsafe_code)]
    // SAFETY: the mapping is shared, read-only and backed by the file; its dropped pages are read from the file again on
    // the next access, so no view of it changes. The range lies inside the mapping (checked above).
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
}
