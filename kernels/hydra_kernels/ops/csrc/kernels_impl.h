// Shrink and expand over the vectors of one instruction set. Each vec_*.h gives a type V of vectors and, for every
// dtype, a class D (see vec_portable.h for what it must have); each isa_*.cpp includes one of them and this file.
//
// Every element of z and of y has its own accumulator, whose order of additions does not depend on which other rows,
// tokens or columns are computed beside it: results do not depend on neighbours nor on the number of threads.
#pragma once

#include <type_traits>
#include <utility>

#include "gate.h"
#include "kernels.h"

namespace hydra {
namespace {

// f(0), .., f(N - 1) without a loop, so that arrays of vectors indexed by it live in registers.
template <int N, class F>
HYDRA_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (f(I), ...); }
  (std::make_integer_sequence<int, N>{});
}

// Calls f(NT, first) for tiles of NT tokens, NT a compile-time constant: kMost while there are so many, then 2, then 1.
template <int kMost, class F>
HYDRA_INLINE void for_each_tile(int64_t tokens, F&& f) {
  int64_t t = 0;
  for (; t + kMost <= tokens; t += kMost) f(std::integral_constant<int, kMost>{}, t);
  if constexpr (kMost > 2)
    for (; t + 2 <= tokens; t += 2) f(std::integral_constant<int, 2>{}, t);
  for (; t < tokens; ++t) f(std::integral_constant<int, 1>{}, t);
}

// Four rows of [A; R] times NT tokens over all of `in`.
// a: the group, [in / kChunk][4][kChunk]. z: where each token's four results go; `rows` of them exist.
template <class D, int NT>
inline void shrink_tile(const typename D::T* const* x, const typename D::T* a, int64_t in, float* const* z, int rows) {
  using V = typename D::V;
  V acc[NT][kRowGroup];
  unroll<NT>([&](int t) { unroll<kRowGroup>([&](int i) { acc[t][i] = V::zero(); }); });
  const auto step = [&](int64_t k, auto load_x) __attribute__((always_inline)) {
    const auto* p = a + k / kChunk * (kRowGroup * kChunk) + k % kChunk;
    decltype(load_x(x[0])) operands[NT];
    unroll<NT>([&](int t) { operands[t] = load_x(x[t] + k); });
    unroll<kRowGroup>([&](int i) {
      const auto row = D::load(p + i * kChunk);
      unroll<NT>([&](int t) { acc[t][i] = D::dot(acc[t][i], row, operands[t]); });
    });
  };
  int64_t k = 0;
  for (; k + D::kStep <= in; k += D::kStep) step(k, [](const typename D::T* p) { return D::load(p); });
  if (k < in) step(k, [n = in - k](const typename D::T* p) { return D::load_first(p, n); });
  unroll<NT>([&](int t) {
    if (rows == kRowGroup) {
      V::sum4(acc[t], z[t]);
    } else {
      float sums[kRowGroup];
      V::sum4(acc[t], sums);
      for (int i = 0; i < rows; ++i) z[t][i] = sums[i];
    }
  });
}

template <class D, int NT>
inline void shrink_tokens(const ShrinkArgs& args, int64_t first) {
  using T = typename D::T;
  const Record& r = *args.record;
  const T* x[NT];
  float* z[NT];
  for (int t = 0; t < NT; ++t) {
    const int64_t id = args.tokens.ids[first + t];
    x[t] = static_cast<const T*>(args.x) + id * args.x_stride;
    z[t] = args.z + id * args.z_stride + args.begin * kRowGroup;
  }
  const int64_t group = (r.in + kChunk - 1) / kChunk * (kRowGroup * kChunk);
  for (int64_t i = args.begin; i < args.end; ++i) {
    const int64_t left = r.z_rows() - i * kRowGroup;
    const int rows = left < kRowGroup ? static_cast<int>(left) : static_cast<int>(kRowGroup);
    shrink_tile<D, NT>(x, reinterpret_cast<const T*>(r.a) + i * group, r.in, z, rows);
    for (int t = 0; t < NT; ++t) z[t] += kRowGroup;
  }
}

template <class D>
void shrink(const ShrinkArgs& args) {
  for_each_tile<D::kShrinkTokens>(
      args.tokens.count, [&](auto tile, int64_t first) { shrink_tokens<D, tile()>(args, first); });
}

