// The emulated machine: fibers, scheduler, collectives, memory checks. See simt.h for what it does.
#include "simt.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string_view>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack, takes the new one: about two nanoseconds, where
// ucontext asks the kernel for the signal mask each time.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#elif defined(__aarch64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,%function
simt_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
.size simt_switch,.-simt_switch
)");
#else
#error "the SIMT harness knows how to switch stacks on x86-64 and aarch64"
#endif

namespace simt {
namespace {

void step_aside();

constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 in every integer

struct Block;

struct PendingCopy {
  unsigned char* dst;
  const unsigned char* src;
  int bytes;
  uint64_t group;
  bool landed;
};

// tma_load: a box on its way.
struct BoxCopy {
  unsigned char* dst;
  TensorMap map;
  int64_t column, row;  // column in bytes
  int barrier;
};

struct Mbarrier {
  const void* at;
  int count, pending;
  int64_t bytes = 0;                // expected and not yet landed
  uint32_t phases = 0;              // completed
  std::vector<uint32_t> seen_from;  // phase -> block barriers passed by the first thread that saw its end
  int init_thread;
  uint32_t init_fences;
};
constexpr size_t kMaxMbarriers = 16;

// wgmma: one warp's share of a product, and the accumulators of products under way.
struct Product {
  uint64_t a, b;
  bool accumulate, is_bf16, done;
  uint64_t group;
  float* key;  // lane 0's accumulators
};
struct Flight {
  std::array<float*, 32> d;
  std::array<std::array<float, 64>, 32> values;
  int products = 0;
};
struct Warp {
  bool fenced = false;
  uint64_t open_group = 0;
  size_t started = 0;
  std::deque<Product> products;
  std::map<float*, Flight> flights;
};

enum class State { kReady, kBarrier, kCollective, kDone };

struct Lane {
  void* sp = nullptr;
  unsigned char* stack = nullptr;
  Block* block = nullptr;
  uint3 thread{};
  int linear = 0;
  State state = State::kReady;
  int wait_line = 0;
  // barrier
  int barrier_kind = 0, barrier_predicate = 0, barrier_result = 0;
  // collective
  int kind = 0;
  unsigned mask = 0;
  void* argument = nullptr;
  // order of memory accesses
  uint32_t epoch = 0;       // block barriers passed
  uint16_t warp_epoch = 0;  // full-warp barriers passed
  // cp.async
  std::vector<PendingCopy> copies;
  uint64_t open_group = 0;
  // Hopper
  uint32_t proxy_fences = 0;
  std::array<uint32_t, kMaxMbarriers> phases_seen{};
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
#endif
};

// The last write and the last reads of two bytes of shared memory.
struct Cell {
  uint32_t write_epoch, read_epoch;
  uint16_t write_thread, read_thread;
  uint16_t write_warp_epoch, read_warp_epoch;
  uint8_t written, write_atomic, in_flight, read_atomic;
  uint8_t any_read, read_many_threads, read_many_warps;
  uint8_t is_barrier;
  // Written by a box copy: the barrier (number + 1) and its phase; by a thread: its proxy fences so far.
  uint16_t box_barrier, box_phase, write_fences;
  uint16_t products_reading;  // wgmma under way
};

struct Block {
  uint3 index{};
  std::vector<Lane> lanes;
  int live = 0, arrived = 0;
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::map<std::pair<std::string, int>, std::pair<unsigned char*, size_t>> statics;
  unsigned char* window = nullptr;  // hooks: this slot's part of the shared arena
  size_t window_used = 0;
  std::vector<Cell> cells;
  std::vector<Mbarrier> mbarriers;
  std::vector<BoxCopy> boxes;  // under way
  std::vector<Warp> warps;
  std::map<size_t, std::vector<std::array<uint64_t, 3>>> products;  // warpgroup -> what its warps started
};

struct Allocation {
  unsigned char* base;
  size_t bytes;
  std::vector<uint8_t> written;  // empty: everything counts as written
};

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
  Counts counts;
};

Config the_config;
Counts counts;
std::vector<LaunchRecord> launches;
std::map<std::pair<std::string, std::string>, int> errors;

Lane* current = nullptr;
void* scheduler_sp = nullptr;
const std::function<void()>* kernel_body = nullptr;
std::string kernel_name;
dim3 grid_dim, block_dim;
std::vector<std::unique_ptr<Block>> resident;
std::deque<Lane*> ready;
std::vector<unsigned char*> free_stacks;
std::mt19937_64 rng;
uint64_t idle_yields = 0;
bool launch_failed = false;
#ifdef __SANITIZE_ADDRESS__
void* scheduler_fake = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
#endif

uint64_t draw(uint64_t n) { return rng() % n; }
bool chance(double p) { return p > 0 && static_cast<double>(rng() >> 11) * 0x1p-53 < p; }

std::string here() {
  if (current == nullptr) return kernel_name;
  char text[160];
  const uint3 b = current->block->index;
  std::snprintf(text, sizeof text, "%s, block (%u,%u,%u), thread %d", kernel_name.c_str(), b.x, b.y, b.z,
                current->linear);
  return text;
}

// Each kind is kept with a few places. Where one fault shows at every byte, asking first saves describing
// them.
std::map<std::string_view, int> kept;
constexpr int kKept = 8;
bool enough_of(const char* kind) {
  const auto found = kept.find(kind);
  return found != kept.end() && found->second >= kKept;
}

// ---- stacks and switching ----

unsigned char* take_stack() {
  if (!free_stacks.empty()) {
    unsigned char* s = free_stacks.back();
    free_stacks.pop_back();
    return s;
  }
  void* p = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("simt: mmap of a stack");
    std::abort();
  }
  mprotect(p, kPage, PROT_NONE);
  return static_cast<unsigned char*>(p) + kPage;
}

