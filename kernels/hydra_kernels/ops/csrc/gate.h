// Logits -> routing weights -> h, for one token, in float32. Compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "record.h"

namespace hydra {
namespace {

// e^x for x <= 0 with a relative error below 2e-7; 0 is not reached (e^-87 instead), NaN stays NaN. Free of branches
// and calls, so that the heads of a token are computed side by side.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + shift) - shift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Keeps the top_k largest of w, the first of equals, and sets the others to 0 (NaN stays NaN). `kept` is overwritten.
inline void keep_top_k(float* w, float* kept, int64_t heads, int64_t top_k) {
  for (int64_t i = 0; i < heads; ++i) kept[i] = 0.0f;
  for (int64_t n = 0; n < top_k; ++n) {
    int64_t best = -1;
    for (int64_t i = 0; i < heads; ++i)
      if (kept[i] == 0.0f && (best < 0 || w[i] > w[best])) best = i;
    kept[best] = 1.0f;
  }
  for (int64_t i = 0; i < heads; ++i) w[i] *= kept[i];
}

inline void scale_to_sum_one(float* w, int64_t heads) {
  float sum = 0.0f;
  for (int64_t i = 0; i < heads; ++i) sum += w[i];
  const float inverse = 1.0f / sum;
  for (int64_t i = 0; i < heads; ++i) w[i] *= inverse;
}

// Leaves the router's logits g [heads], and its bias, for the layers that take them.
inline void give_logits(const Record& r, const float* g, float* to) {
  const auto* bias = reinterpret_cast<const float*>(r.bias);
  for (int64_t i = 0; i < r.heads; ++i) to[i] = bias ? g[i] + bias[i] : g[i];
}

// w [heads] from the router's logits g [heads] (not read without a router). spare: [heads].
inline void routing_weights(const Record& r, const float* g, float* w, float* spare) {
  if (!r.has_router && !r.takes()) {
    for (int64_t i = 0; i < r.heads; ++i) w[i] = 1.0f / static_cast<float>(r.heads);
    return;
  }
  const auto* bias = reinterpret_cast<const float*>(r.bias);
  float largest = -__builtin_inff();
  for (int64_t i = 0; i < r.heads; ++i) {
    w[i] = bias ? g[i] + bias[i] : g[i];
    largest = w[i] > largest ? w[i] : largest;
  }
  for (int64_t i = 0; i < r.heads; ++i) w[i] = exp_nonpositive(w[i] - largest);
  scale_to_sum_one(w, r.heads);
  if (r.top_k && r.top_k < r.heads) {
    keep_top_k(w, spare, r.heads, r.top_k);
    if (r.renormalize) scale_to_sum_one(w, r.heads);
  }
}

// h[i * rank + j] = s * w[i] * u[(i,) j] of one token with z = [u | g].
inline void mix(const Record& r, const float* z, const float* w, float* h) {
  const int32_t bits = static_cast<int32_t>(r.scaling);
  float scaling;
  std::memcpy(&scaling, &bits, sizeof scaling);
  const int64_t step = r.shared_a ? 0 : r.rank;
  for (int64_t i = 0; i < r.heads; ++i) {
    const float factor = scaling * w[i];
    for (int64_t j = 0; j < r.rank; ++j) h[i * r.rank + j] = factor * z[i * step + j];
  }
}

}  // namespace
}  // namespace hydra
