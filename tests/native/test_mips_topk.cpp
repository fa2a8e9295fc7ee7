// Every CPU level, precision and edge against a plain search; sized so that address, undefined and thread
// sanitizers finish in a minute.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "mips_topk/kernels.h"
#include "mips_topk/mips_topk.h"

using namespace realm_fast;
using namespace realm_fast::mips;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Data {
  int64_t rows, dim, queries;
  std::vector<float> blocks, query_values;
};

// Small integers: every sum is exact, so that all levels and precisions must agree to the bit, ties included.
Data integers(int64_t rows, int64_t dim, int64_t queries, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> value(-3, 3);
  Data data{rows, dim, queries, std::vector<float>(rows * dim), std::vector<float>(queries * dim)};
  for (float& x : data.blocks) x = static_cast<float>(value(random));
  for (float& x : data.query_values) x = static_cast<float>(value(random));
  return data;
}

struct Answer {
  std::vector<float> scores;
  std::vector<int64_t> keys;
  bool operator==(const Answer& other) const { return scores == other.scores && keys == other.keys; }
};

Answer plain_search(const Data& data, int64_t k, const std::vector<int64_t>& excluded, int64_t num_excluded) {
  Answer answer{std::vector<float>(data.queries * k, -kInfinity), std::vector<int64_t>(data.queries * k, -1)};
  for (int64_t q = 0; q < data.queries; ++q) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t n = 0; n < data.rows; ++n) {
      float sum = 0;
      for (int64_t d = 0; d < data.dim; ++d)
        sum += data.query_values[q * data.dim + d] * data.blocks[n * data.dim + d];
      const auto begin = excluded.begin() + q * num_excluded;
      if (sum > -kInfinity && std::find(begin, begin + num_excluded, n) == begin + num_excluded)
        all.push_back({sum, n});
    }
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    for (int64_t j = 0; j < std::min<int64_t>(k, static_cast<int64_t>(all.size())); ++j) {
      answer.scores[q * k + j] = all[j].first;
      answer.keys[q * k + j] = all[j].second;
    }
  }
  return answer;
}

// An index in heap memory of exactly the right size: a read past its end is seen by the address sanitizer.
struct HeapIndex {
  Dtype dtype;
  int64_t rows, dim, padded;
  std::vector<char> panels;
  std::vector<float> scale, residual, norm, bounds, originals;
  std::vector<int64_t> irregular;

  HeapIndex(Dtype type, const Data& data) : dtype(type), rows(data.rows), dim(data.dim) {
    padded = (rows + kPanelRows - 1) / kPanelRows * kPanelRows;
    panels.assign(padded * steps_of(type, dim) * kStepBytes, 0);
    scale.assign(padded, kNaN);
    residual.assign(padded, 0);
    norm.assign(padded, 0);
    bounds.assign(padded / kPanelRows * 2, 0);
    originals = data.blocks;
    std::vector<int64_t> padding;
    for (int64_t r = rows; r < padded; ++r) padding.push_back(r);
    clear_rows(type, dim, slab(), padding.data(), static_cast<int64_t>(padding.size()));
    std::vector<uint8_t> flags(rows);
    store_rows(type, dim, slab(), nullptr, 0, rows, data.blocks.data(), dim, flags.data(), 2);
    for (int64_t r = 0; r < rows; ++r) {
      if (flags[r]) irregular.push_back(r);
    }
  }
  MutableSlab slab() {
    return {padded, panels.data(), scale.data(), residual.data(), norm.data(), bounds.data()};
  }
  IndexSearch search() const {
    IndexSearch index;
    index.dtype = dtype;
    if (rows > 0) {
      index.slabs.push_back({rows, panels.data(), dtype == Dtype::int8 ? scale.data() : nullptr,
                             residual.data(), norm.data(), bounds.data(), originals.data()});
    }
    index.irregular_rows = irregular;
    return index;
  }
};

