#include "vec_portable.h"

#include "kernels_impl.h"

namespace hydra {

const Kernels* portable_kernels() {
  static const Kernels table[] = {kernels<Float32>(), kernels<Float16>(), kernels<BFloat16>()};
  return table;
}

}  // namespace hydra