void to_scheduler(bool finished) {
  Lane* self = current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(finished ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
#else
  (void)finished;
#endif
  simt_switch(&self->sp, scheduler_sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void run(Lane* lane) {
  current = lane;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake, lane->stack, kStackBytes);
#endif
  simt_switch(&scheduler_sp, lane->sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

void release_barrier(Block& block);
void land(PendingCopy& copy);

[[noreturn]] void lane_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  (*kernel_body)();
  Lane* self = current;
  for (PendingCopy& copy : self->copies) land(copy);
  self->copies.clear();
  if (!self->block->warps[static_cast<size_t>(self->linear / 32)].products.empty()) {
    report_error("wgmma never waited for", kernel_name);
  }
  self->state = State::kDone;
  Block& block = *self->block;
  --block.live;
  if (block.live > 0 && block.arrived == block.live) release_barrier(block);
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

void prepare(Lane& lane) {
  lane.stack = take_stack();
  auto top = reinterpret_cast<uintptr_t>(lane.stack + kStackBytes);
#if defined(__x86_64__)
  auto* slots = reinterpret_cast<void**>(top & ~uintptr_t{15});
  *--slots = nullptr;  // keeps the entry's stack 16-byte aligned as after a call
  *--slots = reinterpret_cast<void*>(&lane_main);
  for (int i = 0; i < 6; ++i) *--slots = nullptr;
  lane.sp = slots;
#else
  auto* slots = reinterpret_cast<void**>((top & ~uintptr_t{15}) - 160);
  std::memset(slots, 0, 160);
  slots[11] = reinterpret_cast<void*>(&lane_main);  // x30
  lane.sp = slots;
#endif
}

void make_ready(Lane* lane) {
  lane->state = State::kReady;
  ready.push_back(lane);
}

template <class Each>
void in_order(std::vector<Lane>& lanes, Each each) {
  if (the_config.order == Order::kDescending) {
    for (auto it = lanes.rbegin(); it != lanes.rend(); ++it) each(*it);
  } else {
    for (Lane& lane : lanes) each(lane);
  }
}

void release_barrier(Block& block) {
  int any = 0, all = 1, count = 0, line = 0;
  for (const Lane& lane : block.lanes) {
    if (lane.state != State::kBarrier) continue;
    any |= lane.barrier_predicate;
    all &= lane.barrier_predicate;
    count += lane.barrier_predicate;
    if (line == 0) line = lane.wait_line;
    if (lane.wait_line != line) {
      report_error("barrier divergence", kernel_name +
                                             ": threads of one block meet at the barriers of lines " +
                                             std::to_string(std::min(line, lane.wait_line)) + " and " +
                                             std::to_string(std::max(line, lane.wait_line)));
    }
  }
  ++counts.barriers;
  block.arrived = 0;
  in_order(block.lanes, [&](Lane& lane) {
    if (lane.state != State::kBarrier) return;
    lane.barrier_result = lane.barrier_kind == 1   ? any
                          : lane.barrier_kind == 2 ? all
                          : lane.barrier_kind == 3 ? count
                                                   : 0;
    ++lane.epoch;
    make_ready(&lane);
  });
}

// ---- memory ----

#ifdef SIMT_HOOKS
constexpr size_t kDeviceArena = size_t{16} << 30;
constexpr size_t kWindow = size_t{1} << 20;  // more than any block's shared memory
constexpr int kMaxSlots = 32;
unsigned char* device_arena = nullptr;
size_t device_used = 0;
std::vector<int32_t> page_owner;  // page of the arena -> allocation, -1 = none
unsigned char* shared_arena = nullptr;

void reserve_arenas() {
  if (device_arena != nullptr) return;
  auto reserve = [](size_t bytes) {
    void* p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("simt: mmap of an arena");
      std::abort();
    }
    return static_cast<unsigned char*>(p);
  };
  device_arena = reserve(kDeviceArena);
  shared_arena = reserve(kWindow * kMaxSlots);
}
#endif
std::vector<Allocation> allocations;

#ifdef SIMT_HOOKS
bool ordered(const Lane& lane, uint32_t epoch, uint16_t thread, uint16_t warp_epoch) {
  if (epoch != lane.epoch || thread == lane.linear) return true;
  return thread / 32 == lane.linear / 32 && warp_epoch != lane.warp_epoch;
}

// Whether the lane knows that the box that wrote the cell has landed: it waited for the barrier itself, or
// met someone who had at a barrier of the block.
bool box_seen(const Lane& lane, const Cell& cell) {
  const size_t i = cell.box_barrier - 1u;
  const Mbarrier& barrier = lane.block->mbarriers[i];
  return lane.phases_seen[i] > cell.box_phase ||
         (cell.box_phase < barrier.seen_from.size() && barrier.seen_from[cell.box_phase] < lane.epoch);
}

std::string shared_place(const Block& block, const unsigned char* p) {
  char text[96];
  const ptrdiff_t offset = p - block.dynamic;
  if (offset >= 0 && static_cast<size_t>(offset) < block.dynamic_bytes) {
    std::snprintf(text, sizeof text, "dynamic shared memory, byte %td", offset);
    return text;
  }
  for (const auto& [key, place] : block.statics) {
    if (p >= place.first && p < place.first + place.second) {
      std::snprintf(text, sizeof text, "shared array declared at line %d, byte %td", key.second,
                    p - place.first);
      return text;
    }
  }
  std::snprintf(text, sizeof text, "outside every shared array (dynamic offset %td of %zu bytes)", offset,
                block.dynamic_bytes);
  return text;
}

bool in_shared(const Block& block, const unsigned char* p, size_t bytes) {
  if (p >= block.dynamic && p + bytes <= block.dynamic + block.dynamic_bytes) return true;
  for (const auto& [key, place] : block.statics) {
    if (p >= place.first && p + bytes <= place.first + place.second) return true;
  }
  return false;
}

void shared_access(const unsigned char* p, size_t bytes, bool write, bool atomic) {
  Lane& lane = *current;
  Block& block = *lane.block;
  if (!in_shared(block, p, bytes)) {
    report_error("shared memory out of bounds", here() + ": " + (write ? "write of " : "read of ") +
                                                    std::to_string(bytes) + " bytes at " +
                                                    shared_place(block, p));
    return;
  }
  const size_t first = static_cast<size_t>(p - block.window) / 2;
  const size_t last = static_cast<size_t>(p + bytes - 1 - block.window) / 2;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = block.cells[i];
    const auto place = [&] { return here() + ": " + shared_place(block, block.window + 2 * i); };
    if (!write || atomic) {
      if (!cell.written) {
        report_error("shared memory read before it was written", place());
        cell.written = 1;
        cell.write_epoch = lane.epoch;
        cell.write_thread = static_cast<uint16_t>(lane.linear);
        cell.write_warp_epoch = lane.warp_epoch;
      } else if (cell.in_flight) {
        report_error("shared memory read before cp.async was waited for", place());
      } else if (cell.box_barrier != 0) {
        constexpr const char* kEarly = "shared memory read before tma_load was waited for";
        if (!box_seen(lane, cell) && !enough_of(kEarly)) report_error(kEarly, place());
      } else if (!(atomic && cell.write_atomic) &&
                 !ordered(lane, cell.write_epoch, cell.write_thread, cell.write_warp_epoch)) {
        report_error("shared memory race", place() + " was written by thread " +
                                               std::to_string(cell.write_thread) +
                                               " with no barrier between");
      }
      if (cell.any_read && cell.read_epoch == lane.epoch) {
        if (cell.read_thread != lane.linear) {
          cell.read_many_threads = 1;
          if (cell.read_thread / 32 != lane.linear / 32) cell.read_many_warps = 1;
        }
        cell.read_atomic = cell.read_atomic && atomic;
      } else {
        cell.read_many_threads = cell.read_many_warps = 0;
        cell.read_atomic = atomic;
      }
      cell.any_read = 1;
      cell.read_epoch = lane.epoch;
      cell.read_thread = static_cast<uint16_t>(lane.linear);
      cell.read_warp_epoch = lane.warp_epoch;
    }
    if (write && cell.is_barrier) report_error("an mbarrier is overwritten", place());
    if (write && cell.products_reading > 0) {
      report_error("shared memory race", place() + " is overwritten while wgmma may still read it");
    }
    if (write) {
      if (cell.written && !(atomic && cell.write_atomic) &&
          !ordered(lane, cell.write_epoch, cell.write_thread, cell.write_warp_epoch)) {
        report_error("shared memory race", place() + " was also written by thread " +
                                               std::to_string(cell.write_thread) +
                                               " with no barrier between");
      }
      if (cell.any_read && cell.read_epoch == lane.epoch && !(atomic && cell.read_atomic)) {
        const bool same_warp_only = !cell.read_many_warps && cell.read_thread / 32 == lane.linear / 32;
        const bool only_me = !cell.read_many_threads && cell.read_thread == lane.linear;
        if (!only_me && !(same_warp_only && cell.read_warp_epoch != lane.warp_epoch)) {
          report_error("shared memory race", place() + " is overwritten while others (thread " +
                                                 std::to_string(cell.read_thread) +
                                                 ") may still read it, with no barrier between");
        }
      }
      cell.written = 1;
      cell.write_atomic = atomic;
      cell.in_flight = 0;
      cell.box_barrier = 0;
      cell.write_fences = static_cast<uint16_t>(lane.proxy_fences);
      cell.write_epoch = lane.epoch;
      cell.write_thread = static_cast<uint16_t>(lane.linear);
      cell.write_warp_epoch = lane.warp_epoch;
    }
  }
}

bool is_shared(const unsigned char* p) { return p >= shared_arena && p < shared_arena + kWindow * kMaxSlots; }
bool is_device(const unsigned char* p) { return p >= device_arena && p < device_arena + kDeviceArena; }

void global_access(const unsigned char* p, size_t bytes, bool read, bool write) {
  const int32_t owner = page_owner.empty() ? -1 : page_owner[static_cast<size_t>(p - device_arena) / kPage];
  const Allocation* a = owner < 0 ? nullptr : &allocations[static_cast<size_t>(owner)];
  if (a == nullptr || p < a->base || p + bytes > a->base + a->bytes) {
    std::string where = "outside every allocation";
    if (a != nullptr) {
      where = "at byte " + std::to_string(p - a->base) + " of an allocation of " + std::to_string(a->bytes);
    }
    report_error("global memory out of bounds", here() + ": " + (write ? "write of " : "read of ") +
                                                    std::to_string(bytes) + " bytes " + where);
    return;
  }
  if (!a->written.empty()) {
    auto* flags = const_cast<uint8_t*>(a->written.data()) + (p - a->base);
    if (read && !std::all_of(flags, flags + bytes, [](uint8_t w) { return w != 0; })) {
      report_error("global memory read before it was written",
                   here() + ": byte " + std::to_string(p - a->base) + " of an allocation of " +
                       std::to_string(a->bytes));
      std::memset(flags, 1, bytes);
    }
    if (write) std::memset(flags, 1, bytes);
  }
}

void hooked(const void* address, size_t bytes, bool write) {
  if (current == nullptr) return;
  const auto* p = static_cast<const unsigned char*>(address);
  if (is_shared(p)) {
    if (chance(the_config.yield_share)) step_aside();
    shared_access(p, bytes, write, false);
  } else if (is_device(p)) {
    if (chance(the_config.yield_share)) step_aside();
    global_access(p, bytes, !write, write);
    (write ? counts.global_bytes_written : counts.global_bytes_read) += bytes;
  }
}
#endif  // SIMT_HOOKS

void begin_block(Block& block, int slot, uint3 index, size_t shared_bytes) {
  block.index = index;
  block.dynamic_bytes = shared_bytes;
#ifdef SIMT_HOOKS
  block.window = shared_arena + kWindow * static_cast<size_t>(slot);
  block.dynamic = block.window + kPage;
  block.window_used = kPage + (shared_bytes + 2 * kPage - 1) / kPage * kPage;
  if (block.window_used > kWindow) {
    report_error("shared memory", kernel_name + ": more than the harness' window");
    std::abort();
  }
  block.cells.assign(block.window_used / 2, Cell{});
  std::memset(block.window, kPoison, block.window_used);
#else
  (void)slot;
  block.dynamic =
      static_cast<unsigned char*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024 + 1024));
  std::memset(block.dynamic, kPoison, shared_bytes);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(block.dynamic + shared_bytes,
                            (shared_bytes + 1023) / 1024 * 1024 + 1024 - shared_bytes);
#endif
#endif
  const size_t threads = size_t{block_dim.x} * block_dim.y * block_dim.z;
  block.lanes = std::vector<Lane>(threads);
  block.warps = std::vector<Warp>((threads + 31) / 32);
  block.live = static_cast<int>(threads);
  for (size_t i = 0; i < threads; ++i) {
    Lane& lane = block.lanes[i];
    lane.block = &block;
    lane.linear = static_cast<int>(i);
    lane.thread = {static_cast<unsigned>(i % block_dim.x),
                   static_cast<unsigned>(i / block_dim.x % block_dim.y),
                   static_cast<unsigned>(i / block_dim.x / block_dim.y)};
    prepare(lane);
  }
  in_order(block.lanes, [](Lane& lane) { make_ready(&lane); });
}

