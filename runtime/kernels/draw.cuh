// One draw from a 1-D Gaussian mixture, plain or guided, by a block of threads.
//
// What is computed, and why, is in arinar/mixture_law.py; arinar/runtime/gmm.py is the same in float64, and names agree.
// A row's threads divide its cells; what needs a sum over cells is a warp's for each table entry or node. No row sees
// another, and every sum has a fixed order: a row's bits do not depend on what is drawn beside it.
//
// From Python: DRAW_THREADS, GAUSSIANS, CANDIDATES (1 or more), and the law's constants.

#pragma once

#include "device.cuh"

constexpr int DRAW_WARPS = DRAW_THREADS / LANES;
constexpr int KINKS = 2 * GAUSSIANS, CELLS = CELLS_PER_GAUSSIAN * GAUSSIANS;
// The quantile adds up cells by segments: in the order of the cells, so that the distribution function never falls.
constexpr int SEGMENT = 16, SEGMENTS = CELLS / SEGMENT;
__constant__ float TARGETS[NODES] = NODE_TARGETS;
constexpr float SQRT_HALF = 0.70710678f, PDF_AT_0 = 0.39894228f;
static_assert(KINKS <= DRAW_THREADS && SEGMENTS <= DRAW_THREADS, "more Gaussians than a block has threads for");
static_assert(TABLE_NODES <= LANES + 1, "a warp has a lane for each step of the table");

// log p(x) + log(2 pi) / 2 of one Gaussian of a mixture is peak - ((x - mu) scale)^2.
struct Density {
  float peak[GAUSSIANS], mu[GAUSSIANS], scale[GAUSSIANS];
};

struct DrawRoom {
  float pdf[GAUSSIANS], mu[GAUSSIANS], std[GAUSSIANS], per_std[GAUSSIANS];  // of the proposals
  Density cond, uncond;
  float kink[KINKS], count[KINKS];
  float edge[CELLS + 1], mass[CELLS], log_w[CELLS];
  float top[DRAW_WARPS], bottom[DRAW_WARPS], mean[DRAW_WARPS], soft[DRAW_WARPS];  // partial results
  float log_t[TABLE_NODES], entry[TABLE_NODES];
  float node[NODES], reached[NODES], slope[NODES + 1];
  float segment[SEGMENTS];
};

struct Mixture {
  const float *weight, *mu, *logvar;  // of one row, GAUSSIANS each
};

__device__ inline float number_of_cells_below(const DrawRoom& room, float x) {
  float count = 0;
  for (int k = 0; k < GAUSSIANS; ++k) count += clamp((x - room.mu[k]) / room.std[k], -REACH, REACH);
  return count;
}

__device__ inline float log_density(const Density& mixture, float x) {
  float term[GAUSSIANS], top = -3.4e38f, sum = 0;
#pragma unroll
  for (int k = 0; k < GAUSSIANS; ++k) {
    float scaled = (x - mixture.mu[k]) * mixture.scale[k];
    term[k] = mixture.peak[k] - scaled * scaled;
    top = fmaxf(top, term[k]);
  }
#pragma unroll
  for (int k = 0; k < GAUSSIANS; ++k) sum += expf(term[k] - top);
  return top + logf(sum);
}

__device__ inline void fill_density(Density& density, Mixture mixture, int k) {
  density.peak[k] = logf(fmaxf(mixture.weight[k], TINY)) - 0.5f * mixture.logvar[k];
  density.mu[k] = mixture.mu[k];
  density.scale[k] = expf(-0.5f * mixture.logvar[k]) * SQRT_HALF;
}

// Kink i of the mesh: the lower ends of all Gaussians, then the upper ones.
__device__ inline float end_of(const DrawRoom& room, int i) {
  float reach = REACH * room.std[i % GAUSSIANS];
  return room.mu[i % GAUSSIANS] + (i < GAUSSIANS ? -reach : reach);
}

// Sorted edges of the cells.
__device__ inline void make_mesh(DrawRoom& room) {
  int thread = threadIdx.x;
  if (thread < KINKS) {
    float own = end_of(room, thread);
    int rank = 0;
    for (int i = 0; i < KINKS; ++i) {
      float other = end_of(room, i);
      rank += other < own || (other == own && i < thread);
    }
    room.kink[rank] = own;
  }
  __syncthreads();
  if (thread < KINKS) room.count[thread] = number_of_cells_below(room, room.kink[thread]);
  __syncthreads();
  for (int e = thread; e <= CELLS; e += DRAW_THREADS) {
    float wanted = GAUSSIANS * REACH * (2.0f * e / CELLS - 1), x = room.kink[0];
    for (int i = 0; i + 1 < KINKS; ++i) {
      float rise = fmaxf(room.count[i + 1] - room.count[i], SMALL);
      x += clamp((wanted - room.count[i]) / rise, 0, 1) * (room.kink[i + 1] - room.kink[i]);
    }
    room.edge[e] = x;
  }
  __syncthreads();
}

