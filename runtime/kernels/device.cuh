// What every kernel stands on: the block's shared memory, sums over a warp and a block, numbers of two bytes.
//
// A kernel's shared memory is one struct, its room, declared with SHARED: a kernel that is run by a CPU gets it from there
// (macros in ON_CPU's place define what CUDA has and C++ lacks). Reductions add in a fixed order, whatever else runs.

#pragma once

#ifndef ON_CPU
#define SHARED(Room, name) __shared__ Room name
#endif

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LANES = 32;

__device__ inline int lane() { return threadIdx.x % LANES; }
__device__ inline int warp() { return threadIdx.x / LANES; }

// Every lane gets the same bits: at each level two lanes add the same two numbers.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

__device__ inline float clamp(float value, float low, float high) { return fminf(fmaxf(value, low), high); }