// NC vectors of columns of NT tokens, from column `first` on; only the first `columns` columns exist in y.
// h: [NT][steps][depth]. b: [steps][kPanel][depth], at the first column.
template <class D, int NT, int NC>
inline void expand_tile(
    const typename D::H* h, const typename D::T* b, int64_t steps, typename D::T* const* y, int64_t first,
    int64_t columns) {
  using V = typename D::V;
  V acc[NT][NC];
  unroll<NT>([&](int t) { unroll<NC>([&](int c) { acc[t][c] = V::zero(); }); });
  for (int64_t i = 0; i < steps; ++i) {
    typename D::Operand columns_b[NC];
    unroll<NC>([&](int c) { columns_b[c] = D::load(b + (i * kPanel + c * V::kLanes) * D::kDepth); });
    unroll<NT>([&](int t) {
      const auto operand = D::broadcast(h + (t * steps + i) * D::kDepth);
      unroll<NC>([&](int c) { acc[t][c] = D::dot(acc[t][c], columns_b[c], operand); });
    });
  }
  unroll<NT>([&](int t) {
    unroll<NC>([&](int c) {
      auto* p = y[t] + first + c * V::kLanes;
      if (columns >= (c + 1) * V::kLanes) {
        D::add(p, acc[t][c]);
      } else if (columns > c * V::kLanes) {
        D::add_first(p, acc[t][c], columns - c * V::kLanes);
      }
    });
  });
}

// One panel of columns of NT tokens.
template <class D, int NT>
inline void expand_tokens(
    const ExpandArgs& args, const typename D::H* h, int64_t steps, int64_t first, int64_t panel) {
  using T = typename D::T;
  constexpr int64_t kWide = D::kExpandVectors * D::V::kLanes;
  static_assert(kPanel % kWide == 0);
  const Record& r = *args.record;
  T* y[NT];
  for (int t = 0; t < NT; ++t) y[t] = static_cast<T*>(args.y) + args.tokens.ids[first + t] * args.y_stride;
  h += first * steps * D::kDepth;
  const T* b = reinterpret_cast<const T*>(r.b) + panel * steps * (kPanel * D::kDepth);
  const int64_t begin = panel * kPanel;
  const int64_t end = begin + kPanel < r.out ? begin + kPanel : r.out;
  for (int64_t column = begin; column < end; column += kWide, b += kWide * D::kDepth)
    expand_tile<D, NT, D::kExpandVectors>(h, b, steps, y, column, end - column);
}

// h of every token of the group into args.scratch: [count][steps][depth].
template <class D>
inline const typename D::H* gate(const ExpandArgs& args, int64_t steps) {
  const Record& r = *args.record;
  float* w = args.scratch;
  float* h = w + padded(r.heads);
  auto* packed = reinterpret_cast<typename D::H*>(h + padded(r.k()));
  auto* sums = reinterpret_cast<double*>(h + (1 + kTokenGroup) * padded(r.k()));
  Tally tally(args.probe, r, args.slot, sums);
  for (int64_t t = 0; t < args.tokens.count; ++t) {
    const float* z = args.z + args.tokens.ids[t] * args.z_stride;
    float* carried = r.carry ? args.carry + args.tokens.ids[t] * args.carry_stride : nullptr;
    routing_weights(r, r.takes() ? carried : z + r.a_rows(), w, h);
    if (r.gives() && args.begin == 0) give_logits(r, z + r.a_rows(), carried);
    tally.add(args.tokens.ids[t], w);
    mix(r, z, w, h);
    for (int64_t i = r.k(); i < steps * D::kDepth; ++i) h[i] = 0.0f;
    D::pack(packed + t * steps * D::kDepth, h, steps * D::kDepth);
  }
  tally.store();
  return packed;
}

template <class D>
void expand(const ExpandArgs& args) {
  const int64_t steps = (args.record->k() + D::kDepth - 1) / D::kDepth;
  const auto* h = gate<D>(args, steps);
  for (int64_t panel = args.begin; panel < args.end; ++panel) {
    for_each_tile<D::kExpandTokens>(
        args.tokens.count, [&](auto tile, int64_t first) { expand_tokens<D, tile()>(args, h, steps, first, panel); });
  }
}

template <class D>
constexpr Kernels kernels() {
  return {shrink<D>, expand<D>};
}

}  // namespace
}  // namespace hydra
