// One feature of every row of the inner model, between two draws: embedding, blocks, head and draw, 5 launches a block and one.
// arinar/inner.py is the same in PyTorch, export/gmm_head.py (InnerStep) as a graph; names agree.
//
// Products are made for few rows: every weight is read once for 8 of them. A warp makes 4 columns of 8 rows, its lanes dividing
// the weights of a column, which lie together; where columns are few, some warps divide them further. All sums are in float32
// and in a fixed order. Of type T are weights, modulation, keys, values and what products begin with; queries and the residual
// stream are float32.
//
// From Python, besides the draw's: NUMBER (that type), WIDTH, HEADS, HIDDEN, FEATURES, MODULATIONS, NORM_EPS, ATTENTION_SCALE;
// QKV_SPLIT, PROJECT_SPLIT, EXPAND_SPLIT, CONTRACT_SPLIT: how many warps divide a column of a product.

#include "draw.cuh"

typedef NUMBER T;
constexpr int WARPS = 8, THREADS = WARPS * LANES, ROWS = 8, COLUMNS = 4, CHUNK = 4 * LANES;
constexpr int HEAD_DIM = WIDTH / HEADS, OUTPUTS = 3 * GAUSSIANS, PER_LANE = (WIDTH + LANES - 1) / LANES;
constexpr int PADDED_HEAD_DIM = (HEAD_DIM + LANES - 1) / LANES * LANES;  // all lanes take part in a shuffle
static_assert(ROWS * COLUMNS == LANES, "in the end each lane has one sum");
static_assert(ROWS == WARPS, "a warp normalises a row");
static_assert(THREADS == DRAW_THREADS, "the last kernel of a feature draws");
static_assert(WIDTH % 4 == 0 && HIDDEN % 4 == 0 && HEAD_DIM % 8 == 0 && FEATURES <= LANES / 2, "a shape that the kernels lack");

typedef float Sums[WARPS][LANES];
struct ProductRoom {
  Sums sums;
};
struct NormRoom {
  Sums sums;
  alignas(16) float row[ROWS][WIDTH];
};

// Rows of a row-major matrix of weights, or of activations: row r begins at `from + r * stride`.
template <class X>
struct Rows {
  const X* from;
  size_t stride;
  int last;  // rows beyond are this one: what comes of them is not stored
  __device__ const X* operator[](int r) const { return from + (r < last ? r : last) * stride; }
};

// Sums of 32 values over the lanes of a warp: lane i gets that of value i. At each step a lane gives half of them away.
template <int STEP = LANES / 2>
__device__ inline float scatter_sums(float (&value)[LANES]) {
  bool upper = lane() & STEP;
#pragma unroll
  for (int i = 0; i < STEP; ++i) {
    float give = upper ? value[i] : value[i + STEP], keep = upper ? value[i + STEP] : value[i];
    value[i] = keep + __shfl_xor_sync(ALL_LANES, give, STEP);
  }
  if constexpr (STEP > 1)
    return scatter_sums<STEP / 2>(value);
  else
    return value[0];
}

// x (ROWS, K) times the columns of this block; store(row of the tile, column, sum) is called once for each.
template <int K, int COUNT, int SPLIT, class X, class Store>
__device__ inline void product(Sums& sums, Rows<X> x, const T* weight, Store store) {
  int part = warp() % SPLIT, first = (blockIdx.x * (WARPS / SPLIT) + warp() / SPLIT) * COLUMNS;
  float sum[LANES] = {};
  if (first < COUNT) {
#pragma unroll 3
    for (int chunk = part; chunk < (K + CHUNK - 1) / CHUNK; chunk += SPLIT) {
      int k = chunk * CHUNK + 4 * lane();
      if (K % CHUNK == 0 || k < K) {
        float w[COLUMNS][4], v[4];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) load4(weight + size_t(first + c) * K + k, w[c]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          load4(x[r] + k, v);
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[c * ROWS + r] += w[c][i] * v[i];
        }
      }
    }
  }
  float total = scatter_sums(sum);
  if (SPLIT > 1) {
    sums[warp()][lane()] = total;
    __syncthreads();
  }
  if (part == 0 && first < COUNT) {
    for (int other = 1; other < SPLIT; ++other) total += sums[warp() + other][lane()];
    if (lane() % ROWS <= x.last) store(lane() % ROWS, first + lane() / ROWS, total);
  }
}

// A row without mean and of variance one, scaled and shifted, by a warp: `value(i)` -> to[i].
template <class Value>
__device__ inline void normalise(float* to, const T* scale, const T* shift, Value value) {
  float own[PER_LANE], sum = 0, square = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    int i = j * LANES + lane();
    own[j] = i < WIDTH ? value(i) : 0;
    sum += own[j];
  }
  float mean = warp_sum(sum) / WIDTH;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    own[j] -= mean;
    if (j * LANES + lane() < WIDTH) square += own[j] * own[j];
  }
  float per_std = 1 / sqrtf(warp_sum(square) / WIDTH + NORM_EPS);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    int i = j * LANES + lane();
    if (i < WIDTH) to[i] = own[j] * per_std * (1 + widen(scale[i])) + widen(shift[i]);
  }
}

