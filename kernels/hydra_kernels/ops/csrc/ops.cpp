// The custom ops of packed slots: what they check, and how a call is spread over threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <optional>
#include <string>

#include "schedule.h"

// torch's OpenMP runtime is GCC's, or one that can stand in for it; code from Clang would ask for another.
#if !defined(_OPENMP) || defined(__clang__)
#error "the CPU kernels must be compiled by GCC with OpenMP"
#endif
#include <omp.h>

namespace hydra {
namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();
  bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512bf16() { return false; }
#endif

// The best first.
constexpr std::array kIsas = {
    Isa{"avx512bf16", avx512bf16_kernels, has_avx512bf16},
    Isa{"avx512", avx512_kernels, has_avx512},
    Isa{"avx2", avx2_kernels, has_avx2},
    Isa{"portable", portable_kernels, [] { return true; }},
};

const Isa* best_isa() {
  for (const Isa& isa : kIsas)
    if (isa.runs() && isa.kernels()) return &isa;
  return nullptr;  // not reached: the last one always runs
}

const Isa*& current_isa() {
  static const Isa* isa = best_isa();
  return isa;
}

// Chooses the instruction set; "" for the best that runs here. Returns the name of the one in use.
std::string cpu_isa(const std::string& name) {
  if (name.empty()) {
    current_isa() = best_isa();
  } else {
    const auto* isa = std::find_if(kIsas.begin(), kIsas.end(), [&](const Isa& i) { return name == i.name; });
    TORCH_CHECK(isa != kIsas.end(), "instruction set: got ", name, ", expected avx512bf16, avx512, avx2 or portable");
    TORCH_CHECK(isa->runs() && isa->kernels(), "instruction set: got ", name, ", which this CPU or build does not have");
    current_isa() = isa;
  }
  return current_isa()->name;
}

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    default: TORCH_CHECK(false, "got ", t.scalar_type(), ", expected float32, float16 or bfloat16");
  }
}

Table table_of(const at::Tensor& table) {
  constexpr int64_t kFields = sizeof(Record) / sizeof(int64_t);
  TORCH_CHECK(
      table.scalar_type() == at::kLong && table.dim() == 3 && table.size(2) == kFields && table.is_contiguous(),
      "table: got ", table.scalar_type(), " ", table.sizes(), ", expected contiguous int64 [slots, slices, ", kFields, "]");
  return {reinterpret_cast<const Record*>(table.const_data_ptr<int64_t>()), table.size(0), table.size(1)};
}

void check_rows(const char* name, const at::Tensor& t) {
  TORCH_CHECK(
      t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1), name, ": got ", t.sizes(), " with strides ", t.strides(),
      ", expected two dimensions, the last one contiguous");
}

Step step_of(const at::Tensor& meta, const Table& table) {
  TORCH_CHECK(
      meta.scalar_type() == at::kInt && meta.is_contiguous() && meta.numel() > Step::kHeader + 2 * table.slots,
      "meta: got ", meta.scalar_type(), " ", meta.sizes(), ", expected the host buffer of a StepMetadata with max_slots=",
      table.slots);
  return {meta.const_data_ptr<int32_t>(), table.slots};
}

// Everything the kernels will read or write lies inside the tensors. in, columns: of x and y, -1 where there is none.
void check_step(const Step& step, const Table& table, int64_t tokens, int64_t in, int64_t columns, Dtype dtype) {
  const int32_t* ids = step.tokens(0).ids;
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < step.num_tokens(); ++i) {
    low = std::min(low, ids[i]);
    high = std::max(high, ids[i]);
  }
  TORCH_CHECK(low >= 0 && high < tokens, "meta: got token ids ", low, " to ", high, ", expected 0 to ", tokens - 1);
  for (int64_t s = 0; s < step.num_segments(); ++s) {
    const int64_t slot = step.slot(s);
    TORCH_CHECK(slot >= 0 && slot < table.slots, "meta: got slot ", slot, ", expected 0 to ", table.slots - 1);
    for (int64_t slice = 0; slice < table.slices; ++slice) {
      const Record& r = table.at(slot, slice);
      if (!r.rank) continue;
      TORCH_CHECK(in < 0 || in == r.in, "x: got ", in, " features, expected ", r.in);
      TORCH_CHECK(columns < 0 || r.start + r.out <= columns, "y: got ", columns, " columns, expected ", r.start + r.out);
      TORCH_CHECK(static_cast<Dtype>(r.dtype) == dtype, "got tensors of another dtype than the slots'");
    }
  }
}

