// The step's work, and which part of it each thread does. See StepMetadata in hydra_kernels/metadata.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace hydra {

// The step metadata's host buffer.
struct Step {
  static constexpr int64_t kNumTokens = 0, kNumSegments = 1, kHeader = 4;

  const int32_t* buffer;
  int64_t max_slots;

  int64_t num_tokens() const { return buffer[kNumTokens]; }
  int64_t num_segments() const { return buffer[kNumSegments]; }
  int64_t slot(int64_t segment) const { return buffer[kHeader + segment]; }
  Tokens tokens(int64_t segment) const {
    const int32_t* start = buffer + kHeader + max_slots + segment;
    return {buffer + kHeader + 2 * max_slots + 1 + start[0], start[1] - start[0]};
  }
};

// The layer's slots.
struct Table {
  const Record* records;  // [slots, slices]
  int64_t slots, slices;

  const Record& at(int64_t slot, int64_t slice) const { return records[slot * slices + slice]; }
  int64_t slot_of(const Record& r) const { return (&r - records) / slices; }
};

// Calls f(record, slice, tokens) for every adapted slice of every segment, tokens cut into groups.
template <class F>
void for_each_group(const Step& step, const Table& table, F&& f) {
  for (int64_t s = 0; s < step.num_segments(); ++s) {
    const Tokens all = step.tokens(s);
    for (int64_t first = 0; first < all.count; first += kTokenGroup) {
      const Tokens group{all.ids + first, std::min(kTokenGroup, all.count - first)};
      for (int64_t slice = 0; slice < table.slices; ++slice) {
        const Record& r = table.at(step.slot(s), slice);
        if (r.rank) f(r, slice, group);
      }
    }
  }
}

// A phase of the work: units that are independent of one another, and what one of them costs.
struct Shrink {
  static int64_t units(const Record& r) { return (r.z_rows() + kRowGroup - 1) / kRowGroup; }
  static int64_t size(const Record& r) { return r.in * kRowGroup; }
};
struct Expand {
  static int64_t units(const Record& r) { return (r.out + kPanel - 1) / kPanel; }
  static int64_t size(const Record& r) { return r.k() * kPanel; }
};

// Reading a weight from memory costs as much as multiplying it with this many tokens.
constexpr int64_t kLoadCost = 16;

template <class Phase>
int64_t unit_cost(const Record& r, int64_t tokens) {
  return Phase::size(r) * (tokens + kLoadCost);
}

template <class Phase>
int64_t total_cost(const Step& step, const Table& table) {
  int64_t total = 0;
  for_each_group(step, table, [&](const Record& r, int64_t, Tokens group) {
    total += Phase::units(r) * unit_cost<Phase>(r, group.count);
  });
  return total;
}

// Calls f(record, slice, tokens, begin, end) for the units that fall into one thread's share of the total cost. The
// shares of all threads cover every unit once.
template <class Phase, class F>
void for_share(const Step& step, const Table& table, int64_t total, int thread, int threads, F&& f) {
  const int64_t low = total * thread / threads, high = total * (thread + 1) / threads;
  int64_t before = 0;
  for_each_group(step, table, [&](const Record& r, int64_t slice, Tokens group) {
    const int64_t units = Phase::units(r), cost = unit_cost<Phase>(r, group.count);
    const auto first_at = [&](int64_t position) {
      return std::clamp<int64_t>((position - before + cost - 1) / cost, 0, units);
    };
    const int64_t begin = before < low ? first_at(low) : 0, end = before < high ? first_at(high) : 0;
    if (begin < end) f(r, slice, group, begin, end);
    before += units * cost;
  });
}

}  // namespace hydra
