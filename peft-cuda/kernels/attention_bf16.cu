// Attention of tensors stored as bf16.
#include "attention.cuh"

ATTENTIONS(bf16, bf16)
