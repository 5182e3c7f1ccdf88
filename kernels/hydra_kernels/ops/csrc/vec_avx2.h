// AVX2 vectors, with FMA and F16C. See vec_portable.h for what each member means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hydra {
namespace {

struct V {
  static constexpr int kLanes = 8;
  __m256 v;

  static V zero() { return {_mm256_setzero_ps()}; }
  static void sum4(const V (&acc)[4], float* out) {
    const __m256 sums =
        _mm256_hadd_ps(_mm256_hadd_ps(acc[0].v, acc[1].v), _mm256_hadd_ps(acc[2].v, acc[3].v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
};

// What every dtype does with the first n of its elements: through a copy, as AVX2 has no masks of 16 bits.
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
  static constexpr int kShrinkTokens = 2, kExpandTokens = 4, kExpandVectors = 2;
  static void pack(H* to, const float* h, int64_t n) { std::memcpy(to, h, n * sizeof *h); }
};

struct Float32 : FloatH, Partial<Float32, float, 8> {
  using T = float;
  using Operand = __m256;
  static constexpr int kStep = 8, kDepth = 1;

  static Operand load(const T* p) { return _mm256_loadu_ps(p); }
  static Operand broadcast(const H* p) { return _mm256_broadcast_ss(p); }
  static V dot(V acc, Operand a, Operand b) { return {_mm256_fmadd_ps(a, b, acc.v)}; }
  static void add(T* y, V d) { _mm256_storeu_ps(y, _mm256_add_ps(load(y), d.v)); }
};

struct Float16 : FloatH, Partial<Float16, uint16_t, 8> {
  using T = uint16_t;
  using Operand = __m256;
  static constexpr int kStep = 8, kDepth = 1;

  static Operand load(const T* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Operand broadcast(const H* p) { return _mm256_broadcast_ss(p); }
  static V dot(V acc, Operand a, Operand b) { return {_mm256_fmadd_ps(a, b, acc.v)}; }
  static void add(T* y, V d) {
    const __m128i sum = _mm256_cvtps_ph(_mm256_add_ps(load(y), d.v), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), sum);
  }
};

struct BFloat16 : FloatH, Partial<BFloat16, uint16_t, 16> {
  using T = uint16_t;
  struct Operand {  // pairs of values of neighbouring k, taken apart
    __m256 low, high;
  };
  static constexpr int kStep = 16, kDepth = 2;

  static Operand load(const T* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
        _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))))};
  }
  static Operand broadcast(const H* p) { return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1)}; }
  static V dot(V acc, Operand a, Operand b) {
    return {_mm256_fmadd_ps(a.high, b.high, _mm256_fmadd_ps(a.low, b.low, acc.v))};
  }
  static void add(T* y, V d) {
    const __m128i old = _mm_loadu_si128(reinterpret_cast<const __m128i*>(y));
    const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(old), 16)), d.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), narrow(sum));
  }

 private:
  static __m128i narrow(__m256 v) {  // to nearest, ties to even
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace
}  // namespace hydra