void end_block(Block& block) {
  for (Lane& lane : block.lanes) free_stacks.push_back(lane.stack);
#ifndef SIMT_HOOKS
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(block.dynamic, (block.dynamic_bytes + 1023) / 1024 * 1024 + 1024);
#endif
  std::free(block.dynamic);
  for (auto& [key, place] : block.statics) std::free(place.first);
#endif
}

void land(PendingCopy& copy) {
  if (!copy.landed) {
    std::memcpy(copy.dst, copy.src, static_cast<size_t>(copy.bytes));
    std::memset(copy.dst + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
    copy.landed = true;
  }
}

void report_deadlock() {
  std::map<std::string, int> waits;
  for (const auto& block : resident) {
    if (!block) continue;
    for (const Lane& lane : block->lanes) {
      if (lane.state == State::kBarrier) ++waits["at the barrier of line " + std::to_string(lane.wait_line)];
      if (lane.state == State::kCollective) {
        ++waits["in a warp collective of line " + std::to_string(lane.wait_line)];
      }
    }
  }
  std::string text = kernel_name + ": no thread can go on;";
  for (const auto& [what, n] : waits) text += " " + std::to_string(n) + " wait " + what + ";";
  report_error("deadlock", text);
}

}  // namespace

Config& config() { return the_config; }
const Counts& last_counts() { return launches.back().counts; }
int error_count() { return static_cast<int>(errors.size()); }
bool in_kernel() { return current != nullptr; }
uint3 thread_index() { return current->thread; }
uint3 block_index() { return current->block->index; }
dim3 block_extent() { return block_dim; }
dim3 grid_extent() { return grid_dim; }
int lane_index() { return current->linear % 32; }
unsigned char* dynamic_shared() { return current->block->dynamic; }

