// Runs the CUDA marginal_lse of csrc/marginal_lse on the emulated machine.
#include "marginal_lse/marginal_lse.h"
#include "options.h"

int main(int argc, char** argv) {
  return simt::drive(argc, argv, [](const simt::Options& o) {
    const int64_t B = o.number("B"), K = o.number("K"), M = o.number("M");
    const int dtype = static_cast<int>(o.number("dtype"));
    const bool sequence = o.number("sequence") != 0;
    const int64_t size = dtype == 0 ? 4 : dtype == 1 ? 8 : 2, acc = dtype == 1 ? 8 : 4;
    const int64_t marginal_bytes = (sequence ? B : B * M) * acc;
    const int64_t r_bytes = B * K * (sequence ? 1 : M) * acc;
    const auto* mask = o.array<uint8_t>("mask");
    auto* marginal = o.output<char>(marginal_bytes);
    auto* r = o.output<char>(r_bytes);
    realm_fast::marginal_lse_cuda(
        {o.array<char>("gold"), o.array<char>("candidate"), mask, marginal, r, B, K, M, sequence, dtype},
        nullptr);
    o.write("marginal", marginal, marginal_bytes);
    o.write("responsibility", r, r_bytes);
    auto* d_gold = o.output<char>(B * K * M * size);
    auto* d_candidate = o.output<char>(B * K * size);
    realm_fast::marginal_lse_backward_cuda(
        {o.array<char>("grad"), r, mask, d_gold, d_candidate, B, K, M, sequence, dtype}, nullptr);
    o.write("d_gold", d_gold, B * K * M * size);
    o.write("d_candidate", d_candidate, B * K * size);
  });
}