// Memory of one thread that grows and is kept, 64-byte aligned.
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (floats + 16 > size) {
    size = floats + 16;
    memory.reset(new float[size]);
  }
  void* p = memory.get();
  size_t space = size * sizeof(float);
  return static_cast<float*>(std::align(64, floats * sizeof(float), p, space));
}

// z of all slices: [slices, T, rows].
struct Z {
  float* data;
  int64_t slice_stride, token_stride;
};

struct Call {
  Step step;
  Table table;
  Kernels kernels;
  Z z;
  const void* x = nullptr;
  int64_t x_stride = 0;
  void* y = nullptr;
  int64_t y_stride = 0, y_itemsize = 0;
  float* carry = nullptr;
  int64_t carry_stride = 0;

  void shrink(int64_t total, int thread, int threads) const {
    for_share<Shrink>(step, table, total, thread, threads,
        [&](const Record& r, int64_t slice, Tokens tokens, int64_t begin, int64_t end) {
          kernels.shrink({&r, tokens, x, x_stride, z.data + slice * z.slice_stride, z.token_stride, begin, end});
        });
  }

  void expand(int64_t total, int thread, int threads) const {
    for_share<Expand>(step, table, total, thread, threads,
        [&](const Record& r, int64_t slice, Tokens tokens, int64_t begin, int64_t end) {
          kernels.expand({&r, tokens, z.data + slice * z.slice_stride, z.token_stride,
                          static_cast<char*>(y) + r.start * y_itemsize, y_stride, begin, end,
                          scratch(scratch_floats(r)), begin == 0 ? probe_of(r) : nullptr, table.slot_of(r), carry, carry_stride});
        });
  }

  // Where to record; the first panel's thread does it, as every thread of a group computes the gate.
  static const Probe* probe_of(const Record& r) {
    const auto* probe = reinterpret_cast<const Probe*>(r.probe);
    return probe && r.has_router && probe->active() ? probe : nullptr;
  }
};

// Waking another thread costs as much as this much work (unit_cost).
constexpr int64_t kForkCost = 1 << 20;

int threads_for(int64_t cost) {
  if (cost < kForkCost || at::in_parallel_region()) return 1;
  return std::min<int64_t>(at::get_num_threads(), 1 + cost / kForkCost);
}

// Runs f(thread, threads) on each of them.
template <class F>
void on_threads(int threads, F&& f) {
  if (threads == 1) return f(0, 1);
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
}

// Inside on_threads: waits until all threads are here.
inline void barrier(int threads) {
  if (threads > 1) {
#pragma omp barrier
  }
}

Call prepare(const at::Tensor& table, const at::Tensor& meta, Dtype dtype) {
  Call call{};
  call.table = table_of(table);
  call.step = step_of(meta, call.table);
  call.kernels = current_isa()->kernels()[static_cast<int64_t>(dtype)];
  return call;
}

void set_x(Call& call, const at::Tensor& x) {
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
}

void set_y(Call& call, const at::Tensor& y) {
  call.y = y.mutable_data_ptr();
  call.y_stride = y.stride(0);
  call.y_itemsize = y.element_size();
}

// Logits between layers: there must be a place for every token of a slice that gives or takes some.
void set_carry(Call& call, const std::optional<at::Tensor>& carry) {
  if (carry) {
    TORCH_CHECK(carry->scalar_type() == at::kFloat && carry->dim() == 2 && carry->is_contiguous(), "carry: got ",
                carry->scalar_type(), " ", carry->sizes(), ", expected contiguous float32 [tokens, heads]");
    call.carry = carry->mutable_data_ptr<float>();
    call.carry_stride = carry->size(1);
  }
  const int64_t rows = carry ? carry->size(0) : 0;
  for_each_group(call.step, call.table, [&](const Record& r, int64_t, Tokens tokens) {
    if (!r.carry) return;
    TORCH_CHECK(r.heads <= call.carry_stride, "carry: got ", call.carry_stride, " heads, expected at least ", r.heads);
    for (int64_t t = 0; t < tokens.count; ++t)
      TORCH_CHECK(tokens.ids[t] < rows, "carry: got ", rows, " rows, expected one for token ", tokens.ids[t]);
  });
}

int64_t most_rows(const Call& call) {
  int64_t rows = 0;
  for_each_group(call.step, call.table, [&](const Record& r, int64_t, Tokens) { rows = std::max(rows, r.z_rows()); });
  return rows;
}