void report_error(const char* kind, const std::string& detail) {
  if (const auto found = errors.find({kind, detail}); found != errors.end()) {
    ++found->second;
  } else if (!enough_of(kind)) {
    errors[{kind, detail}] = 1;
    ++kept[kind];
  }
}

void* device_alloc(size_t bytes, bool initialized) {
  Allocation a{};
  a.bytes = bytes;
#ifdef SIMT_HOOKS
  reserve_arenas();
  const size_t pages = (bytes + kPage - 1) / kPage + 2;  // a guard page on either side
  a.base = device_arena + device_used + kPage;
  if (device_used + pages * kPage > kDeviceArena) {
    std::fprintf(stderr, "simt: the device arena is full\n");
    std::abort();
  }
  page_owner.resize((device_used + pages * kPage) / kPage, -1);
  const auto id = static_cast<int32_t>(allocations.size());
  for (size_t page = device_used / kPage; page < page_owner.size(); ++page) page_owner[page] = id;
  device_used += pages * kPage;
  if (!initialized) a.written.assign(bytes, 0);
#else
  a.base = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256));
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(a.base + bytes, (bytes + 255) / 256 * 256 + 256 - bytes);
#endif
#endif
  if (!initialized) std::memset(a.base, kPoison, bytes);
  allocations.push_back(std::move(a));
  return allocations.back().base;
}

void device_free(void* p) {
#ifdef SIMT_HOOKS
  (void)p;  // the arena is never reused: a use after free stays a use of freed pages' owner, not of new data
#else
  for (Allocation& a : allocations) {
    if (a.base != p) continue;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(a.base, (a.bytes + 255) / 256 * 256 + 256);
#endif
    std::free(a.base);
    a.base = nullptr;
  }
#endif
}

void* static_shared(const char* file, int line, size_t bytes) {
  Block& block = *current->block;
  auto& place = block.statics[{file, line}];
  if (place.first == nullptr) {
#ifdef SIMT_HOOKS
    place.first = block.window + block.window_used;
    block.window_used += (bytes + 255) / 256 * 256 + 256;
    if (block.window_used > kWindow) std::abort();
    block.cells.resize(block.window_used / 2, Cell{});
#else
    place.first = static_cast<unsigned char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16));
#endif
    std::memset(place.first, kPoison, bytes);
    place.second = bytes;
  }
  if (place.second != bytes) report_error("shared memory", "one declaration, two sizes: " + here());
  return place.first;
}

namespace {
void step_aside() {
  make_ready(current);
  to_scheduler(false);
}
}  // namespace

void yield_now() {
  if (current == nullptr) return;
  if (++idle_yields > 3'000'000) {
    report_error("livelock", kernel_name + ": threads wait for one another without end");
    std::fputs(report_json().c_str(), stderr);
    std::_Exit(3);
  }
  step_aside();
}

void maybe_yield() {
  if (current != nullptr && the_config.order == Order::kRandom && chance(0.2)) step_aside();
}

namespace {
bool dropped(const char* file, int line) {
  return the_config.drop_barrier_line == line &&
         std::string_view(file).ends_with(the_config.drop_barrier_file);
}
}  // namespace

int barrier(const char* file, int line, int predicate, int kind) {
  Lane* self = current;
  predicate = predicate != 0;
  if (dropped(file, line)) return predicate;
  self->state = State::kBarrier;
  self->wait_line = line;
  self->barrier_kind = kind;
  self->barrier_predicate = predicate;
  Block& block = *self->block;
  if (++block.arrived == block.live) release_barrier(block);
  to_scheduler(false);
  return self->barrier_result;
}

void collective(int kind, int line, unsigned mask, void* argument, Combine combine) {
  Lane* self = current;
  const int lane = self->linear % 32;
  Block& block = *self->block;
  if (!(mask >> lane & 1u)) {
    report_error("warp collective",
                 here() + ": the lane is not in its own mask, line " + std::to_string(line));
    return;
  }
  self->kind = kind;
  self->wait_line = line;
  self->mask = mask;
  self->argument = argument;
  const size_t warp = static_cast<size_t>(self->linear / 32) * 32;
  void* arguments[32] = {};
  bool complete = true;
  for (int i = 0; i < 32 && complete; ++i) {
    if (!(mask >> i & 1u)) continue;
    if (i == lane) {
      arguments[i] = argument;
      continue;
    }
    if (warp + static_cast<size_t>(i) >= block.lanes.size()) {
      report_error("warp collective",
                   here() + ": the mask names lanes the block does not have, line " + std::to_string(line));
      mask &= ~(1u << i);
      continue;
    }
    const Lane& other = block.lanes[warp + static_cast<size_t>(i)];
    complete = other.state == State::kCollective && other.kind == kind && other.mask == mask &&
               other.wait_line == line;
    arguments[i] = other.argument;
  }
  if (!complete) {
    self->state = State::kCollective;
    to_scheduler(false);
    return;
  }
  if (combine != nullptr) combine(arguments, mask);
  for (int i = 0; i < 32; ++i) {
    const int at = the_config.order == Order::kDescending ? 31 - i : i;
    if ((mask >> at & 1u) && at != lane) make_ready(&block.lanes[warp + static_cast<size_t>(at)]);
  }
}

void warp_barrier(const char* file, int line, unsigned mask) {
  if (dropped(file, line)) return;
  collective(kWarpBarrier, line, mask, nullptr, nullptr);
  if (mask == 0xffffffffu) ++current->warp_epoch;
}

namespace {
void combine_ballot(void* const* arguments, unsigned mask) {
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) && static_cast<BallotArgument*>(arguments[lane])->predicate) result |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) static_cast<BallotArgument*>(arguments[lane])->result = result;
  }
}
}  // namespace
unsigned ballot(unsigned mask, bool predicate, int line) {
  BallotArgument argument{predicate, 0};
  collective(kBallot, line, mask, &argument, &combine_ballot);
  return argument.result;
}

void note_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_HOOKS
  hooked(p, bytes, false);
#endif
}
void note_write([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_HOOKS
  hooked(p, bytes, true);
#endif
}

namespace {
void relaxed([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool read,
             [[maybe_unused]] bool write) {
#ifdef SIMT_HOOKS
  if (current == nullptr) return;
  const auto* p = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) report_error("misaligned atomic", here());
  if (is_shared(p)) shared_access(p, bytes, write, true);
  if (is_device(p)) {
    global_access(p, bytes, read, write);
    if (read && write) {
      ++counts.atomics;
    } else {
      (write ? counts.global_bytes_written : counts.global_bytes_read) += bytes;
    }
  }
#endif
}
}  // namespace
void note_relaxed_read(const void* p, size_t bytes) { relaxed(p, bytes, true, false); }
void note_relaxed_write(const void* p, size_t bytes) { relaxed(p, bytes, false, true); }
void note_atomic(const void* p, size_t bytes) { relaxed(p, bytes, true, true); }

uint64_t raw_load(const void* p, size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, p, bytes);
  return value;
}
void raw_store(void* p, uint64_t value, size_t bytes) { std::memcpy(p, &value, bytes); }

