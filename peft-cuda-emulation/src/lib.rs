/*!
Runs launches of `peft-cuda` on the host: the kernels' own source, compiled by the host's C++ compiler, each thread of a
block a fiber. Slow and exact; for tests.

Under emulation an address is one of this process. [`Buffer`] gives some that notice writes outside.
*/

mod buffer;

use peft_cuda::Launch;

pub use buffer::Buffer;

/// In which order blocks, and threads between two barriers, run. A kernel must not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The first one first.
    Forwards,
    /// The last one first.
    Backwards,
}

impl Order {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Forwards, Self::Backwards];
}

/// Whether kernels were compiled for this machine.
#[must_use]
pub fn is_available() -> bool {
    cfg!(emulated)
}

/// Runs a launch to its end.
///
/// # Errors
/// When there is no such kernel, or its threads wait for each other for ever.
///
/// # Safety
/// Every address among the arguments is of memory that the kernel may read or write as it does on a device.
#[allow(unsafe_code)]
pub unsafe fn run(launch: &Launch, order: Order) -> Result<(), String> {
    if launch.is_empty() {
        return Ok(());
    }
    // SAFETY: as the caller promises.
    unsafe { emulate(launch, order) }.map_err(|why| format!("{}: {why}", launch.kernel))
}

#[cfg(emulated)]
#[allow(unsafe_code)]
unsafe fn emulate(launch: &Launch, order: Order) -> Result<(), String> {
    use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
    unsafe extern "C" {
        fn peft_emulate(
            name: *const c_char,
            grid: *const c_uint,
            threads: c_uint,
            shared: c_uint,
            args: *mut *mut c_void,
            backwards: c_int,
        ) -> *const c_char;
    }
    let name = CString::new(launch.kernel.as_str()).map_err(|e| e.to_string())?;
    let mut args: Vec<*mut c_void> =
        launch.args.words().iter().map(|w| std::ptr::from_ref(w).cast_mut().cast()).collect();
    // SAFETY: the pointers are to the launch's words, which outlive the call and which kernels take by value; what
    // addresses among them are of is the caller's promise.
    let wrong = unsafe {
        peft_emulate(
            name.as_ptr(),
            launch.grid.as_ptr(),
            launch.threads,
            launch.shared,
            args.as_mut_ptr(),
            c_int::from(order == Order::Backwards),
        )
    };
    if wrong.is_null() {
        return Ok(());
    }
    // SAFETY: what is not null is a string constant.
    Err(unsafe { CStr::from_ptr(wrong) }.to_string_lossy().into_owned())
}

#[cfg(not(emulated))]
#[allow(unsafe_code)]
unsafe fn emulate(_: &Launch, _: Order) -> Result<(), String> {
    Err("kernels are emulated on Linux only".into())
}
