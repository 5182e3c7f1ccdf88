// What the operator reads of a layer's slots: plain memory, shared with Python (hydra_kernels/ops/cpu.py).
#pragma once

#include <cstdint>

// Functions in headers are inlined always: files are compiled for different instruction sets, and the linker would
// keep one copy of a function for all of them.
#define HYDRA_INLINE inline __attribute__((always_inline))

namespace hydra {

enum class Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Whether the logits of a slice's router go to later layers of the step, or come from an earlier one. See weights.py.
enum class Carry : int64_t { kNone = 0, kGives = 1, kTakes = 2 };

// One row of the table, int64 throughout: what one slot holds for one slice. The same order as `TableField` in cpu.py.
// rank 0: the slot does not touch the slice, and nothing else of the row is read.
struct Record {
  int64_t a;     // address of [A; R], packed (see pack_a in cpu.py)
  int64_t b;     // address of B, packed (see pack_b in cpu.py)
  int64_t bias;  // address of the router's bias, float32 [heads]; 0 without one
  int64_t rank;
  int64_t heads;
  int64_t shared_a;
  int64_t top_k;
  int64_t renormalize;
  int64_t has_router;
  int64_t scaling;  // the bits of a float32, zero-extended
  int64_t in;
  int64_t out;
  int64_t start;  // the slice's first column of y
  int64_t dtype;
  int64_t probe;   // address of a Probe (probe.h); 0: nothing is ever recorded
  int64_t router;  // number of this slice's router there
  int64_t carry;   // a Carry

  HYDRA_INLINE bool gives() const { return carry == static_cast<int64_t>(Carry::kGives); }
  HYDRA_INLINE bool takes() const { return carry == static_cast<int64_t>(Carry::kTakes); }
  HYDRA_INLINE int64_t a_rows() const { return shared_a ? rank : rank * heads; }
  HYDRA_INLINE int64_t z_rows() const { return a_rows() + (has_router ? heads : 0); }
  HYDRA_INLINE int64_t k() const { return rank * heads; }
};
static_assert(sizeof(Record) == 17 * sizeof(int64_t));

// Units of the packed layouts, the same for every instruction set.
constexpr int64_t kRowGroup = 4;     // rows of [A; R] that are stored interleaved
constexpr int64_t kPanel = 64;       // columns of B that are stored interleaved
constexpr int64_t kTokenGroup = 48;  // tokens in one unit of work: their h stays in the first-level cache
constexpr int64_t kChunk = 32;       // elements of one row of [A; R] that are stored together

}  // namespace hydra
