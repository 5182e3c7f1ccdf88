// Vectors of four floats in plain C++ (GCC and Clang's vector extension): SSE2, NEON or whatever the target has.
//
// A dtype's class D must have:
//   T, H         how x, y, A and B, and how h are stored
//   Operand      what `dot` multiplies: kStep elements of a row of x or A, or kLanes columns of B with kDepth values
//                of k each, or kDepth values of h for all lanes
//   load         an Operand from memory; load_first: only the first n elements exist, the others are 0
//   broadcast    an Operand from h
//   dot          acc + the products of the operands, by lane, in float32
//   pack         n values of h from float32
//   add          y += d for kLanes columns; add_first: only the first n exist
// and the tile sizes kShrinkTokens, kExpandTokens and kExpandVectors that fit the registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace hydra {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

struct V {
  static constexpr int kLanes = 4;
  Floats v;

  static V zero() { return {Floats{}}; }
  // out[i] = sum of the lanes of acc[i], always in the same order.
  static void sum4(const V (&acc)[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = (acc[i].v[0] + acc[i].v[2]) + (acc[i].v[1] + acc[i].v[3]);
  }
};

inline Words bits(Floats v) { return reinterpret_cast<Words>(v); }
inline Floats floats(Words w) { return reinterpret_cast<Floats>(w); }

// What every dtype does with the first n of its elements: through a copy.
template <class D, class T, int kCount>
struct Partial {
  static auto load_first(const T* p, int64_t n) {
    T copy[kCount] = {};
    std::memcpy(copy, p, n * sizeof(T));
    return D::load(copy);
  }
  static void add_first(T* y, V d, int64_t n) {
    T copy[V::kLanes] = {};
    std::memcpy(copy, y, n * sizeof(T));
    D::add(copy, d);
    std::memcpy(y, copy, n * sizeof(T));
  }
};

// h is kept in float32 for every dtype.
struct FloatH {
  using H = float;
  using V = hydra::V;
  static constexpr int kShrinkTokens = 2, kExpandTokens = 2, kExpandVectors = 2;
  static void pack(H* to, const float* h, int64_t n) { std::memcpy(to, h, n * sizeof *h); }
};

struct Float32 : FloatH, Partial<Float32, float, 4> {
  using T = float;
  using Operand = Floats;
  static constexpr int kStep = 4, kDepth = 1;

  static Operand load(const T* p) {
    Operand v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Operand broadcast(const H* p) { return Floats{} + *p; }
  static V dot(V acc, Operand a, Operand b) { return {acc.v + a * b}; }
  static void add(T* y, V d) {
    const Floats sum = load(y) + d.v;
    std::memcpy(y, &sum, sizeof sum);
  }
};

struct Float16 : FloatH, Partial<Float16, uint16_t, 4> {
  using T = uint16_t;
  using Operand = Floats;
  static constexpr int kStep = 4, kDepth = 1;

  static Operand load(const T* p) {
    Operand v;
    for (int i = 0; i < 4; ++i) v[i] = widen(p[i]);
    return v;
  }
  static Operand broadcast(const H* p) { return Floats{} + *p; }
  static V dot(V acc, Operand a, Operand b) { return {acc.v + a * b}; }
  static void add(T* y, V d) {
    for (int i = 0; i < 4; ++i) y[i] = narrow(widen(y[i]) + d.v[i]);
  }

 private:
  static float as_float(uint32_t w) {
    float f;
    std::memcpy(&f, &w, sizeof f);
    return f;
  }
  static float widen(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest << 13));  // infinity, NaN
    // The exponent is 112 too small; the product puts it right and normalises subnormal halves.
    const float magnitude = as_float(rest << 13) * as_float(0x77800000u);  // 2^112
    return sign ? -magnitude : magnitude;
  }
  static uint16_t narrow(float f) {  // to nearest, ties to even
    uint32_t w;
    std::memcpy(&w, &f, sizeof w);
    const uint32_t sign = (w >> 16) & 0x8000u;
    w &= 0x7fffffffu;
    if (w > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (w >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (w < 0x38800000u) {                                               // subnormal halves: 0.5 aligns the last bit
      float aligned = as_float(w) + 0.5f;
      std::memcpy(&w, &aligned, sizeof w);
      return static_cast<uint16_t>(sign | (w - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((w - 0x38000000u + 0xfffu + ((w >> 13) & 1u)) >> 13));
  }
};

struct BFloat16 : FloatH, Partial<BFloat16, uint16_t, 8> {
  using T = uint16_t;
  struct Operand {  // pairs of values of neighbouring k, taken apart (little-endian)
    Floats low, high;
  };
  static constexpr int kStep = 8, kDepth = 2;

  static Operand load(const T* p) {
    Words pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {floats(pairs << 16), floats(pairs & 0xffff0000u)};
  }
  static Operand broadcast(const H* p) { return {Floats{} + p[0], Floats{} + p[1]}; }
  static V dot(V acc, Operand a, Operand b) { return {acc.v + a.low * b.low + a.high * b.high}; }
  static void add(T* y, V d) {
    Words old;
    for (int i = 0; i < 4; ++i) old[i] = static_cast<uint32_t>(y[i]) << 16;
    const Floats sum = floats(old) + d.v;
    const Words rounded = bits(sum) + 0x7fffu + ((bits(sum) >> 16) & 1u);  // to nearest, ties to even
    for (int i = 0; i < 4; ++i) y[i] = sum[i] == sum[i] ? static_cast<uint16_t>(rounded[i] >> 16) : uint16_t{0x7fc0};
  }
};

}  // namespace
}  // namespace hydra
