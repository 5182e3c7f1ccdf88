// What a step records of the gate: sums for each slot, and every weight of traced tokens. See hydra_kernels/probe.py.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "record.h"

namespace hydra {

// The control block of a RoutingProbe, followed by `traces` for each token of the step.
struct Probe {
  int64_t sums;    // address of double [slots, routers, heads + 1]; 0: not counted
  int64_t traced;  // whether any token of the step has a trace
  int64_t routers;
  int64_t heads;

  HYDRA_INLINE bool active() const { return sums || traced; }
  // Address of float [routers, heads] for each token; 0: no trace.
  HYDRA_INLINE const int64_t* traces() const { return reinterpret_cast<const int64_t*>(this + 1); }
};
static_assert(sizeof(Probe) == 4 * sizeof(int64_t));

namespace {

// Gathers the weights of one router over tokens of one slot.
class Tally {
 public:
  // probe: nullptr to record nothing. sums: room for heads + 1.
  Tally(const Probe* probe, const Record& r, int64_t slot, double* sums)
      : probe_(probe), record_(r), slot_(slot), sums_(sums) {
    if (probe_) std::memset(sums_, 0, (r.heads + 1) * sizeof(double));
  }

  // w: [heads] of one token.
  HYDRA_INLINE void add(int64_t token, const float* w) {
    if (!probe_) return;
    if (probe_->traced && probe_->traces()[token])
      std::memcpy(
          reinterpret_cast<float*>(probe_->traces()[token]) + record_.router * probe_->heads, w,
          record_.heads * sizeof(float));
    if (probe_->sums) count(w);
  }

  // Other threads may do the same for other tokens of the slot.
  HYDRA_INLINE void store() {
    if (!probe_ || !probe_->sums) return;
    const int64_t stride = probe_->heads + 1;
    auto* total = reinterpret_cast<double*>(probe_->sums) + (slot_ * probe_->routers + record_.router) * stride;
    for (int64_t i = 0; i < record_.heads; ++i) add_to(total[i], sums_[i]);
    add_to(total[probe_->heads], sums_[record_.heads]);
  }

 private:
  HYDRA_INLINE void count(const float* w) {
    double entropy = 0.0;
    for (int64_t i = 0; i < record_.heads; ++i) {
      sums_[i] += w[i];
      if (w[i] > 0.0f) entropy -= w[i] * std::log(w[i]);
    }
    sums_[record_.heads] += entropy;
  }

  static HYDRA_INLINE void add_to(double& total, double value) {
    std::atomic_ref<double>(total).fetch_add(value, std::memory_order_relaxed);
  }

  const Probe* probe_;
  const Record& record_;
  int64_t slot_;
  double* sums_;
};

}  // namespace
}  // namespace hydra
