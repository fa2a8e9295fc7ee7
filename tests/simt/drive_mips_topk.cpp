// Runs the CUDA mips_topk of csrc/mips_topk on the emulated machine.
#include "mips_topk/mips_topk_cuda.h"
#include "options.h"

int main(int argc, char** argv) {
  return simt::drive(argc, argv, [](const simt::Options& o) {
    using realm_fast::ScanDtype;
    realm_fast::MipsTopkCuda call;
    const std::string dtype = o.text("dtype", "float32");
    call.dtype = dtype == "float32"    ? ScanDtype::kFloat32
                 : dtype == "bfloat16" ? ScanDtype::kBFloat16
                 : dtype == "float16"  ? ScanDtype::kFloat16
                                       : ScanDtype::kInt8;
    call.num_queries = o.number("B");
    call.num_blocks = o.number("N");
    call.dim = static_cast<int>(o.number("D"));
    call.k = static_cast<int>(o.number("k"));
    call.query_stride = o.number("query_stride", call.dim);
    call.block_stride = o.number("block_stride", call.dim);
    call.queries = o.array<char>("queries", o.number("query_skip", 0));
    const int64_t size = dtype == "float32" ? 4 : dtype == "int8" ? 1 : 2;
    call.blocks = o.number("spread", 0) != 0  // the file has the rows side by side
                      ? o.spread("blocks", call.num_blocks, call.dim * size, call.block_stride * size)
                      : o.array<char>("blocks", o.number("block_skip", 0));
    call.exclude_ids = o.array<int64_t>("exclude_ids");
    call.exclude_width = static_cast<int>(o.number("exclude_width", 0));
    call.originals = o.array<float>("originals");
    call.original_stride = o.number("original_stride", call.dim);
    call.block_scale = o.array<float>("block_scale");
    call.block_residual = o.array<float>("block_residual");
    call.block_norm = o.array<float>("block_norm");
    call.block_bounds = o.array<float>("block_bounds");
    const std::string kernel = o.text("kernel", "auto");
    call.kernel = kernel == "mma"     ? realm_fast::ScanKernel::kMma
                  : kernel == "wgmma" ? realm_fast::ScanKernel::kWgmma
                                      : realm_fast::ScanKernel::kAuto;
    call.num_seeds = o.number("num_seeds", 0);
    call.scores = o.output<float>(call.num_queries * call.k);
    call.ids = o.output<int64_t>(call.num_queries * call.k);
    call.workspace_bytes = realm_fast::mips_topk_cuda_workspace(call);
    call.workspace = simt::device_alloc(call.workspace_bytes, false);
    realm_fast::mips_topk_cuda(call);
    o.write("scores", call.scores, call.num_queries * call.k);
    o.write("ids", call.ids, call.num_queries * call.k);
  });
}