// Probability of a cell under the proposals.
__device__ inline float cell_mass(const DrawRoom& room, float low, float high) {
  float middle = 0.5f * (low + high), mass = 0;
#pragma unroll
  for (int k = 0; k < GAUSSIANS; ++k) {
    float z = (middle - room.mu[k]) * room.per_std[k], width = (high - low) * room.per_std[k];
    mass += expf(-0.5f * z * z) * room.pdf[k] * width * (1 + (z * z - 1) * (width * width) * (1.0f / 24));
  }
  return fmaxf(mass, TINY);
}

// 1 - exp(-t w).
__device__ inline float hit(float log_tw) { return -expm1f(-expf(clamp(log_tw, LOG_TW_MIN, LOG_TW_MAX))); }

// Where the table of log t begins and ends, from log w and the masses of all cells.
__device__ inline void table_range(DrawRoom& room, float& first, float& last) {
  float top = -3.4e38f, bottom = 3.4e38f;
  for (int p = threadIdx.x; p < CELLS; p += DRAW_THREADS) {
    top = fmaxf(top, room.log_w[p]);
    bottom = fminf(bottom, room.log_w[p]);
  }
  top = warp_max(top);
  bottom = -warp_max(-bottom);
  if (lane() == 0) room.top[warp()] = top, room.bottom[warp()] = bottom;
  __syncthreads();
  for (int w = 0; w < DRAW_WARPS; ++w) top = fmaxf(top, room.top[w]), bottom = fminf(bottom, room.bottom[w]);
  float mean = 0, soft = 0;
  for (int p = threadIdx.x; p < CELLS; p += DRAW_THREADS) {
    mean += room.mass[p] * expf(room.log_w[p] - top);
    soft += room.mass[p] * expf(SOFT_MIN * (bottom - room.log_w[p]));
  }
  mean = warp_sum(mean);
  soft = warp_sum(soft);
  if (lane() == 0) room.mean[warp()] = mean, room.soft[warp()] = soft;
  __syncthreads();
  mean = soft = 0;
  for (int w = 0; w < DRAW_WARPS; ++w) mean += room.mean[w], soft += room.soft[w];
  first = FIRST_TARGET - (top + logf(mean));
  last = LAST_OFFSET - (bottom - logf(soft) / SOFT_MIN);
}

// Tabulates log E[tw / (1 + tw)], a warp an entry.
__device__ inline void fill_table(DrawRoom& room, float first, float last) {
  float growth = log1pf(fmaxf(last - first, 1.0f) / EVEN_RANGE);
  for (int j = warp(); j < TABLE_NODES; j += DRAW_WARPS) {
    float log_t = last - EVEN_RANGE * expm1f((1 - float(j) / (TABLE_NODES - 1)) * growth), sum = 0;
    for (int p = lane(); p < CELLS; p += LANES) {
      float logit = clamp(log_t + room.log_w[p], -LOGIT_MAX, LOGIT_MAX);
      sum += room.mass[p] / (1 + expf(-logit));
    }
    sum = warp_sum(sum);
    if (lane() == 0) room.log_t[j] = log_t, room.entry[j] = logf(sum);
  }
  __syncthreads();
}

