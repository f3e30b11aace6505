//! peft-hub