void cpu_linear_(at::Tensor y, const at::Tensor& x, const at::Tensor& table, const at::Tensor& meta,
                 const std::optional<at::Tensor>& carry) {
  const Dtype dtype = dtype_of(x);
  Call call = prepare(table, meta, dtype);
  if (call.step.num_segments() == 0) return;
  check_rows("x", x);
  check_rows("y", y);
  TORCH_CHECK(y.size(0) == x.size(0) && dtype_of(y) == dtype, "y: got ", y.scalar_type(), " ", y.sizes(), ", expected ",
              x.scalar_type(), " with the ", x.size(0), " rows of x");
  check_step(call.step, call.table, x.size(0), x.size(1), y.size(1), dtype);
  set_x(call, x);
  set_y(call, y);
  set_carry(call, carry);
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  const int64_t rows = most_rows(call), needed = call.table.slices * x.size(0) * rows;
  if (needed > size) {
    memory.reset(new float[needed]);
    size = needed;
  }
  call.z = {memory.get(), x.size(0) * rows, rows};
  const int64_t shrink = total_cost<Shrink>(call.step, call.table), expand = total_cost<Expand>(call.step, call.table);
  on_threads(threads_for(shrink + expand), [&](int thread, int threads) {
    call.shrink(shrink, thread, threads);
    barrier(threads);
    call.expand(expand, thread, threads);
  });
}

at::Tensor cpu_shrink(const at::Tensor& x, const at::Tensor& table, const at::Tensor& meta, int64_t rows) {
  const Dtype dtype = dtype_of(x);
  Call call = prepare(table, meta, dtype);
  check_rows("x", x);
  at::Tensor z = at::zeros({call.table.slices, x.size(0), rows}, x.options().dtype(at::kFloat));
  if (call.step.num_segments() == 0) return z;
  check_step(call.step, call.table, x.size(0), x.size(1), -1, dtype);
  TORCH_CHECK(most_rows(call) <= rows, "rows: got ", rows, ", expected at least ", most_rows(call));
  set_x(call, x);
  call.z = {z.mutable_data_ptr<float>(), z.stride(0), z.stride(1)};
  const int64_t total = total_cost<Shrink>(call.step, call.table);
  on_threads(threads_for(total), [&](int thread, int threads) { call.shrink(total, thread, threads); });
  return z;
}

void cpu_expand_(at::Tensor y, const at::Tensor& z, const at::Tensor& table, const at::Tensor& meta,
                 const std::optional<at::Tensor>& carry) {
  const Dtype dtype = dtype_of(y);
  Call call = prepare(table, meta, dtype);
  if (call.step.num_segments() == 0) return;
  check_rows("y", y);
  check_step(call.step, call.table, y.size(0), -1, y.size(1), dtype);
  TORCH_CHECK(
      z.scalar_type() == at::kFloat && z.dim() == 3 && z.size(0) == call.table.slices && z.size(1) == y.size(0) &&
          z.size(2) >= most_rows(call) && z.stride(2) == 1,
      "z: got ", z.scalar_type(), " ", z.sizes(), ", expected float32 [", call.table.slices, ", ", y.size(0), ", ",
      most_rows(call), " or more]");
  set_y(call, y);
  set_carry(call, carry);
  call.z = {const_cast<float*>(z.const_data_ptr<float>()), z.stride(0), z.stride(1)};
  const int64_t total = total_cost<Expand>(call.step, call.table);
  on_threads(threads_for(total), [&](int thread, int threads) { call.expand(total, thread, threads); });
}

}  // namespace
}  // namespace hydra

TORCH_LIBRARY_FRAGMENT(hydra_kernels, m) {
  m.def("cpu_linear_(Tensor(a!) y, Tensor x, Tensor table, Tensor meta, Tensor(b!)? carry=None) -> ()");
  m.def("cpu_shrink(Tensor x, Tensor table, Tensor meta, int rows) -> Tensor");
  m.def("cpu_expand_(Tensor(a!) y, Tensor z, Tensor table, Tensor meta, Tensor(b!)? carry=None) -> ()");
  m.def("cpu_isa(str name) -> str", &hydra::cpu_isa);
}

TORCH_LIBRARY_IMPL(hydra_kernels, CPU, m) {
  m.impl("cpu_linear_", &hydra::cpu_linear_);
  m.impl("cpu_shrink", &hydra::cpu_shrink);
  m.impl("cpu_expand_", &hydra::cpu_expand_);
}
