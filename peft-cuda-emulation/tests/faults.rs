//! What the emulation finds: kernels with a mistake each (`emulator/faulty.cpp`).
#![allow(clippy::unwrap_used, missing_docs)]
#![cfg(target_os = "linux")]

use peft_cuda::{Args, Launch};
use peft_cuda_emulation::{Buffer, Order};

#[allow(unsafe_code)]
fn run(kernel: &str, args: Args, order: Order) -> Result<(), String> {
    let launch = Launch { file: "faulty", kernel: kernel.into(), grid: [1, 1, 1], threads: 64, shared: 256, args };
    // SAFETY: the addresses are of buffers that the tests hold.
    unsafe { peft_cuda_emulation::run(&launch, order) }
}

#[test]
fn a_missing_barrier_leaves_nan() {
    let numbers: Vec<f32> = (0..64u8).map(f32::from).collect();
    let reversed: Vec<f32> = numbers.iter().rev().copied().collect();
    for order in Order::ALL {
        for mistake in [0, 1] {
            let (mut x, mut y) = (Buffer::of_floats(&numbers), Buffer::poisoned(256));
            run("faulty_reverse", Args::new().long(x.address()).long(y.address()).int(mistake), order).unwrap();
            assert_eq!(y.floats() == reversed, mistake == 0, "{order:?}");
            assert_eq!(y.floats().iter().any(|v| v.is_nan()), mistake == 1, "{order:?}");
        }
    }
}

#[test]
fn threads_that_wait_for_ever_and_lanes_that_leave() {
    for order in Order::ALL {
        let e = run("faulty_barrier", Args::new().int(0), order).unwrap_err();
        assert!(e.contains("barrier that others do not reach"), "{e}");
        let mut y = Buffer::poisoned(4);
        let e = run("faulty_shuffle", Args::new().long(y.address()), order).unwrap_err();
        assert!(e.contains("lanes that do not come"), "{e}");
    }
    let e = run("no_such_kernel", Args::new(), Order::Forwards).unwrap_err();
    assert!(e.contains("no kernel"), "{e}");
}

#[test]
fn a_write_outside_is_seen() {
    for (n, intact) in [(15, true), (16, false)] {
        let mut y = Buffer::poisoned(64);
        run("faulty_write", Args::new().long(y.address()).int(n), Order::Forwards).unwrap();
        assert_eq!(y.is_intact(), intact);
    }
}
