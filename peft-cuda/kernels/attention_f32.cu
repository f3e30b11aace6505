// Attention of tensors stored as f32.
#include "attention.cuh"

ATTENTIONS(float, f32)
