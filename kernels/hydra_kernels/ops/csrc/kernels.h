// The arithmetic of one unit of work, once for each instruction set and dtype.
#pragma once

#include <cstdint>

#include "probe.h"
#include "record.h"

namespace hydra {

// Tokens of one segment: ids[0 .. count), rows of x, y and z.
struct Tokens {
  const int32_t* ids;
  int64_t count;
};

struct ShrinkArgs {
  const Record* record;
  Tokens tokens;
  const void* x;  // [T, in], rows x_stride elements apart
  int64_t x_stride;
  float* z;  // [T, ...], rows z_stride apart; the first z_rows of each are written
  int64_t z_stride;
  int64_t begin, end;  // groups of kRowGroup rows
};

struct ExpandArgs {
  const Record* record;
  Tokens tokens;  // at most kTokenGroup
  const float* z;
  int64_t z_stride;
  void* y;  // [T, ...], the column at which the slice begins; rows y_stride elements apart
  int64_t y_stride;
  int64_t begin, end;  // panels of kPanel columns
  float* scratch;      // 64-byte aligned, scratch_floats(record) long
  const Probe* probe;  // nullptr: nothing is recorded
  int64_t slot;
  float* carry;  // [T, ...], logits between layers, rows carry_stride apart; nullptr when no record has a carry
  int64_t carry_stride;
};

struct Kernels {
  void (*shrink)(const ShrinkArgs&);
  void (*expand)(const ExpandArgs&);
};

HYDRA_INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Floats that expand needs: one token's routing weights and h, then h of every token of a group, then the sums of
// what is recorded, which are doubles.
HYDRA_INLINE int64_t scratch_floats(const Record& r) {
  return padded(r.heads) + (1 + kTokenGroup) * padded(r.k()) + 2 * (r.heads + 1);
}

// The kernels of one instruction set, indexed by Dtype; nullptr where the compiler could not make them.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

}  // namespace hydra
