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

// A float16 number as it lies in memory.
struct Half {
  unsigned short bits;
};

#ifndef ON_CPU
__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Half value) { return half_to_float(value.bits); }

// What a float is as another type; to assign to either.
struct Narrowed {
  float value;
  __device__ operator float() const { return value; }
  __device__ operator Half() const { return {float_to_half(value)}; }
};

__device__ inline Narrowed narrow(float value) { return {value}; }

// Four numbers side by side, in one access.
template <class Number>
struct alignas(4 * sizeof(Number)) Four {
  Number at[4];
};

template <class Number>
__device__ inline void load4(const Number* from, float (&to)[4]) {
  Four<Number> four = *reinterpret_cast<const Four<Number>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = widen(four.at[i]);
}
