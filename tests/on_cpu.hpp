// CUDA's words for a C++ compiler, so that a CPU runs the very source of the kernels: each thread of a block is a fiber
// with a stack of its own, barriers and shuffles wait for those that take part, shared memory is a block's.
//
// Fibers run one after another, each until it waits: forwards, backwards, or in an order drawn anew each time. A read that
// no barrier separates from another thread's write comes before it in one order and after it in the other, so the results
// differ; shared memory begins as NaNs. A barrier that not all threads of a block reach is an error that names its line.

#pragma once

#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ucontext.h>

#define ON_CPU
#define __global__
#define __device__
#define __constant__ static const
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __syncthreads() on_cpu::wait(on_cpu::BLOCK, __LINE__)
#define __syncwarp() on_cpu::wait(on_cpu::WARP, __LINE__)
#define __shfl_xor_sync(lanes, value, step) on_cpu::shuffle(lanes, value, on_cpu::current->lane ^ (step), __LINE__)
#define __shfl_sync(lanes, value, source) on_cpu::shuffle(lanes, value, source, __LINE__)
#define SHARED(Room, name) Room& name = on_cpu::room<Room>()
#define threadIdx (on_cpu::current->thread)
#define blockIdx (on_cpu::current->block->index)
#define blockDim (on_cpu::block_size)
#define gridDim (on_cpu::grid_size)

namespace on_cpu {

constexpr size_t STACK = 128 << 10, MOST_SHARED = 227 << 10;
enum Waits { NOT, WARP, BLOCK, GRID, ENDED };

struct Size {
  unsigned x = 1, y = 1, z = 1;
};

struct Block {
  Size index;
  std::vector<unsigned char> shared;
};

struct Thread {
  Size thread;
  Block* block = nullptr;
  unsigned lane = 0;
  Waits waits = NOT;
  int line = 0;
  float given[2] = {};  // to a shuffle, by turns: some lanes may give to the next one while others read this one
  unsigned shuffles = 0;
  Thread* warp = nullptr;  // its first thread
  bool started = false;
  ucontext_t start;
  jmp_buf place;
};

inline Thread* current = nullptr;
inline std::string problem;  // of a thread, which cannot throw out of its stack
inline Size block_size, grid_size;
inline jmp_buf scheduler;
inline void (*body)();

inline void __attribute__((noinline)) wait(Waits what, int line) {
  current->waits = what;
  current->line = line;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void give_up(const char* why) {
  problem = why;
  wait(ENDED, 0);
}

inline float __attribute__((noinline)) shuffle(unsigned lanes, float value, unsigned source, int line) {
  if (lanes != 0xffffffffu) give_up("a shuffle of some lanes is not emulated");
  unsigned turn = current->shuffles++ % 2;
  current->given[turn] = value;
  wait(WARP, line);
  return current->warp[source].given[turn];
}

// The block's shared memory: the same for all its threads.
template <class Room>
Room& room() {
  Block& block = *current->block;
  if (sizeof(Room) > MOST_SHARED) give_up("more shared memory than a GPU has");
  if (block.shared.empty()) block.shared.assign(sizeof(Room), 0xff);
  if (block.shared.size() != sizeof(Room)) give_up("two rooms in one kernel");
  return *reinterpret_cast<Room*>(block.shared.data());
}

inline void enter() {
  body();
  wait(ENDED, 0);
}

// Stacks are kept: to make and to free them takes longer than most kernels.
inline unsigned char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new unsigned char[STACK]);
  return stacks[thread].get();
}

inline void resume(Thread& thread) {
  current = &thread;
  thread.waits = NOT;
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.start);
}

// Lets those go on whose barrier all have reached: threads [first, first + count). Returns whether it was one.
inline bool release(std::vector<Thread>& threads, size_t first, size_t count, Waits what) {
  for (size_t i = first; i < first + count; ++i)
    if (threads[i].waits != what || threads[i].line != threads[first].line) return false;
  for (size_t i = first; i < first + count; ++i) threads[i].waits = NOT;
  return true;
}

inline std::string stuck(const std::vector<Thread>& threads) {
  std::map<std::string, int> places;
  const char* names[] = {"running", "a warp's operation", "the block's barrier", "the grid's barrier", "the end"};
  for (const Thread& thread : threads)
    ++places[std::string(names[thread.waits]) + (thread.waits == ENDED ? "" : " in line " + std::to_string(thread.line))];
  std::string text = "threads wait for one another:";
  for (auto& [place, count] : places) text += " " + std::to_string(count) + " at " + place + ";";
  return text;
}