Search request(const Data& data, int64_t k, const std::vector<int64_t>& excluded, int64_t num_excluded,
               int threads, Answer& answer) {
  answer.scores.assign(data.queries * k, 0);
  answer.keys.assign(data.queries * k, 0);
  Search search;
  search.dim = data.dim;
  search.queries = data.query_values.data();
  search.num_queries = data.queries;
  search.k = k;
  search.excluded = excluded.data();
  search.num_excluded = num_excluded;
  search.num_threads = threads;
  search.scores = answer.scores.data();
  search.keys = answer.keys.data();
  return search;
}

void at_every_level(void (*body)()) {
  for (const std::string& level : available_cpu_levels()) {
    force_cpu_level(level);
    body();
  }
  force_cpu_level("");
}

void check_case(int64_t rows, int64_t dim, int64_t queries, int64_t k, int64_t num_excluded, unsigned seed) {
  const Data data = integers(rows, dim, queries, seed);
  std::mt19937 random(seed + 1);
  std::vector<int64_t> excluded(queries * num_excluded);
  for (int64_t& id : excluded) id = rows == 0 ? -1 : static_cast<int64_t>(random() % (rows + 1)) - 1;
  const Answer expected = plain_search(data, k, excluded, num_excluded);
  Answer answer;
  for (const int threads : {1, 3}) {
    for (const int64_t segment : {int64_t{1} << 31, int64_t{96}}) {
      Search search = request(data, k, excluded, num_excluded, threads, answer);
      search.max_segment_rows = segment;
      CHECK(topk_rows(search, {data.blocks.data(), rows, dim, RowType::float32}));
      CHECK(answer == expected);
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8}) {
        const HeapIndex index(dtype, data);
        SearchStats stats;
        search = request(data, k, excluded, num_excluded, threads, answer);
        search.max_segment_rows = segment;
        CHECK(topk_index(search, index.search(), stats));
        CHECK(answer == expected);
      }
    }
  }
}

}  // namespace

TEST(mips_topk_every_level_and_shape) {
  at_every_level([] {
    check_case(500, 16, 9, 5, 2, 1);
    check_case(97, 1, 1, 97, 0, 2);
    check_case(48, 5, 2, 60, 1, 3);
    check_case(1, 3, 4, 2, 1, 4);
    check_case(700, 33, 3, 40, 3, 5);
    check_case(300, 18, 17, 1, 0, 6);
    // Tasks that begin in the middle of the queries; whole tiles of steps, with and without a rest.
    check_case(60, 64, 41, 5, 0, 11);
    check_case(100, 130, 70, 5, 1, 12);
    check_case(60, 128, 33, 4, 0, 13);
    check_case(0, 7, 2, 3, 0, 7);
    check_case(60, 8, 0, 3, 0, 9);
    check_case(60, 8, 3, 0, 0, 10);
  });
}

TEST(mips_topk_special_rows) {
  at_every_level([] {
    Data data = integers(200, 10, 5, 11);
    data.blocks[3 * 10] = kNaN;
    data.blocks[50 * 10 + 4] = kInfinity;
    data.blocks[51 * 10 + 4] = -kInfinity;
    data.blocks[120 * 10] = 3e38f;
    data.query_values[4 * 10] = kNaN;
    const Answer expected = plain_search(data, 30, {}, 0);
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8}) {
      const HeapIndex index(dtype, data);
      Answer answer;
      SearchStats stats;
      CHECK(topk_index(request(data, 30, {}, 0, 2, answer), index.search(), stats));
      CHECK(answer == expected);
    }
  });
}

TEST(mips_topk_falls_back_when_candidates_overflow) {
  at_every_level([] {
    Data data = integers(3000, 8, 3, 12);
    for (int64_t n = 1; n < data.rows; ++n) {  // all rows alike
      std::copy_n(data.blocks.begin(), data.dim, data.blocks.begin() + n * data.dim);
    }
    const Answer expected = plain_search(data, 4, {}, 0);
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::int8}) {
      const HeapIndex index(dtype, data);
      Answer answer;
      SearchStats stats;
      IndexSearch search = index.search();
      search.max_candidates = 500;
      CHECK(topk_index(request(data, 4, {}, 0, 2, answer), search, stats));
      CHECK(stats.fell_back == 3);
      CHECK(answer == expected);
    }
  });
}