// What a row's modulation has under number `which`.
__device__ inline const T* modulation_of(const T* modulation, int row, int which) {
  return modulation + (size_t(row) * MODULATIONS + which) * WIDTH;
}

// The rows of this block's tile: blockIdx.y is its number.
__device__ inline int first_row() { return blockIdx.y * ROWS; }
__device__ inline int last_of_tile(int rows) { return (rows - first_row() < ROWS ? rows - first_row() : ROWS) - 1; }

// Queries (rows, WIDTH), and keys and values into their place of the cache (rows, FEATURES, 2, WIDTH). Block 0 embeds the
// features drawn before, or at position 0 the start, into the residual stream; `modulated`: numbers of scale and shift.
extern "C" __global__ void __launch_bounds__(THREADS)
    inner_qkv(const T* start, const float* feature, const T* entry, const T* entry_bias, const T* places, const T* modulation,
              const T* weight, const T* bias, float* stream, float* query, T* cache, int rows, int block, int position) {
  SHARED(NormRoom, room);
  int own = first_row() + (warp() < last_of_tile(rows) ? warp() : last_of_tile(rows));
  auto embedded = [&](int i) {
    float x = position == 0 ? widen(start[size_t(own) * WIDTH + i]) : feature[own] * widen(entry[i]) + widen(entry_bias[i]);
    return x + widen(places[position * WIDTH + i]);
  };
  auto value = [&](int i) { return block == 0 ? embedded(i) : stream[size_t(own) * WIDTH + i]; };
  if (block == 0 && blockIdx.x == 0)
    for (int i = lane(); i < WIDTH; i += LANES) stream[size_t(own) * WIDTH + i] = embedded(i);
  normalise(room.row[warp()], modulation_of(modulation, own, 6 * block + 2), modulation_of(modulation, own, 6 * block + 4), value);
  __syncthreads();
  Rows<float> x = {room.row[0], WIDTH, last_of_tile(rows)};
  product<WIDTH, 3 * WIDTH, QKV_SPLIT>(room.sums, x, weight, [&](int r, int column, float sum) {
    size_t row = first_row() + r;
    sum += widen(bias[column]);
    if (column < WIDTH)
      query[row * WIDTH + column] = sum;
    else
      cache[((row * FEATURES + position) * 2 + (column >= 2 * WIDTH)) * WIDTH + column % WIDTH] = narrow(sum);
  });
}

// Attention of every head of a row, a block's, to the cached positions up to this one: a warp a head, two lanes a position.
extern "C" __global__ void __launch_bounds__(THREADS)
    inner_attend(const float* query, const T* cache, T* attended, int position) {
  int row = blockIdx.x, slot = lane() / 2, half = lane() % 2 * (HEAD_DIM / 2);
  for (int head = warp(); head < HEADS; head += WARPS) {
    const float* q = query + size_t(row) * WIDTH + head * HEAD_DIM;
    const T* kept = cache + size_t(row) * FEATURES * 2 * WIDTH + head * HEAD_DIM;
    float score = 0, a[4], b[4];
    if (slot <= position)
      for (int i = half; i < half + HEAD_DIM / 2; i += 4) {
        load4(q + i, a);
        load4(kept + size_t(slot) * 2 * WIDTH + i, b);
        score += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
      }
    score = (score + __shfl_xor_sync(ALL_LANES, score, 1)) * ATTENTION_SCALE;
    float top = warp_max(slot <= position ? score : -3.4e38f);
    float weight = slot <= position ? expf(score - top) : 0;
    weight *= 2 / warp_sum(weight);  // each position is summed twice
    for (int i = lane(); i < PADDED_HEAD_DIM; i += LANES) {
      float sum = 0;
      for (int s = 0; s <= position; ++s) {
        float share = __shfl_sync(ALL_LANES, weight, 2 * s);
        if (i < HEAD_DIM) sum += share * widen(kept[(size_t(s) * 2 + 1) * WIDTH + i]);
      }
      if (i < HEAD_DIM) attended[size_t(row) * WIDTH + head * HEAD_DIM + i] = narrow(sum);
    }
  }
}

// stream += gamma (x W + bias): what leaves the attention, or the MLP. `which`: the gamma's number.
template <int K, int SPLIT>
__device__ inline void add_product(Sums& sums, const T* from, const T* weight, const T* bias, const T* modulation,
                                   float* stream, int rows, int which) {
  Rows<T> x = {from + size_t(first_row()) * K, K, last_of_tile(rows)};
  product<K, WIDTH, SPLIT>(sums, x, weight, [&](int r, int column, float sum) {
    size_t row = first_row() + r;
    stream[row * WIDTH + column] += widen(modulation_of(modulation, row, which)[column]) * (sum + widen(bias[column]));
  });
}