// The nodes where the table reaches the targets, and B there, a warp a node; then how steeply (1 - B)^N falls between.
__device__ inline void place_nodes(DrawRoom& room) {
  for (int i = warp(); i < NODES; i += DRAW_WARPS) {
    float part = 0, sum = 0;
    if (lane() + 1 < TABLE_NODES) {
      float start = room.entry[lane()], rise = fmaxf(room.entry[lane() + 1] - start, SMALL);
      part = clamp((TARGETS[i] - start) / rise, 0, 1) * (room.log_t[lane() + 1] - room.log_t[lane()]);
    }
    float node = room.log_t[0] + warp_sum(part);
    for (int p = lane(); p < CELLS; p += LANES) sum += room.mass[p] * hit(node + room.log_w[p]);
    sum = warp_sum(sum);
    if (lane() == 0) room.node[i] = node, room.reached[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x <= NODES) {
    // The quotient of two small differences, as one that stays exact where they are smaller than their rounding.
    int i = threadIdx.x;
    float low = i > 0 ? fminf(room.reached[i - 1], 1) : 0, high = i < NODES ? fminf(room.reached[i], 1) : 1;
    float step = fmaxf(high - low, TINY), share = fminf(step / fmaxf(1 - low, TINY), 1);
    room.slope[i] = expf(CANDIDATES * log1pf(-low)) * -expm1f(CANDIDATES * log1pf(-share)) / step;
  }
  __syncthreads();
}

// The law of the proposals' masses -> that of the pick's.
__device__ inline void guide(DrawRoom& room) {
  float first, last;
  table_range(room, first, last);
  fill_table(room, first, last);
  place_nodes(room);
  for (int p = threadIdx.x; p < CELLS; p += DRAW_THREADS) {
    float share = room.slope[NODES];
#pragma unroll 4
    for (int i = 0; i < NODES; ++i) share += (room.slope[i] - room.slope[i + 1]) * hit(room.node[i] + room.log_w[p]);
    room.mass[p] = fmaxf(room.mass[p] * share, TINY);
  }
  __syncthreads();
}

// Probability by length of cell p; beyond the ends, that of the last ones.
__device__ inline float density_of(const DrawRoom& room, int p) {
  p = p < 0 ? 0 : p >= CELLS ? CELLS - 1 : p;
  return room.mass[p] / fmaxf(room.edge[p + 1] - room.edge[p], TINY);
}

// The inverse distribution function, for thread 0. Probabilities add up from the nearer end: so float32 has as many digits
// for the far upper tail as for the lower one.
__device__ inline float quantile(DrawRoom& room, float uniform) {
  if (threadIdx.x < SEGMENTS) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) sum += room.mass[threadIdx.x * SEGMENT + i];
    room.segment[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x > 0) return 0;
  bool from_top = uniform > 0.5f;
  float total = 0, passed = 0, sum = 0;
  for (int s = 0; s < SEGMENTS; ++s) total += room.segment[s];
  float wanted = (from_top ? 1 - uniform : uniform) * total;
  int segment = from_top ? SEGMENTS - 1 : 0, step = from_top ? -1 : 1;
  for (int s = 0, at = segment; s + 1 < SEGMENTS; ++s, at += step) {
    sum += room.segment[at];
    if (sum <= wanted) passed = sum, segment = at + step;
  }
  wanted -= passed;
  passed = sum = 0;
  int cell = segment * SEGMENT + (from_top ? SEGMENT - 1 : 0);
#pragma unroll
  for (int i = 0, at = cell; i + 1 < SEGMENT; ++i, at += step) {
    sum += room.mass[at];
    if (sum <= wanted) passed = sum, cell = at + step;
  }
  float part = clamp((wanted - passed) / room.mass[cell], 0, 1);
  float right = from_top ? 1 - part : part, left = from_top ? part : 1 - part;
  float ratio = clamp(density_of(room, cell - 1) / density_of(room, cell + 1), 1 / MAX_LEAN, MAX_LEAN);
  float inside = right / (right + sqrtf(sqrtf(ratio)) * left);
  return room.edge[cell] + (room.edge[cell + 1] - room.edge[cell]) * inside;
}

// What is not finite, nor a draw from it.
__device__ inline float taint(Mixture mixture) {
  float sum = 0;
  for (int k = 0; k < GAUSSIANS; ++k) sum += 0 * (mixture.weight[k] + mixture.mu[k] + mixture.logvar[k]);
  return sum;
}

// A draw, in thread 0 of the block; all of it must call. `guided`: the same for all of a block.
__device__ inline float draw(DrawRoom& room, Mixture cond, Mixture uncond, bool guided, float uniform, float guidance,
                             float temperature) {
  int k = threadIdx.x;
  if (k < GAUSSIANS) {
    float std = expf(0.5f * cond.logvar[k]) * temperature;
    room.mu[k] = cond.mu[k];
    room.std[k] = std;
    room.per_std[k] = 1 / std;
    room.pdf[k] = cond.weight[k] * PDF_AT_0;
    if (guided) {
      fill_density(room.cond, cond, k);
      fill_density(room.uncond, uncond, k);
    }
  }
  __syncthreads();
  make_mesh(room);
  for (int p = threadIdx.x; p < CELLS; p += DRAW_THREADS) {
    float low = room.edge[p], high = room.edge[p + 1], middle = 0.5f * (low + high);
    room.mass[p] = cell_mass(room, low, high);
    if (guided) room.log_w[p] = (log_density(room.cond, middle) - log_density(room.uncond, middle)) * (guidance - 1);
  }
  if (guided)
    guide(room);  // begins with a thread's own cells
  else
    __syncthreads();
  float value = quantile(room, uniform);
  return value + taint(cond) + (guided ? taint(uncond) : 0);
}
