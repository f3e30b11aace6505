// Attention of tensors stored as f16.
#include "attention.cuh"

ATTENTIONS(f16, f16)