extern "C" __global__ void __launch_bounds__(THREADS) inner_project(const T* attended, const T* weight, const T* bias,
                                                                    const T* modulation, float* stream, int rows, int block) {
  SHARED(ProductRoom, room);
  add_product<WIDTH, PROJECT_SPLIT>(room.sums, attended, weight, bias, modulation, stream, rows, 6 * block);
}

extern "C" __global__ void __launch_bounds__(THREADS) inner_contract(const T* hidden, const T* weight, const T* bias,
                                                                     const T* modulation, float* stream, int rows, int block) {
  SHARED(ProductRoom, room);
  add_product<HIDDEN, CONTRACT_SPLIT>(room.sums, hidden, weight, bias, modulation, stream, rows, 6 * block + 1);
}

__device__ inline float gelu(float x) { return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }

// The first half of the MLP, its norm before it and its activation behind it: hidden (rows, HIDDEN).
extern "C" __global__ void __launch_bounds__(THREADS) inner_expand(const float* stream, const T* modulation, const T* weight,
                                                                   const T* bias, T* hidden, int rows, int block) {
  SHARED(NormRoom, room);
  int own = first_row() + (warp() < last_of_tile(rows) ? warp() : last_of_tile(rows));
  normalise(room.row[warp()], modulation_of(modulation, own, 6 * block + 3), modulation_of(modulation, own, 6 * block + 5),
            [&](int i) { return stream[size_t(own) * WIDTH + i]; });
  __syncthreads();
  Rows<float> x = {room.row[0], WIDTH, last_of_tile(rows)};
  product<WIDTH, HIDDEN, EXPAND_SPLIT>(room.sums, x, weight, [&](int r, int column, float sum) {
    hidden[size_t(first_row() + r) * HIDDEN + column] = narrow(gelu(sum + widen(bias[column])));
  });
}

struct HeadRoom {
  DrawRoom draw;
  float row[2][WIDTH], output[2][OUTPUTS], weight[2][GAUSSIANS];
};

// Head and draw: a block for each drawn row, its unconditional one (guidance_scale not null) `gridDim.x` rows behind it.
// The draw as in `mixture_draw`; head_weight (OUTPUTS, WIDTH): mu, logvar, logits.
extern "C" __global__ void __launch_bounds__(THREADS)
    inner_draw(const float* stream, const T* modulation, const float* head_weight, const float* head_bias, const float* uniforms,
               const float* guidance_scale, const float* temperature, float* feature, float* tokens, int position) {
  SHARED(HeadRoom, room);
  int row = blockIdx.x, rows = gridDim.x, branches = guidance_scale != nullptr ? 2 : 1;
  if (warp() < branches) {
    int own = row + warp() * rows;
    normalise(room.row[warp()], modulation_of(modulation, own, MODULATIONS - 2), modulation_of(modulation, own, MODULATIONS - 1),
              [&](int i) { return stream[size_t(own) * WIDTH + i]; });
  }
  __syncthreads();
  for (int o = warp(); o < branches * OUTPUTS; o += WARPS) {
    const float *x = room.row[o / OUTPUTS], *w = head_weight + size_t(o % OUTPUTS) * WIDTH;
    float sum = 0;
    for (int i = lane(); i < WIDTH; i += LANES) sum += x[i] * w[i];
    sum = warp_sum(sum);
    if (lane() == 0) room.output[o / OUTPUTS][o % OUTPUTS] = sum + head_bias[o % OUTPUTS];
  }
  __syncthreads();
  if (threadIdx.x < branches * GAUSSIANS) {
    int branch = threadIdx.x / GAUSSIANS, k = threadIdx.x % GAUSSIANS;
    const float* logits = room.output[branch] + 2 * GAUSSIANS;
    float top = logits[0], sum = 0;
    for (int i = 1; i < GAUSSIANS; ++i) top = fmaxf(top, logits[i]);
    for (int i = 0; i < GAUSSIANS; ++i) sum += expf(logits[i] - top);
    room.weight[branch][k] = expf(logits[k] - top) / sum;
  }
  __syncthreads();
  float guidance = branches == 2 ? guidance_scale[row] : 1;
  const float *cond = room.output[0], *uncond = room.output[branches - 1];
  float value = draw(room.draw, {room.weight[0], cond, cond + GAUSSIANS}, {room.weight[branches - 1], uncond, uncond + GAUSSIANS},
                     guidance != 1 && CANDIDATES > 1, uniforms[row], guidance, temperature[row]);
  if (threadIdx.x == 0) {
    for (int branch = 0; branch < branches; ++branch) feature[row + branch * rows] = value;
    tokens[size_t(row) * FEATURES + position] = value;
  }
}
