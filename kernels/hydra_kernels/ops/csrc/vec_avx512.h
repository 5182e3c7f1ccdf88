// AVX-512 vectors; with the bfloat16 dot instruction where the file is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hydra {
namespace {

struct V {
  static constexpr int kLanes = 16;
  __m512 v;

  static V zero() { return {_mm512_setzero_ps()}; }

  // out[i] = sum of the lanes of acc[i], always in the same order.
  static void sum4(const V (&acc)[4], float* out) {
    __m256 half[4];
    for (int i = 0; i < 4; ++i)
      half[i] = _mm256_add_ps(
          _mm512_castps512_ps256(acc[i].v),
          _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(acc[i].v), 1)));
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
};

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

struct Float32 {
  using T = float;
  using H = float;
  using V = hydra::V;
  using Operand = __m512;
  static constexpr int kStep = 16, kDepth = 1, kShrinkTokens = 4, kExpandTokens = 6, kExpandVectors = 4;

  static Operand load(const T* p) { return _mm512_loadu_ps(p); }
  static Operand load_first(const T* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  static Operand broadcast(const H* p) { return _mm512_set1_ps(*p); }
  static V dot(V acc, Operand a, Operand b) { return {_mm512_fmadd_ps(a, b, acc.v)}; }
  static void pack(H* to, const float* h, int64_t n) { std::memcpy(to, h, n * sizeof *h); }
  static void add(T* y, V d) { _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), d.v)); }
  static void add_first(T* y, V d, int64_t n) {
    _mm512_mask_storeu_ps(y, first_lanes(n), _mm512_add_ps(load_first(y, n), d.v));
  }
};

struct Float16 : Float32 {
  using T = uint16_t;

  static Operand load(const T* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Operand load_first(const T* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  static __m256i sum(Operand y, V d) { return _mm512_cvtps_ph(_mm512_add_ps(y, d.v), _MM_FROUND_TO_NEAREST_INT); }
  static void add(T* y, V d) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), sum(load(y), d)); }
  static void add_first(T* y, V d, int64_t n) { _mm256_mask_storeu_epi16(y, first_lanes(n), sum(load_first(y, n), d)); }
};

inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

#ifdef __AVX512BF16__

inline __m256i narrow(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

// Pairs of values of neighbouring k go through one instruction; its sums are float32.
struct BFloat16Pairs {
  using H = uint16_t;
  using Operand = __m512bh;

  static Operand operand(__m512i pairs) { return reinterpret_cast<Operand>(pairs); }
  static Operand broadcast(const H* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return operand(_mm512_set1_epi32(pair));
  }
  static V dot(V acc, Operand a, Operand b) { return {_mm512_dpbf16_ps(acc.v, a, b)}; }
  static void pack(H* to, const float* h, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = n - i >= 16 ? 0xffff : first_lanes(n - i);
      _mm256_mask_storeu_epi16(to + i, m, narrow(_mm512_maskz_loadu_ps(m, h + i)));
    }
  }
};

#else

inline __m256i narrow(__m512 v) {  // to nearest, ties to even
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

// Pairs of values of neighbouring k are taken apart; h stays in float32.
struct BFloat16Pairs {
  using H = float;
  struct Operand {
    __m512 low, high;
  };

  static Operand operand(__m512i pairs) {
    return {
        _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))))};
  }
  static Operand broadcast(const H* p) { return {_mm512_set1_ps(p[0]), _mm512_set1_ps(p[1])}; }
  static V dot(V acc, Operand a, Operand b) {
    return {_mm512_fmadd_ps(a.high, b.high, _mm512_fmadd_ps(a.low, b.low, acc.v))};
  }
  static void pack(H* to, const float* h, int64_t n) { std::memcpy(to, h, n * sizeof *h); }
};

#endif

struct BFloat16 : BFloat16Pairs {
  using T = uint16_t;
  using V = hydra::V;
  static constexpr int kStep = 32, kDepth = 2, kShrinkTokens = 4, kExpandTokens = 6, kExpandVectors = 4;

  static Operand load(const T* p) { return operand(_mm512_loadu_si512(p)); }
  static Operand load_first(const T* p, int64_t n) {
    return operand(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p));
  }
  static void add(T* y, V d) {
    auto* p = reinterpret_cast<__m256i*>(y);
    _mm256_storeu_si256(p, narrow(_mm512_add_ps(widen(_mm256_loadu_si256(p)), d.v)));
  }
  static void add_first(T* y, V d, int64_t n) {
    const __mmask16 m = first_lanes(n);
    _mm256_mask_storeu_epi16(y, m, narrow(_mm512_add_ps(widen(_mm256_maskz_loadu_epi16(m, y)), d.v)));
  }
};

}  // namespace
}  // namespace hydra
