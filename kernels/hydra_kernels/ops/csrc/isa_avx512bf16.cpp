#include "kernels.h"

#if defined(__AVX512BF16__)
#include "vec_avx512.h"

#include "kernels_impl.h"

namespace hydra {

const Kernels* avx512bf16_kernels() {
  static const Kernels table[] = {kernels<Float32>(), kernels<Float16>(), kernels<BFloat16>()};
  return table;
}

}  // namespace hydra

#else

const hydra::Kernels* hydra::avx512bf16_kernels() { return nullptr; }

#endif
