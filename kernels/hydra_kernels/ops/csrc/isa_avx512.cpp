#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "vec_avx512.h"

#include "kernels_impl.h"

namespace hydra {

const Kernels* avx512_kernels() {
  static const Kernels table[] = {kernels<Float32>(), kernels<Float16>(), kernels<BFloat16>()};
  return table;
}

}  // namespace hydra

#else

const hydra::Kernels* hydra::avx512_kernels() { return nullptr; }

#endif
