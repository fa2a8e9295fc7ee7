#include "mips_topk/scan_variants.cuh"

namespace realm_fast::cuda {

const ScanVariant* scan_variants_f32() {
  static constexpr ScanVariant variants[] = {scan_variant<float, 16>(), scan_variant<float, 64>()};
  return variants;
}

}  // namespace realm_fast::cuda