void copy_async(void* dst, const void* src, int bytes) {
  Lane& lane = *current;
  if (reinterpret_cast<uintptr_t>(dst) % 16 != 0 ||
      (bytes > 0 && reinterpret_cast<uintptr_t>(src) % 16 != 0)) {
    report_error("misaligned cp.async", here());
  }
  if (bytes < 0 || bytes > 16) {
    report_error("cp.async size", here());
    bytes = std::clamp(bytes, 0, 16);
  }
  const auto* from = static_cast<const unsigned char*>(src) + the_config.shift_copy_bytes;
  auto* to = static_cast<unsigned char*>(dst);
  if (bytes > 0) {
    note_read(from, static_cast<size_t>(bytes));
    counts.copy_bytes += static_cast<uint64_t>(bytes);
  }
#ifdef __SANITIZE_ADDRESS__
  if (bytes > 0) {
    [[maybe_unused]] volatile unsigned char probe = from[0];
    probe = from[bytes - 1];
  }
#endif
#ifdef SIMT_HOOKS
  shared_access(to, 16, true, false);
  if (in_shared(*lane.block, to, 16)) {
    for (size_t i = 0; i < 8; ++i) {
      lane.block->cells[static_cast<size_t>(to - lane.block->window) / 2 + i].in_flight = 1;
    }
  }
#endif
  std::memset(to, kPoison, 16);
  lane.copies.push_back({to, from, bytes, lane.open_group, false});
  // A copy may also land at once.
  if (the_config.order == Order::kRandom && chance(0.5)) land(lane.copies.back());
}

void copy_commit() { ++current->open_group; }

void copy_wait(int pending) {
  Lane& lane = *current;
  if (the_config.skip_copy_wait) return;
  auto& copies = lane.copies;
  const uint64_t done =
      lane.open_group > static_cast<uint64_t>(pending) ? lane.open_group - static_cast<uint64_t>(pending) : 0;
  size_t kept = 0;
  for (PendingCopy& copy : copies) {
    if (copy.group >= done) {
      copies[kept++] = copy;
      continue;
    }
    land(copy);
#ifdef SIMT_HOOKS
    if (in_shared(*lane.block, copy.dst, 16)) {
      for (size_t i = 0; i < 8; ++i) {
        Cell& cell = lane.block->cells[static_cast<size_t>(copy.dst - lane.block->window) / 2 + i];
        // Others may read it after the next barrier: the write counts from now.
        cell.in_flight = 0;
        cell.written = 1;
        cell.write_atomic = 0;
        cell.write_epoch = lane.epoch;
        cell.write_thread = static_cast<uint16_t>(lane.linear);
        cell.write_warp_epoch = lane.warp_epoch;
      }
    }
#endif
  }
  copies.resize(kept);
}

// ---- ldmatrix and mma: fragments as the PTX manual lays them out ----

namespace {
struct LdmatrixArgument {
  uint32_t* r;
  const unsigned char* row;
};
void combine_ldmatrix(void* const* arguments, unsigned) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int from = the_config.swap_matrices && (matrix == 1 || matrix == 2) ? 3 - matrix : matrix;
    for (int row = 0; row < 8; ++row) {
      const unsigned char* p = static_cast<LdmatrixArgument*>(arguments[from * 8 + row])->row;
      for (int t = 0; t < 4; ++t) {
        std::memcpy(&static_cast<LdmatrixArgument*>(arguments[row * 4 + t])->r[matrix], p + 4 * t, 4);
      }
    }
  }
}

struct MmaArgument {
  void* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Element, class Accumulator, class Sum, int kElements>  // elements in a 32-bit register
void combine_mma(void* const* arguments, unsigned) {
  constexpr int kDepth = 8 * kElements;
  ++counts.mma;
  Accumulator a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* x = static_cast<MmaArgument*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int from = i;
      if (the_config.swap_fragments && (i == 1 || i == 2)) from = 3 - i;
      Element e[kElements];
      std::memcpy(e, &x->a[from], 4);
      for (int j = 0; j < kElements; ++j) {
        a[g + 8 * (i % 2)][kElements * (t + 4 * (i / 2)) + j] = static_cast<Accumulator>(e[j]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      Element e[kElements];
      std::memcpy(e, &x->b[i], 4);
      for (int j = 0; j < kElements; ++j) b[g][kElements * (t + 4 * i) + j] = static_cast<Accumulator>(e[j]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* d = static_cast<Accumulator*>(static_cast<MmaArgument*>(arguments[lane])->d);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const Accumulator* x = a[g + 8 * (i / 2)];
      const Accumulator* y = b[2 * t + i % 2];
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<Sum>(x[k]) * static_cast<Sum>(y[k]);
      d[i] = static_cast<Accumulator>(static_cast<Sum>(d[i]) + sum);
    }
  }
}
}  // namespace

void ldmatrix_x4_raw(uint32_t* r, const void* row, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) report_error("misaligned ldmatrix", here());
  note_read(row, 16);
#ifdef __SANITIZE_ADDRESS__
  [[maybe_unused]] volatile unsigned char probe = static_cast<const unsigned char*>(row)[0];
  probe = static_cast<const unsigned char*>(row)[15];
#endif
  LdmatrixArgument argument{r, static_cast<const unsigned char*>(row)};
  collective(kLdmatrix, line, 0xffffffffu, &argument, &combine_ldmatrix);
}
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int line) {
  MmaArgument argument{d, a, {b0, b1}};
  collective(kMma, line, 0xffffffffu, &argument, &combine_mma<__nv_bfloat16, float, double, 2>);
}
void mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int line) {
  MmaArgument argument{d, a, {b0, b1}};
  collective(kMma, line, 0xffffffffu, &argument, &combine_mma<__half, float, double, 2>);
}
void mma_s8(int32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, int line) {
  MmaArgument argument{d, a, {b0, b1}};
  collective(kMma, line, 0xffffffffu, &argument, &combine_mma<int8_t, int32_t, int64_t, 4>);
}

// ---- what only Hopper has ----

