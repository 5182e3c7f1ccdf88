#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"

#include "kernels_impl.h"

namespace hydra {

const Kernels* avx2_kernels() {
  static const Kernels table[] = {kernels<Float32>(), kernels<Float16>(), kernels<BFloat16>()};
  return table;
}

}  // namespace hydra

#else

const hydra::Kernels* hydra::avx2_kernels() { return nullptr; }

#endif
