// What every driver reads: key=value words, raw files as device arrays, and the emulated machine's settings.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>

#include "simt.h"

namespace simt {

class Options {
 public:
  Options(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      const size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::invalid_argument("expected key=value, got " + word);
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
    Config& c = config();
    const std::string order = text("order", "ascending");
    c.order = order == "ascending"    ? Order::kAscending
              : order == "descending" ? Order::kDescending
                                      : Order::kRandom;
    c.seed = static_cast<uint64_t>(number("seed", 1));
    c.resident_blocks = static_cast<int>(number("resident_blocks", c.resident_blocks));
    c.yield_share = std::stod(text("yield_share", "0"));
    c.multiprocessors = static_cast<int>(number("multiprocessors", c.multiprocessors));
    c.shared_bytes_per_block = static_cast<int>(number("shared_bytes_per_block", c.shared_bytes_per_block));
    c.compute_capability = static_cast<int>(number("compute_capability", c.compute_capability));
    c.drop_barrier_line = static_cast<int>(number("drop_barrier_line", 0));
    c.drop_barrier_file = text("drop_barrier_file", "");
    c.swap_fragments = number("swap_fragments", 0) != 0;
    c.swap_matrices = number("swap_matrices", 0) != 0;
    c.shift_copy_bytes = static_cast<int>(number("shift_copy_bytes", 0));
    c.skip_copy_wait = number("skip_copy_wait", 0) != 0;
    c.flip_parity = number("flip_parity", 0) != 0;
    c.skip_wgmma_wait = number("skip_wgmma_wait", 0) != 0;
    c.skip_wgmma_fence = number("skip_wgmma_fence", 0) != 0;
    c.skip_proxy_fence = number("skip_proxy_fence", 0) != 0;
    c.swap_accumulators = number("swap_accumulators", 0) != 0;
    c.cuda_error = static_cast<int>(number("cuda_error", 0));
  }

  std::string text(const std::string& key, const std::string& otherwise) const {
    const auto found = values_.find(key);
    return found == values_.end() ? otherwise : found->second;
  }
  bool has(const std::string& key) const { return values_.contains(key); }
  int64_t number(const std::string& key, int64_t otherwise) const {
    return has(key) ? std::stoll(values_.at(key)) : otherwise;
  }
  int64_t number(const std::string& key) const {
    if (!has(key)) throw std::invalid_argument("missing " + key + "=");
    return std::stoll(values_.at(key));
  }
  // The file's bytes as device memory of exactly that size; nullptr when the key is not given. `skip` bytes
  // are left free before the data, to try unaligned views.
  template <class T>
  T* array(const std::string& key, int64_t skip = 0) const {
    if (!has(key)) return nullptr;
    std::ifstream in(values_.at(key), std::ios::binary | std::ios::ate);
    if (!in) throw std::invalid_argument("cannot read " + values_.at(key));
    const auto bytes = static_cast<size_t>(in.tellg());
    auto* p = static_cast<char*>(device_alloc(bytes + static_cast<size_t>(skip), true)) + skip;
    in.seekg(0);
    in.read(p, static_cast<std::streamsize>(bytes));
    return reinterpret_cast<T*>(p);
  }
  // The same for rows of `row_bytes`, moved `stride` bytes apart.
  char* spread(const std::string& key, int64_t rows, int64_t row_bytes, int64_t stride) const {
    const char* packed = array<char>(key);
    auto* p = static_cast<char*>(device_alloc(static_cast<size_t>(rows * stride), true));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(p + r * stride, packed + r * row_bytes, static_cast<size_t>(row_bytes));
    }
    return p;
  }
  template <class T>
  T* output(int64_t count) const {
    return static_cast<T*>(device_alloc(static_cast<size_t>(count) * sizeof(T), false));
  }
  template <class T>
  void write(const std::string& key, const T* data, int64_t count) const {
    if (!has(key)) return;
    std::ofstream out(values_.at(key), std::ios::binary);
    out.write(reinterpret_cast<const char*>(data),
              static_cast<std::streamsize>(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  std::map<std::string, std::string> values_;
};

// Runs a driver's body; prints {"raised": message or "", "report": ...}.
template <class Body>
int drive(int argc, char** argv, Body body) {
  std::string raised;
  try {
    const Options options(argc, argv);
    body(options);
  } catch (const std::exception& e) {
    raised = e.what();
  }
  for (size_t at = 0; (at = raised.find_first_of("\"\\\n", at)) != std::string::npos; ++at) raised[at] = '\'';
  std::printf("{\"raised\": \"%s\", \"report\": %s}\n", raised.c_str(), report_json().c_str());
  return 0;
}

}  // namespace simt
