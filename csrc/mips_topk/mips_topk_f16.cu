#include "mips_topk/scan_variants.cuh"

namespace realm_fast::cuda {

const ScanVariant* scan_variants_f16() {
  static constexpr ScanVariant variants[] = {scan_variant<f16, 64>(), scan_variant<f16, 128>()};
  return variants;
}

}  // namespace realm_fast::cuda
