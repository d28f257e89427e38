// A draw for each row, a block for each: what `mixture_sample` and `mixture_sample_guided` do as graphs.

#include "draw.cuh"

// Mixtures of `rows` conditional rows, guided of as many unconditional ones behind them, K = GAUSSIANS values each;
// uniforms, guidance_scale (null: plain) and temperature of each row -> feature (rows,), guided (2 rows,) with both halves
// the same; and the same into tokens (rows, features) at `position`.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
    mixture_draw(const float* weight, const float* mu, const float* logvar, const float* uniforms, const float* guidance_scale,
                 const float* temperature, float* feature, float* tokens, int features, int position) {
  SHARED(DrawRoom, room);
  int row = blockIdx.x, rows = gridDim.x;
  bool branches = guidance_scale != nullptr;
  float guidance = branches ? guidance_scale[row] : 1;
  size_t own = size_t(row) * GAUSSIANS, other = branches ? size_t(rows + row) * GAUSSIANS : own;
  // With a guidance of exactly 1, as with a single candidate, all is drawn from the proposals' law.
  float value = draw(room, {weight + own, mu + own, logvar + own}, {weight + other, mu + other, logvar + other},
                     guidance != 1 && CANDIDATES > 1, uniforms[row], guidance, temperature[row]);
  if (threadIdx.x == 0) {
    feature[row] = value;
    if (branches) feature[rows + row] = value;
    tokens[size_t(row) * features + position] = value;
  }
}