namespace {
// Shared addresses as descriptors hold them: the dynamic part starts at a multiple of 1024, not at 0.
unsigned char* shared_base(const Block& block) {
#ifdef SIMT_HOOKS
  return block.window;
#else
  return block.dynamic - 1024;
#endif
}
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

bool shared_chunk_exists(const Block& block, const unsigned char* p) {
#ifdef SIMT_HOOKS
  return in_shared(block, p, 16);
#else
  return p >= block.dynamic && p + 16 <= block.dynamic + block.dynamic_bytes;
#endif
}

#ifdef SIMT_HOOKS
template <class Each>
void each_cell(Block& block, const unsigned char* p, Each each) {
  for (size_t i = 0; i < 8; ++i) each(block.cells[static_cast<size_t>(p - block.window) / 2 + i]);
}
#endif

size_t find_mbarrier(const uint64_t* barrier) {
  Block& block = *current->block;
  for (size_t i = 0; i < block.mbarriers.size(); ++i) {
    if (block.mbarriers[i].at != barrier) continue;
    note_read(barrier, 8);  // after a barrier since its initialisation
    return i;
  }
  report_error("mbarrier used before it was initialised", here());
  std::fputs(report_json().c_str(), stderr);
  std::_Exit(3);
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.pending = barrier.count;
}

// Every 16-byte chunk of a box: where it lands, where it comes from and how many bytes of it exist.
template <class Each>
void each_chunk(const Block& block, const BoxCopy& box, Each each) {
  for (int row = 0; row < box.map.box_rows; ++row) {
    const int64_t from_row = box.row + row;
    for (int chunk = 0; chunk < 8; ++chunk) {
      const uint32_t address =
          static_cast<uint32_t>(box.dst - shared_base(block)) + static_cast<uint32_t>(row * 128 + chunk * 16);
      const int64_t at = box.column + chunk * 16;
      const bool exists = from_row >= 0 && from_row < box.map.rows;
      const int64_t bytes = exists ? std::clamp<int64_t>(box.map.row_bytes - at, 0, 16) : 0;
      each(shared_base(block) + swizzled(address),
           bytes > 0 ? box.map.base + from_row * box.map.stride + at : nullptr, static_cast<size_t>(bytes));
    }
  }
}

void land_box(Block& block, size_t which) {
  const BoxCopy box = block.boxes[which];
  block.boxes.erase(block.boxes.begin() + static_cast<std::ptrdiff_t>(which));
  each_chunk(block, box, [&](unsigned char* to, const unsigned char* from, size_t bytes) {
    if (!shared_chunk_exists(block, to)) return;
    std::memset(to, 0, 16);
    if (bytes > 0) std::memcpy(to, from, bytes);
#ifdef SIMT_HOOKS
    each_cell(block, to, [](Cell& cell) { cell.in_flight = 0; });
#endif
  });
  Mbarrier& barrier = block.mbarriers[static_cast<size_t>(box.barrier)];
  barrier.bytes -= int64_t{128} * box.map.box_rows;
  end_phase_if_complete(barrier);
}

struct Operand {
  uint32_t start, stride;
};
Operand decode(uint64_t descriptor) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    report_error("wgmma descriptor", here() + ": the harness knows 128-byte swizzling without base offset");
  }
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 32 & 0x3fff)
                                                               << 4};
}

// The chunks that a product reads of rows [first, last) of an operand, 32 bytes deep.
template <class Each>
void each_operand_chunk(const Block& block, uint64_t descriptor, int first, int last, Each each) {
  const Operand operand = decode(descriptor);
  for (int row = first; row < last; ++row) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t address = operand.start + static_cast<uint32_t>(row / 8) * operand.stride +
                               static_cast<uint32_t>(row % 8 * 128 + half * 16);
      unsigned char* p = shared_base(block) + swizzled(address);
      if (shared_chunk_exists(block, p)) {
        each(row - first, half, p);
      } else {
        report_error("shared memory out of bounds", here() + ": a wgmma operand");
      }
    }
  }
}
template <class Each>
void each_chunk_read(const Block& block, size_t warp, const Product& product, Each each) {
  const int first = static_cast<int>(warp % 4) * 16;
  const auto ignore_place = [&](int, int, unsigned char* p) { each(p); };
  each_operand_chunk(block, product.a, first, first + 16, ignore_place);
  each_operand_chunk(block, product.b, 0, 128, ignore_place);
}

template <class Element>
void multiply(const Block& block, size_t warp, const Product& product, Flight& flight) {
  static double a[16][16], b[16][128], sum[16][128];
  const auto read = [](unsigned char* p, auto store) {
    Element e[8];
    std::memcpy(e, p, 16);
    for (int i = 0; i < 8; ++i) store(i, static_cast<double>(static_cast<float>(e[i])));
  };
  std::memset(a, 0xff, sizeof a);
  std::memset(b, 0xff, sizeof b);
  const int first = static_cast<int>(warp % 4) * 16;
  each_operand_chunk(block, product.a, first, first + 16, [&](int row, int half, unsigned char* p) {
    read(p, [&](int i, double x) { a[row][half * 8 + i] = x; });
  });
  each_operand_chunk(block, product.b, 0, 128, [&](int row, int half, unsigned char* p) {
    read(p, [&](int i, double x) { b[half * 8 + i][row] = x; });
  });
  std::memset(sum, 0, sizeof sum);
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 128; ++n) sum[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 64; ++i) {
      int row = lane / 4 + i / 2 % 2 * 8;
      if (the_config.swap_accumulators) row = (row + 8) % 16;
      float& d = flight.values[static_cast<size_t>(lane)][static_cast<size_t>(i)];
      const double before = product.accumulate ? static_cast<double>(d) : 0.0;
      d = static_cast<float>(before + sum[row][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
  }
}

// Products of a warp are made in the order in which they were started.
void make_products(Block& block, size_t warp_index, size_t count) {
  Warp& warp = block.warps[warp_index];
  for (size_t i = 0; i < count; ++i) {
    Product& product = warp.products[i];
    if (product.done) continue;
    product.done = true;
    Flight& flight = warp.flights[product.key];
    if (product.is_bf16) {
      multiply<__nv_bfloat16>(block, warp_index, product, flight);
    } else {
      multiply<__half>(block, warp_index, product, flight);
    }
  }
}

bool is_poison(const float* d) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(d);
  return std::all_of(bytes, bytes + 64 * sizeof(float), [](unsigned char b) { return b == kPoison; });
}

struct WgmmaArgument {
  float* d;
  uint64_t a, b;
  bool accumulate, is_bf16;
};

void combine_wgmma(void* const* arguments, unsigned) {
  const auto& x = *static_cast<WgmmaArgument*>(arguments[0]);
  Block& block = *current->block;
  const auto index = static_cast<size_t>(current->linear / 32);
  Warp& warp = block.warps[index];
  ++counts.wgmma;
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<WgmmaArgument*>(arguments[lane]);
    if (other.a != x.a || other.b != x.b) report_error("wgmma descriptors differ within a warp", here());
  }
  auto& started = block.products[index / 4];
  const std::array<uint64_t, 3> what{x.a, x.b, x.accumulate};
  if (warp.started == started.size()) started.push_back(what);
  if (started[warp.started++] != what) {
    report_error("the warps of a warpgroup make different products", here());
  }
  if (!warp.fenced) report_error("wgmma without wgmma.fence", here());
  const Product product{x.a, x.b, x.accumulate, x.is_bf16, false, warp.open_group, x.d};