// Large k over many panels: thresholds are guessed from a sample, the first panel of every run of 32 first.
TEST(mips_topk_guesses_are_checked) {
  at_every_level([] {
    Data data{110'000, 4, 17, std::vector<float>(110'000 * 4), std::vector<float>(17 * 4)};
    std::mt19937 random(17);
    std::normal_distribution<float> value;
    for (float& x : data.blocks) x = value(random);
    for (float& x : data.query_values) x = value(random);
    const std::vector<int64_t> excluded(17, 5);
    for (const bool misleading : {false, true}) {
      // The sampled panels hold all the good rows: the sample promises 32 times too many.
      for (int64_t n = 0; misleading && n < data.rows; ++n) {
        if (n / kPanelRows % 32 != 0) {
          for (int64_t d = 0; d < data.dim; ++d) data.blocks[n * data.dim + d] *= 0.01f;
        }
      }
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8}) {
        const HeapIndex index(dtype, data);
        Answer guessed, proven;
        SearchStats stats;
        Search search = request(data, 200, excluded, 1, 1, proven);
        search.guess = false;
        CHECK(topk_index(search, index.search(), stats));
        CHECK(stats.repeated == 0);
        for (const int threads : {1, 3}) {
          CHECK(topk_index(request(data, 200, excluded, 1, threads, guessed), index.search(), stats));
          CHECK(guessed == proven);
          CHECK((stats.repeated > 0) == misleading);
        }
      }
    }
  });
}

TEST(mips_topk_searches_at_once) {
  const Data data = integers(2000, 24, 6, 13);
  const HeapIndex index(Dtype::int8, data);
  const Answer expected = plain_search(data, 8, {}, 0);
  std::vector<Answer> answers(4);
  std::vector<std::thread> threads;
  for (Answer& answer : answers) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 5; ++repeat) {
        SearchStats stats;
        topk_index(request(data, 8, {}, 0, 3, answer), index.search(), stats);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const Answer& answer : answers) CHECK(answer == expected);
}

TEST(mips_topk_stops_when_asked) {
  const Data data = integers(5000, 8, 2, 14);
  Answer answer;
  Search search = request(data, 3, {}, 0, 2, answer);
  search.poll = [] { return false; };
  CHECK(!topk_rows(search, {data.blocks.data(), data.rows, data.dim, RowType::float32}));
}

TEST(mips_topk_rows_come_back_from_panels) {
  const Data data = integers(130, 9, 1, 15);
  const HeapIndex index(Dtype::float32, data);
  const std::vector<int64_t> rows = {0, 47, 48, 129};
  std::vector<float> values(rows.size() * data.dim);
  load_rows(data.dim, reinterpret_cast<const float*>(index.panels.data()), rows.data(),
            static_cast<int64_t>(rows.size()), values.data());
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int64_t d = 0; d < data.dim; ++d) {
      CHECK(values[i * data.dim + d] == data.blocks[rows[i] * data.dim + d]);
    }
  }
}

TEST(mips_topk_half_precision_rows) {
  at_every_level([] {
    const Data data = integers(150, 7, 3, 16);
    const Answer expected = plain_search(data, 6, {}, 0);
    std::vector<uint16_t> bfloat16(data.blocks.size()), float16(data.blocks.size());
    for (size_t i = 0; i < data.blocks.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &data.blocks[i], sizeof bits);
      bfloat16[i] = static_cast<uint16_t>(bits >> 16);
      const auto magnitude = static_cast<uint16_t>(std::abs(data.blocks[i]));  // 0, 1, 2 or 3
      constexpr uint16_t kHalf[] = {0, 0x3c00, 0x4000, 0x4200};
      float16[i] = static_cast<uint16_t>(kHalf[magnitude] | (bits >> 31 << 15));
    }
    Answer answer;
    const Search search = request(data, 6, {}, 0, 2, answer);
    CHECK(topk_rows(search, {bfloat16.data(), data.rows, data.dim, RowType::bfloat16}));
    CHECK(answer == expected);
    CHECK(topk_rows(search, {float16.data(), data.rows, data.dim, RowType::float16}));
    CHECK(answer == expected);
  });
}
