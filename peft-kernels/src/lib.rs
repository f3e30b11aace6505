//! peft-kernels