#ifdef SIMT_HOOKS
  each_chunk_read(block, index, product, [&](unsigned char* p) {
    each_cell(block, p, [&](Cell& cell) {
      ++cell.products_reading;
      const auto complain = [&](const char* kind) {
        if (!enough_of(kind)) report_error(kind, here() + ": a wgmma operand, " + shared_place(block, p));
      };
      if (!cell.written) {
        complain("shared memory read before it was written");
      } else if (cell.box_barrier == 0) {
        const Lane& writer = block.lanes[cell.write_thread];
        if (static_cast<uint16_t>(writer.proxy_fences) == cell.write_fences) {
          complain("wgmma reads a thread's stores without fence.proxy.async");
        }
        if (!ordered(*current, cell.write_epoch, cell.write_thread, cell.write_warp_epoch)) {
          complain("shared memory race");
        }
      } else {
        for (size_t lane = index * 32; lane < index * 32 + 32; ++lane) {
          if (cell.in_flight || !box_seen(block.lanes[lane], cell)) {
            complain("shared memory read before tma_load was waited for");
            break;
          }
        }
      }
    });
  });
#endif
  Flight& flight = warp.flights[x.d];
  for (size_t lane = 0; lane < 32; ++lane) {
    float* d = static_cast<WgmmaArgument*>(arguments[lane])->d;
    if (flight.products == 0) {
      flight.d[lane] = d;
      std::memcpy(flight.values[lane].data(), d, sizeof flight.values[lane]);
      std::memset(d, kPoison, sizeof flight.values[lane]);
    }
  }
  ++flight.products;
  warp.products.push_back(product);
  if (the_config.order == Order::kRandom && chance(0.3)) {
    make_products(block, index, 1 + draw(warp.products.size()));
  }
}

void combine_wgmma_wait(void* const* arguments, unsigned) {
  const auto& x = *static_cast<WgmmaArgument*>(arguments[0]);
  Block& block = *current->block;
  const auto index = static_cast<size_t>(current->linear / 32);
  Warp& warp = block.warps[index];
  const uint64_t pending = x.a;
  const uint64_t end = warp.open_group > pending ? warp.open_group - pending : 0;
  size_t finished = 0;
  while (finished < warp.products.size() && warp.products[finished].group < end) ++finished;
  make_products(block, index, finished);
  for (; finished > 0; --finished) {
    const Product product = warp.products.front();
    warp.products.pop_front();
#ifdef SIMT_HOOKS
    each_chunk_read(block, index, product, [&](unsigned char* p) {
      each_cell(block, p, [](Cell& cell) { --cell.products_reading; });
      shared_access(p, 16, false, false);  // read, as far as others can tell, until now
    });
#endif
    const auto found = warp.flights.find(product.key);
    Flight& flight = found->second;
    if (--flight.products > 0) continue;
    for (size_t lane = 0; lane < 32; ++lane) {
      if (!is_poison(flight.d[lane])) report_error("accumulators written while wgmma is under way", here());
      std::memcpy(flight.d[lane], flight.values[lane].data(), sizeof flight.values[lane]);
    }
    warp.flights.erase(found);
  }
  if (warp.flights.contains(x.d)) report_error("accumulators read while wgmma is under way", here());
  warp.fenced = false;
}
}  // namespace

TensorMap tensor_map(const void* base, int element_bytes, int64_t row_bytes, int64_t rows, int64_t stride,
                     int box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || stride % 16 != 0 || stride < row_bytes ||
      row_bytes <= 0 || rows <= 0 || box_rows < 1 || box_rows > 256) {
    report_error("tensor map", "base, stride or sizes that the copy engine does not take");
  }
  return {static_cast<const unsigned char*>(base), row_bytes, rows, stride, element_bytes, box_rows};
}

uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_base(*current->block));
}

void mbarrier_init(uint64_t* barrier, int count) {
  note_write(barrier, 8);
  Block& block = *current->block;
  if (block.mbarriers.size() == kMaxMbarriers || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    report_error("mbarrier", here() + ": misaligned, or more than the harness keeps");
    return;
  }
  block.mbarriers.push_back({barrier, count, count, 0, 0, {}, current->linear, current->proxy_fences});
#ifdef SIMT_HOOKS
  for (size_t i = 0; i < 4; ++i) {
    const auto* p = reinterpret_cast<const unsigned char*>(barrier);
    block.cells[static_cast<size_t>(p - block.window) / 2 + i].is_barrier = 1;
  }
#endif
}

void mbarrier_expect(uint64_t* barrier, int bytes) {
  maybe_yield();
  Mbarrier& b = current->block->mbarriers[find_mbarrier(barrier)];
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) report_error("mbarrier", here() + ": more bytes than a barrier counts");
  if (b.pending == 0) report_error("mbarrier", here() + ": more arrivals than the phase has");
  --b.pending;
  end_phase_if_complete(b);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  maybe_yield();
  const size_t i = find_mbarrier(barrier);
  Block& block = *current->block;
  if (the_config.flip_parity) parity ^= 1u;
  while ((block.mbarriers[i].phases & 1u) == parity) {
    // Of its boxes under way the first, the last or any lands; without one, others must go on first.
    const auto mine = [i](const BoxCopy& box) { return box.barrier == static_cast<int>(i); };
    const auto count = static_cast<uint64_t>(std::count_if(block.boxes.begin(), block.boxes.end(), mine));
    if (count == 0) {
      yield_now();
      continue;
    }
    uint64_t skip = the_config.order == Order::kAscending ? 0
                    : the_config.order == Order::kRandom  ? draw(count)
                                                          : count - 1;
    const auto chosen = std::find_if(block.boxes.begin(), block.boxes.end(),
                                     [&](const BoxCopy& box) { return mine(box) && skip-- == 0; });
    land_box(block, static_cast<size_t>(chosen - block.boxes.begin()));
  }
  Mbarrier& b = block.mbarriers[i];
  current->phases_seen[i] = b.phases;
  b.seen_from.resize(b.phases, current->epoch);
}

void fence_proxy_async() {
  if (!the_config.skip_proxy_fence) ++current->proxy_fences;
}

void tma_load(void* dst, const TensorMap& map, int column, int row, uint64_t* barrier) {
  maybe_yield();
  Block& block = *current->block;
  const size_t i = find_mbarrier(barrier);
  const Mbarrier& b = block.mbarriers[i];
  if (block.lanes[static_cast<size_t>(b.init_thread)].proxy_fences == b.init_fences) {
    report_error("tma_load to an mbarrier whose initialisation no fence.proxy.async made known", here());
  }
  if (shared_address(dst) % 128 != 0) report_error("misaligned tma_load", here());
  const BoxCopy box{static_cast<unsigned char*>(dst), map, int64_t{column} * map.element_bytes, row,
                    static_cast<int>(i)};
  each_chunk(block, box, [&](unsigned char* to, const unsigned char* from, size_t bytes) {
    if (bytes > 0) {
      note_read(from, bytes);
      counts.copy_bytes += bytes;
    }
#ifdef SIMT_HOOKS
    shared_access(to, 16, true, false);
    if (!shared_chunk_exists(block, to)) return;
    each_cell(block, to, [&](Cell& cell) {
      cell.in_flight = 1;
      cell.box_barrier = static_cast<uint16_t>(i + 1);
      cell.box_phase = static_cast<uint16_t>(b.phases);
    });
#endif
    if (shared_chunk_exists(block, to)) {
      std::memset(to, kPoison, 16);
    } else {
      report_error("shared memory out of bounds", here() + ": tma_load");
    }
  });
  block.boxes.push_back(box);
  if (the_config.order == Order::kRandom && chance(0.3)) land_box(block, block.boxes.size() - 1);
}

