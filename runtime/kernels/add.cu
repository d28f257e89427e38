// left + factor * right, number by number: a sum that no graph of a bundle makes.

#include "device.cuh"

extern "C" __global__ void __launch_bounds__(ADD_THREADS)
    add(const float* left, const float* right, float* target, int count, float factor) {
  int at = blockIdx.x * ADD_THREADS + threadIdx.x;
  if (at < count) target[at] = left[at] + factor * right[at];
}
