#include "mips_topk/scan_variants.cuh"

namespace realm_fast::cuda {

const ScanVariant* scan_variants_bf16() {
  static constexpr ScanVariant variants[] = {scan_variant<bf16, 64>(), scan_variant<bf16, 128>()};
  return variants;
}

}  // namespace realm_fast::cuda