void wgmma_fence(int line) {
  if (the_config.skip_wgmma_fence) return;
  collective(kWgmmaFence, line, 0xffffffffu, nullptr, [](void* const*, unsigned) {
    current->block->warps[static_cast<size_t>(current->linear / 32)].fenced = true;
  });
}
void wgmma_commit(int line) {
  collective(kWgmmaCommit, line, 0xffffffffu, nullptr, [](void* const*, unsigned) {
    ++current->block->warps[static_cast<size_t>(current->linear / 32)].open_group;
  });
}
void wgmma_retire(int pending, float* d, int line) {
  if (the_config.skip_wgmma_wait) return;
  WgmmaArgument argument{d, static_cast<uint64_t>(pending), 0, false, false};
  collective(kWgmmaWait, line, 0xffffffffu, &argument, &combine_wgmma_wait);
}
void wgmma_start(float* d, uint64_t a, uint64_t b, bool accumulate, bool is_bf16, int line) {
  WgmmaArgument argument{d, a, b, accumulate, is_bf16};
  collective(kWgmma, line, 0xffffffffu, &argument, &combine_wgmma);
}

// ---- launches ----

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body) {
#ifdef SIMT_HOOKS
  reserve_arenas();
#endif
  kernel_name = kernel;
  grid_dim = grid;
  block_dim = block;
  kernel_body = &body;
  counts = {};
  idle_yields = 0;
  rng.seed(the_config.seed * 7919 + launches.size());
  ready.clear();
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 ||
      shared_bytes > static_cast<size_t>(the_config.shared_bytes_per_block)) {
    report_error("launch configuration", kernel_name + ": " + std::to_string(blocks) + " blocks of " +
                                             std::to_string(threads) + " threads with " +
                                             std::to_string(shared_bytes) + " bytes of shared memory");
    return;
  }
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = the_config.order == Order::kDescending ? blocks - 1 - i : i;
  if (the_config.order == Order::kRandom) std::shuffle(order.begin(), order.end(), rng);
#ifdef SIMT_HOOKS
  const int slots = std::min(the_config.resident_blocks, kMaxSlots);
#else
  const int slots = the_config.resident_blocks;
#endif
  resident.clear();
  resident.resize(static_cast<size_t>(slots));
  size_t next = 0;
  const auto fill = [&] {
    for (int slot = 0; slot < slots; ++slot) {
      auto& place = resident[static_cast<size_t>(slot)];
      if (place && place->live == 0) {
        end_block(*place);
        place.reset();
      }
      if (!place && next < blocks) {
        const size_t i = order[next++];
        place = std::make_unique<Block>();
        begin_block(*place, slot,
                    {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y)},
                    shared_bytes);
      }
    }
  };
  fill();
  while (true) {
    if (ready.empty()) {
      bool waiting = false;
      for (const auto& place : resident) waiting = waiting || (place && place->live > 0);
      if (waiting) {
        report_deadlock();
        launch_failed = true;
        break;
      }
      fill();
      if (ready.empty()) break;
    }
    if (the_config.order == Order::kRandom) {
      std::swap(ready[draw(ready.size())], ready.front());
    }
    Lane* lane = ready.front();
    ready.pop_front();
    run(lane);
    if (lane->state == State::kDone && lane->block->live == 0) fill();
  }
  for (auto& place : resident) {
    if (place) end_block(*place);
  }
  resident.clear();
  launches.push_back({kernel_name, grid, block, shared_bytes, counts});
}

std::string report_json() {
  const auto quoted = [](const std::string& s) {
    std::string out = "\"";
    for (const char c : s) {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
    return out + "\"";
  };
  std::ostringstream out;
  out << "{\"launches\": [";
  for (size_t i = 0; i < launches.size(); ++i) {
    const LaunchRecord& l = launches[i];
    out << (i ? ", " : "") << "{\"kernel\": " << quoted(l.kernel)
        << ", \"blocks\": " << size_t{l.grid.x} * l.grid.y * l.grid.z
        << ", \"threads\": " << size_t{l.block.x} * l.block.y * l.block.z
        << ", \"shared_bytes\": " << l.shared_bytes
        << ", \"global_bytes_read\": " << l.counts.global_bytes_read
        << ", \"global_bytes_written\": " << l.counts.global_bytes_written
        << ", \"copy_bytes\": " << l.counts.copy_bytes << ", \"atomics\": " << l.counts.atomics
        << ", \"barriers\": " << l.counts.barriers << ", \"mma\": " << l.counts.mma
        << ", \"wgmma\": " << l.counts.wgmma << "}";
  }
  out << "], \"errors\": [";
  bool first = true;
  for (const auto& [key, n] : errors) {
    out << (first ? "" : ", ") << "{\"kind\": " << quoted(key.first) << ", \"detail\": " << quoted(key.second)
        << ", \"times\": " << n << "}";
    first = false;
  }
  out << "]}";
  return out.str();
}

}  // namespace simt

// ---- the runtime API ----

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Config& c = simt::config();
  if (c.cuda_error != 0) return static_cast<cudaError_t>(c.cuda_error);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = c.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = c.compute_capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = c.compute_capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = c.shared_bytes_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = c.shared_bytes_per_block + 1024;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
#ifdef SIMT_HOOKS
  for (simt::Allocation& a : simt::allocations) {
    auto* first = static_cast<unsigned char*>(p);
    if (first < a.base || first >= a.base + a.bytes) continue;
    if (first + bytes > a.base + a.bytes)
      simt::report_error("global memory out of bounds", "cudaMemsetAsync");
    if (!a.written.empty()) {
      std::memset(a.written.data() + (first - a.base), 1,
                  std::min(bytes, a.bytes - static_cast<size_t>(first - a.base)));
    }
  }
#endif
  return cudaSuccess;
}

// ---- the hooks that -fsanitize=thread calls ----

#ifdef SIMT_HOOKS
extern "C" {
#define SIMT_HOOK(n)                                                    \
  void __tsan_read##n(void* p) { simt::hooked(p, n, false); }           \
  void __tsan_write##n(void* p) { simt::hooked(p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { simt::hooked(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { simt::hooked(p, n, true); } \
  void __tsan_volatile_read##n(void* p) { simt::hooked(p, n, false); }  \
  void __tsan_volatile_write##n(void* p) { simt::hooked(p, n, true); }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
#undef SIMT_HOOK
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long n) { simt::hooked(p, n, false); }
void __tsan_write_range(void* p, unsigned long n) { simt::hooked(p, n, true); }
int __tsan_atomic32_fetch_add(int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
unsigned char __tsan_atomic8_load(const unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
}
#endif