// Runs blocks that are on the GPU at the same time. schedule 0: forwards, 1: backwards, else the seed of an order.
inline void run_blocks(std::vector<Block>& blocks, uint64_t schedule) {
  size_t size = block_size.x, warps = (size + 31) / 32;
  if (block_size.y * block_size.z != 1 || size % 32) throw std::runtime_error("blocks are of whole warps, along x");
  std::vector<Thread> threads(size * blocks.size());
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.thread = {unsigned(i % size), 0, 0};
    thread.block = &blocks[i / size];
    thread.lane = i % size % 32;
    thread.warp = &threads[i - thread.lane];
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack_of(i);
    thread.start.uc_stack.ss_size = STACK;
    makecontext(&thread.start, enter, 0);
  }
  std::mt19937_64 random(schedule);
  std::vector<size_t> order(threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = schedule == 1 ? order.size() - 1 - i : i;
  for (bool all_ended = false; !all_ended;) {
    if (schedule > 1)
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    bool moved = false;
    for (size_t i : order)
      if (threads[i].waits == NOT) resume(threads[i]), moved = true;
    for (size_t w = 0; w < warps * blocks.size(); ++w) moved |= release(threads, w * 32, 32, WARP);
    for (size_t b = 0; b < blocks.size(); ++b) moved |= release(threads, b * size, size, BLOCK);
    moved |= release(threads, 0, threads.size(), GRID);
    all_ended = true;
    for (const Thread& thread : threads) all_ended &= thread.waits == ENDED;
    if (!problem.empty()) throw std::runtime_error(std::exchange(problem, ""));
    if (!moved && !all_ended) throw std::runtime_error(stuck(threads));
  }
}

struct Kernel {
  std::vector<size_t> sizes;
  void (*call)(void** arguments);
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

inline void** arguments_of_launch;
inline void (*call_of_launch)(void**);

template <auto function>
struct Caller;

template <class... A, void (*function)(A...)>
struct Caller<function> {
  template <size_t... I>
  static void unpack(void** arguments, std::index_sequence<I...>) {
    function(*static_cast<std::decay_t<A>*>(arguments[I])...);
  }
  static void call(void** arguments) { unpack(arguments, std::index_sequence_for<A...>()); }
  static bool add(const char* name) { return kernels().insert({name, Kernel{{sizeof(A)...}, &call}}).second; }
};

#define KERNEL(name) static bool name##_known = on_cpu::Caller<name>::add(#name)

}  // namespace on_cpu

// float16 as bits, to nearest, ties to even.
inline float half_to_float(unsigned short bits) {
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                              : std::ldexp(float(mantissa), -24);
  return bits >> 15 ? -size : size;
}

inline unsigned short float_to_half(float value) {
  unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (size != size) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = size < std::ldexp(1.0f, -14) ? -14 : std::ilogb(size);
  int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024 to 2048, or fewer where it is subnormal
  return sign | (unsigned short)(steps >= 1024 ? ((exponent + 15) << 10) + steps - 1024 : steps);
}

// 0, or 1 with what went wrong in `error`. together: all blocks of the grid are on the GPU at the same time.
extern "C" int on_cpu_launch(const char* name, const unsigned* grid, const unsigned* block, void** arguments, uint64_t schedule,
                             int together, char* error, size_t room_for_error) {
  using namespace on_cpu;
  try {
    const Kernel& kernel = kernels().at(name);
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    arguments_of_launch = arguments;
    call_of_launch = kernel.call;
    body = [] { call_of_launch(arguments_of_launch); };
    std::vector<Block> blocks;
    for (unsigned z = 0; z < grid[2]; ++z)
      for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0]; ++x) {
          blocks.emplace_back();
          blocks.back().index = {x, y, z};
          if (!together) run_blocks(blocks, schedule), blocks.clear();
        }
    if (together) run_blocks(blocks, schedule);
    return 0;
  } catch (const std::exception& problem) {
    snprintf(error, room_for_error, "%s: %s", name, problem.what());
    return 1;
  }
}

// How many arguments a kernel takes, and their sizes; -1: there is none of that name.
extern "C" int on_cpu_arguments(const char* name, size_t* sizes) {
  auto found = on_cpu::kernels().find(name);
  if (found == on_cpu::kernels().end()) return -1;
  for (size_t i = 0; i < found->second.sizes.size(); ++i) sizes[i] = found->second.sizes[i];
  return int(found->second.sizes.size());
}
