#include "mips_topk/scan_variants.cuh"

namespace realm_fast::cuda {

const ScanVariant* scan_variants_int8() {
  static constexpr ScanVariant variants[] = {scan_variant<int8_t, 64>(), scan_variant<int8_t, 128>()};
  return variants;
}

}  // namespace realm_fast::cuda
